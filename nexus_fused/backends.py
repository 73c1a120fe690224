"""Which backends this machine has, why one is missing, and which one a device gets. The only importer of fused ones."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")

AGAIN = "this package again, in its checkout: pip install --force-reinstall --no-deps ."

# The module a backend cannot do without, and how to get it.
_COMPILED = ("nexus_fused._C", f"install a C++ compiler (such as g++) and then {AGAIN}")
_NEEDS = {"cpu": _COMPILED, "triton": ("triton", "pip install triton"), "cuda": _COMPILED}


def available() -> dict[str, str | None]:
    """Every backend's name with None where it runs on this machine, else the reason why not and the remedy."""
    cpu, gpu = torch.device("cpu"), torch.accelerator.current_accelerator(check_available=True)
    if gpu is not None:
        gpu = torch.device(gpu.type, torch.accelerator.current_device_index())
    return {name: why_not(name, cpu if name == "cpu" else gpu or cpu) for name in NAMES}


def why_not(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    displacement_dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """None where the backend can update tensors of these dtypes on `device`, else the reason why not and the remedy."""
    if name == "reference":
        return None
    needed, remedy = _NEEDS[name]
    try:
        importlib.import_module(needed)
    except ImportError as error:
        return f"{needed} cannot be imported ({error}): {remedy}"
    module = importlib.import_module(f"nexus_fused.{name}")
    reason: str | None = module.why_not_on(device, dtype, displacement_dtype)
    return reason


def check_choice(backend: str | None, fused: bool | None) -> None:
    """Raises ValueError where the constructor's `backend` is unknown or contradicts `fused`."""
    if backend is not None and backend not in NAMES:
        raise ValueError(
            f"unknown backend {backend!r}: choose None (best for each device) or one of {', '.join(NAMES)}"
        )
    if backend is not None and fused is not None and fused == (backend == "reference"):
        raise ValueError(f"backend={backend!r} contradicts fused={fused}: leave one of them None")


def resolve(
    backend: str | None,
    fused: bool | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    displacement_dtype: torch.dtype = torch.bfloat16,
) -> ModuleType:
    """The backend module for parameters of `dtype` on `device`, under the constructor's `backend` and `fused`.

    RuntimeError: what was asked for explicitly cannot run here; nothing falls back.
    """
    if fused is False or backend == "reference":
        return importlib.import_module("nexus_fused.reference")
    reasons = {}
    for name in [backend] if backend else _fused(device):
        reason = why_not(name, device, dtype, displacement_dtype)
        if reason is None:  # the others are not asked: Triton's answer is to compile all of its kernels
            if name == "cpu":
                _tell_of_one_thread()
            return importlib.import_module(f"nexus_fused.{name}")
        reasons[name] = reason
    if backend is not None:
        raise RuntimeError(
            f"backend={backend!r} cannot run: {reasons[backend]}. On {device}, backend={chosen(device)!r} would run"
        )
    explained = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if fused:
        raise RuntimeError(f"fused=True, but no fused backend runs on {device}: {explained}")
    warnings.warn(
        f"NexusAdamW runs its reference on {device}, which is several times slower than a fused backend: {explained}",
        stacklevel=2,
    )
    return importlib.import_module("nexus_fused.reference")


def _tell_of_one_thread() -> None:
    """Warns where the CPU kernels cannot use the threads that PyTorch uses."""
    threads = torch.get_num_threads()
    if threads > 1 and not importlib.import_module("nexus_fused._C").OPENMP:
        warnings.warn(
            f"NexusAdamW runs on one thread where PyTorch uses {threads}: its CPU kernels were built without OpenMP. "
            f"Install it for your compiler (for clang on Debian: libomp-dev) and then {AGAIN}",
            stacklevel=2,
        )


def chosen(device: torch.device) -> str:
    """What `backend=None` takes on a device."""
    return next(name for name in (*_fused(device), "reference") if why_not(name, device) is None)


def _fused(device: torch.device) -> list[str]:
    """The fused backends for a device, the fastest first, whether or not this machine has them."""
    if device.type == "cpu":
        return ["cpu"]
    return ["cuda", "triton"] if device.type == "cuda" else ["triton"]


def cuda_targets() -> str:
    """The architectures the CUDA kernels were built for, as CMake names them."""
    if why_not("cpu", torch.device("cpu")) is not None:
        return "none (no compiled kernels)"
    return importlib.import_module("nexus_fused._C").CUDA_TARGETS or "none (built without a CUDA compiler)"


def instruction_set() -> str:
    """The instruction set the CPU kernels use here, those they could use, and whether they have threads."""
    if why_not("cpu", torch.device("cpu")) is not None:
        return "none (no compiled kernels)"
    extension = importlib.import_module("nexus_fused._C")
    threads = "OpenMP" if extension.OPENMP else "built without OpenMP: one thread"
    return f"{extension.instruction_set()} (of {', '.join(extension.instruction_sets())}; {threads})"
