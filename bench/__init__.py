"""Benchmarks: `python -m bench` for paired ratios and a JSON, `pytest bench` for pytest-benchmark's own tables."""
