"""The rows of `scripts/bench.py`, one file per group: see `benchmarks.rows`."""
