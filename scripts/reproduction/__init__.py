"""The stages of `scripts/reproduce.sh`, one file each, and what they share."""
