"""From text to activations and gradients: token windows, and the passes that run them through a model."""
