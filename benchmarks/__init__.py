"""Measure minift: `python -m benchmarks NAME`; README.md describes each benchmark."""
