"""nexus_fused: the Nexus optimizer (arXiv 2604.09258) at AdamW's price."""

from .nexus import Nexus
from .optimizer import NexusAdamW

__version__ = "0.1.0"  # the only place: the build reads it here
__all__ = ["Nexus", "NexusAdamW", "__version__"]
