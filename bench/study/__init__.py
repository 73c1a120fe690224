"""Does the walk help, at which γ, K, size and amount of data? Run it as `python -m bench.study`."""


class StudyError(RuntimeError):
    """Something the user can put right; the message says how."""
