"""Benchmarks: ``python -m benchmarks``. Every number in README and docs comes from here."""
