"""`python -m nexus_fused`: what runs here, and why something does not."""

from __future__ import annotations

import importlib
import platform

import torch

from . import __version__, backends


def main() -> None:
    """Prints versions, devices, threads, instruction set and the backends of this machine."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:  # the table below says why
        triton = "none"
    cuda = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})" if torch.cuda.is_available() else "none"
    print(f"nexus_fused  {__version__}")
    print(f"torch        {torch.__version__}")
    print(f"triton       {triton}")
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"GPU          {cuda}")
    print(f"threads      {torch.get_num_threads()} (torch.set_num_threads)")
    print(f"instructions {backends.instruction_set()}")
    print(f"CUDA kernels {backends.cuda_targets()}")
    print("\nbackends, as NexusAdamW(backend=...) takes them:")
    for name, reason in backends.available().items():
        print(f"  {name:10} {'available' if reason is None else 'missing: ' + reason}")
    gpu = ["cuda"] if torch.cuda.is_available() else []
    for device in map(torch.device, ["cpu", *gpu]):
        print(f"\nbackend=None on {device}: {backends.chosen(device)}")


if __name__ == "__main__":
    main()
