"""How one linear's weight is stored: one file an encoding, or a few beside it where another library makes it."""
