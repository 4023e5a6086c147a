"""Many training runs on one base: each its own adapter, optimizer, schedule and random numbers."""
