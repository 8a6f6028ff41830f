"""Measure Rollcall beside its peers: ``python -m benchmarks``, or ``make bench``."""
