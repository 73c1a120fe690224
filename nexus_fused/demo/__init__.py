"""Compares AdamW and NexusAdamW on real text of several kinds; run it as `python -m nexus_fused.demo`."""

import os
from pathlib import Path


class DemoError(RuntimeError):
    """Something the user can put right; the message says how."""


def cache_folder() -> Path:
    """Return where the text is kept unless a user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexus_fused"
