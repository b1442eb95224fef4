"""Accuracies on the tasks of lm-eval, which is imported inside functions: it is an extra, and slow to import."""
