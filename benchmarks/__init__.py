"""Measurements of minift: `python -m benchmarks NAME`; see README.md."""
