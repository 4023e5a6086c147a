"""Stacks of experts: weights that are formed only where they are used, and packed ones."""
