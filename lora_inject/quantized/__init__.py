"""Weights that a model holds packed: the values that they stand for, read and written."""
