"""Checks around the verbs: sites that nobody uses, buffers that move."""
