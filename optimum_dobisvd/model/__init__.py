"""A transformers model as it is: its blocks, the linears in them, what they weigh and compute."""
