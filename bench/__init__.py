"""Benchmarks: `python -m bench` for paired ratios, a table and a JSON; `pytest bench` for pytest-benchmark tables."""
