"""How fast a model generates, rounds of several models by turns, and how fast the machine would let it."""
