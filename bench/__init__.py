"""Benchmarks: `python -m bench` for paired ratios, a table and a JSON; `pytest bench` for pytest-benchmark tables. What
they share with the tests, and whatever is private in the package, comes through tests/inside.py.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
