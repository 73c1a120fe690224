"""Which backends this machine has, why one is missing, and which one a device gets. Only this module imports the fused
ones.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")

AGAIN = "this package again, in its checkout: pip install --force-reinstall --no-deps ."

# The modules a backend cannot do without. A source that was not installed has no triton_kernels beside it.
_NEEDS = {
    "cpu": ("nexus_fused._C",),
    "triton": ("triton", "nexus_fused.triton_kernels"),
    "cuda": ("nexus_fused._C",),
}


def available() -> dict[str, str | None]:
    """Returns every backend's name with None if it runs on this machine, else with the reason and the remedy."""
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
    """Returns None if the backend can update tensors of these dtypes on `device`, else the reason and the remedy."""
    if name == "reference":
        return None
    for needed in _NEEDS[name]:
        try:
            importlib.import_module(needed)
        except ModuleNotFoundError as error:
            remedy = {"triton": "pip install triton"}.get(error.name or "") or how_to_get_the_extension(Path(__file__))
            return f"{needed} cannot be imported ({error}): {remedy}"
        except ImportError as error:
            again = "pip install --force-reinstall triton" if needed == "triton" else AGAIN
            return (
                f"{needed} is installed but does not load ({error}): provide what it asks for, or install it again: "
                f"{again}"
            )
    module = importlib.import_module(f"nexus_fused.{name}")
    reason: str | None = module.why_not_on(device, dtype, displacement_dtype)
    return reason


def how_to_get_the_extension(this_file: Path) -> str:
    """Returns why the compiled extension is not beside this file, as far as can be seen, and the remedy."""
    here = this_file.resolve().parent
    elsewhere = [path for path in sys.path if Path(path).resolve() != here.parent]
    installed = PathFinder.find_spec("nexus_fused", elsewhere)
    folders = list(installed.submodule_search_locations or ()) if installed else []
    if PathFinder.find_spec("nexus_fused._C", folders):
        return (
            f"Python took the source in {here}, which hides the package installed in {folders[0]}: run from another "
            f"folder, or make the source the installed package (in {here.parent}: pip install -e .)"
        )
    built = [file.name for file in here.glob("_C.*") if file.suffix in (".so", ".pyd")]
    if built and not any(f"_C{suffix}" in built for suffix in EXTENSION_SUFFIXES):
        return f"{built[0]} was built for another Python: with this one install {AGAIN}"
    compiler = "install a C++ compiler (such as g++) if there is none, and then"
    if (here.parent / "csrc").is_dir():
        return f"{compiler} the source that Python runs here (in {here.parent}: pip install -e .)"
    return f"{compiler} {AGAIN}"


def check_choice(backend: str | None, fused: bool | None) -> None:
    """Raises ValueError if the constructor's `backend` is unknown or contradicts `fused`."""
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
    """Returns the backend module for parameters of `dtype` on `device`, under the constructor's `backend` and `fused`.
    Raises RuntimeError if what was asked for, a backend by name or `fused=True`, cannot run here. Without either it
    falls back to the reference, with a warning.
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
        f"nexus_fused runs its reference on {device}, which is many times slower than a fused backend: {explained}",
        stacklevel=2,
    )
    return importlib.import_module("nexus_fused.reference")


def _tell_of_one_thread() -> None:
    """Warns if the CPU kernels cannot use the threads that PyTorch uses."""
    threads = torch.get_num_threads()
    if threads > 1 and not importlib.import_module("nexus_fused._C").OPENMP:
        warnings.warn(
            f"nexus_fused runs on one thread where PyTorch uses {threads}: its CPU kernels were built without OpenMP. "
            f"Install it for your compiler (for clang on Debian: libomp-dev) and then {AGAIN}",
            stacklevel=2,
        )


def chosen(device: torch.device) -> str:
    """Returns what `backend=None` takes on a device."""
    return next(name for name in (*_fused(device), "reference") if why_not(name, device) is None)


def _fused(device: torch.device) -> list[str]:
    """Returns the fused backends for a device, the fastest first, whether or not this machine has them."""
    if device.type == "cpu":
        return ["cpu"]
    return ["cuda", "triton"] if device.type == "cuda" else ["triton"]


def cuda_targets() -> str:
    """Returns the architectures that the CUDA kernels were built for, as CMake names them."""
    if why_not("cpu", torch.device("cpu")) is not None:
        return "none (no compiled kernels)"
    return importlib.import_module("nexus_fused._C").CUDA_TARGETS or "none (built without a CUDA compiler)"


def instruction_set() -> str:
    """Returns the CPU kernels' instruction set, those they could use here, and whether they have threads."""
    if why_not("cpu", torch.device("cpu")) is not None:
        return "none (no compiled kernels)"
    extension = importlib.import_module("nexus_fused._C")
    threads = "OpenMP" if extension.OPENMP else "built without OpenMP: one thread"
    return f"{extension.instruction_set()} (of {', '.join(extension.instruction_sets())}; {threads})"
