"""A compressed model as an ordinary Hugging Face checkpoint: saved, verified, loaded, converted."""
