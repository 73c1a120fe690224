"""Compares AdamW and NexusAdamW on real text of several kinds; run it as `python -m nexus_fused.demo`."""


class DemoError(RuntimeError):
    """Something the user can put right; the message says how."""
