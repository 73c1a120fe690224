"""Does the walk help, at which γ, K, size and amount of data? Run it as `python -m bench.study`."""

from nexus_fused.demo import DemoError


class StudyError(DemoError):
    """Something the user can put right; the message says how."""
