"""Benchmarks: each prints one line, a ratio to a bare baseline that runs beside it."""
