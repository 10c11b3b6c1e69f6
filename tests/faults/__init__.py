"""Faults to plant in artifacts, for tests and `benchmarks/mutations.py`."""
