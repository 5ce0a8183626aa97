"""The cells of `benchmarks/wan.py`, and how one of them is measured."""
