"""Compiled graphs: switching among adapters without compiling again."""
