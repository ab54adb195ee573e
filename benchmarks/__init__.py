"""Benchmarks of the kernels: `python -m benchmarks run`, then `python -m benchmarks report`."""
