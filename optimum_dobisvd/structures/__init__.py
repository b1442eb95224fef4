"""How a matrix is written as linears: one file a structure, and `format`, a structure with an encoding."""
