"""What `benchmarks/overhead.py` measures: a training step with the hook and without, and copies on a GPU."""
