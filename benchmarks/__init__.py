"""Measures Roundhouse against its speed bars; ``python -m benchmarks --help``."""
