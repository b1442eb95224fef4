"""Products with 8-bit matrices."""
