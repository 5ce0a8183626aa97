"""The runs behind benchmarks/parity.py."""
