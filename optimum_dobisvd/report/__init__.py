"""What a compression did: figures, tables, pictures."""
