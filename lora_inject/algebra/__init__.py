"""Arithmetic on adapters as values: sums, truncations, other shapes, published ways to combine."""
