"""From text to what a model leaves behind: token windows, and the passes that run them through the model."""
