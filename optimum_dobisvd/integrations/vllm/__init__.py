"""Serving compressed checkpoints by vLLM: what `plugin.register`, an entry point of vLLM, makes known to it."""
