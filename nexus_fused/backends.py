"""Which backends this machine has, why one is missing, and which one a device gets. The only importer of backends."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")

_REINSTALL = (
    "install a C++ compiler (for example g++) and then nexus_fused again: pip install --force-reinstall nexus_fused"
)


def available() -> dict[str, str | None]:
    """Every backend's name with None where it runs on this machine, else the reason why not and the remedy."""
    reasons: dict[str, str | None] = {"reference": None}
    try:
        importlib.import_module("nexus_fused._C")
        reasons["cpu"] = None
    except ImportError as error:
        reasons["cpu"] = f"the compiled extension nexus_fused._C cannot be imported ({error}): {_REINSTALL}"
    reasons["triton"] = "this version of nexus_fused has no Triton kernels yet; backend='reference' runs on a GPU"
    reasons["cuda"] = "this version of nexus_fused has no CUDA kernels yet; backend='reference' runs on a GPU"
    return reasons


def check_choice(backend: str | None, fused: bool | None) -> None:
    """Raises ValueError where the constructor's `backend` is unknown or contradicts `fused`."""
    if backend is not None and backend not in NAMES:
        raise ValueError(
            f"unknown backend {backend!r}: choose None (best for each device) or one of {', '.join(NAMES)}"
        )
    if backend is not None and fused is not None and fused == (backend == "reference"):
        raise ValueError(f"backend={backend!r} contradicts fused={fused}: leave one of them None")


def resolve(backend: str | None, fused: bool | None, device: torch.device) -> ModuleType:
    """The backend module for parameters on `device`, under the constructor's `backend` and `fused`.

    RuntimeError: what was asked for explicitly cannot run here; nothing falls back.
    """
    if fused is False or backend == "reference":
        return importlib.import_module("nexus_fused.reference")
    name = backend or ("cpu" if device.type == "cpu" else "triton")
    reason = available()[name]
    if name == "cpu" and device.type != "cpu":
        reason = f"its kernels run on CPU tensors and a parameter is on {device}: use backend=None or 'reference'"
    if reason is None:
        return importlib.import_module(f"nexus_fused.{name}")
    if backend is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    if fused:
        raise RuntimeError(f"fused=True, but no fused backend runs on {device}: {reason}")
    return importlib.import_module("nexus_fused.reference")


def instruction_set() -> str:
    """The instruction set the CPU kernels use here, those they could use, and whether they have threads."""
    if available()["cpu"] is not None:
        return "none (no compiled kernels)"
    extension = importlib.import_module("nexus_fused._C")
    threads = "OpenMP" if extension.OPENMP else "built without OpenMP: one thread"
    return f"{extension.instruction_set()} (of {', '.join(extension.instruction_sets())}; {threads})"
