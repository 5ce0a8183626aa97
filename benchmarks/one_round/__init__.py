"""The contestants of `benchmarks/round.py`."""
