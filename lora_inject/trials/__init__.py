"""Many training runs on one base, each with its own adapter, optimizer, schedule and seed."""
