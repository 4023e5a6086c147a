"""Weights that a model holds packed: one file for each library that packs them, named after it."""
