"""Checks around the verbs: sites that nobody uses, moving buffers, fingerprints of a base."""
