"""nexus_fused: the Nexus optimizer (arXiv 2604.09258) at AdamW's price."""

from .matrices import split_matrices
from .nexus import Nexus
from .optimizer import NexusAdamW

__version__ = "0.2.0"  # the only place: the build reads it here
__all__ = ["Nexus", "NexusAdamW", "__version__", "split_matrices"]
