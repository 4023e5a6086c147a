"""What `scripts/bench.py` measures: twelve rows in `rows.py`, and how in `measure.py`."""
