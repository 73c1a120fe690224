"""The CUDA backend on CPU tensors: csrc/cuda.cu, compiled against the cuda_runtime.h beside this file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def build() -> ModuleType | None:
    """Compiles the kernels, once for their sources, and loads them; None without a C++ compiler or pybind11."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), *(ROOT / "csrc").glob("*")])
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    version.update(f"{sysconfig.get_config_var('EXT_SUFFIX')}{pybind11.__version__}".encode())
    library = ROOT / ".pytest_cache" / f"cuda_on_cpu-{version.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")  # several workers may do this at once
        include = [HERE, ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        paths = [f"-I{path}" for path in include]
        subprocess.run([compiler, *flags, *warnings, *paths, "-o", own, HERE / "module.cpp"], check=True)
        own.replace(library)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> ModuleType | None:
    """Lets backend="cuda" run on CPU tensors for the rest of this process; returns its kernels, which keep the original
    `why_not_on`."""
    from nexus_fused import cuda

    kernels = build()
    if kernels is not None:
        kernels.why_not_on = cuda.why_not_on
        cuda._C = kernels
        cuda._on = lambda device: contextlib.nullcontext()
        cuda._where = lambda device, *, first=True, last=True: (0, 0, first, last)
        cuda.why_not_on = lambda device, *_: None if device == torch.device("cpu") else "only CPU tensors here"
    return kernels
