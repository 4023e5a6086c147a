"""The stages of `scripts/reproduce.py`, one file each, and what they share."""
