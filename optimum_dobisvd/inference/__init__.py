"""A compressed model made faster to generate with, reversibly: one file a means, and `optimize`, all of them."""
