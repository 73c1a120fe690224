"""Variants of the GPU kernels, timed in turn: `python -m bench.gpu_sweep --out FILE [VARIANT ...]`.

A variant is the kernels as they are but for a few replaced texts of csrc/cuda.cu, or other numbers: parts of a chunk, a
Triton program's elements and warps. Needs nvcc, a C++ compiler and pybind11; variants are compiled in parallel. Each
must pass the parity check before it is timed. A figure is the bandwidth of a kernel over that of a copy on the device,
in the same round, after the cache was filled with something else; FILE has the milliseconds too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from nexus_fused import cuda, table

from . import gpu
from .contenders import check_parity, device_copy, kernels

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
MODULE = """
#include "bindings_cuda.h"
PYBIND11_MODULE(variant, m) {
  m.attr("CUDA_TARGETS") = "a variant";
  define_cuda(m);
}
"""

Patch = tuple[str, str]


def at_least(kernel: str, blocks: int) -> Patch:
    """How many blocks a multiprocessor holds."""
    old = f"(kThreads, {2 if kernel == 'outer_step' else 4})\n    {kernel}_kernel("
    return old, f"(kThreads, {blocks})\n    {kernel}_kernel("


def threads(n: int, inner: int, outer: int) -> list[Patch]:
    """Of a block, and how many blocks at least of a step in a walk, or its end, and of an outer step."""
    blocks = {"inner_step": inner, "end_walk": inner, "outer_step": outer}
    counts = [at_least(kernel, count) for kernel, count in blocks.items()]
    return [("constexpr int kThreads = 256;", f"constexpr int kThreads = {n};"), *counts]


def batch_of_inner(n: int) -> Patch:
    """What a thread of an inner step has in flight."""
    old = "for_each_element<width_of<State>, 2>(work, part.n, aligned"
    return old, old.replace("2", str(n))


LOAD = "reinterpret_cast<const Word<X, n>*>(from)"
STORE = "reinterpret_cast<Word<X, n>*>(to)"
HINTS = [(f"{LOAD}[i];", f"__ldcs({LOAD} + i);"), (f"{STORE}[i] = words[i];", f"__stcs({STORE} + i, words[i]);")]
NORM = "for_each_element<width_of<Storage>, 4>(work"

# Replaced texts of cuda.cu, and the parts of a chunk.
CUDA: dict[str, tuple[list[Patch], int]] = {
    "as it is": ([], table.PARTS),
    "1 part": ([], 1),
    "2 parts": ([], 2),
    "8 parts": ([], 8),
    "hints to the cache": (HINTS, table.PARTS),
    "hints to the cache on stores": (HINTS[1:], table.PARTS),
    "128 threads": (threads(128, 8, 4), table.PARTS),
    "128 threads, 8 parts": (threads(128, 8, 4), 8),
    "512 threads": (threads(512, 2, 1), table.PARTS),
    "inner batch 1": ([batch_of_inner(1)], table.PARTS),
    "inner batch 4": ([batch_of_inner(4)], table.PARTS),
    "norm batch 2": ([(NORM, NORM.replace("4", "2"))], table.PARTS),
    "norm batch 8": ([(NORM, NORM.replace("4", "8"))], table.PARTS),
    "inner at least 3 blocks": ([at_least("inner_step", 3)], table.PARTS),
    "outer at least 3 blocks": ([at_least("outer_step", 3)], table.PARTS),
}
# A program's elements and warps in a walk and an outer step, None: as the launchers say; and the parts of a chunk.
TRITON: dict[str, tuple[tuple[int, int] | None, int]] = {
    "Triton as it is": (None, table.PARTS),
    "Triton, 1 part": (None, 1),
    "Triton, 2 parts": (None, 2),
    "Triton, 8 parts": (None, 8),
    "Triton 512/4": ((512, 4), table.PARTS),
    "Triton 1024/4": ((1024, 4), table.PARTS),
    "Triton 1024/8": ((1024, 8), table.PARTS),
}


def patched(patches: list[Patch], source: str) -> str:
    """`source` with each text, which must occur once, replaced."""
    for old, new in patches:
        assert source.count(old) == 1, f"{source.count(old)} times in cuda.cu: {old}"
        source = source.replace(old, new)
    return source


def build(name: str, folder: Path) -> ModuleType:
    """The variant's extension. RuntimeError with the compiler's output if it does not compile."""
    source, library = folder / "variant.cu", folder / "variant.so"
    folder.mkdir()
    source.write_text(patched(CUDA[name][0], (SOURCES / "cuda.cu").read_text()))
    (folder / "module.cpp").write_text(MODULE)
    include = [f"-I{path}" for path in (SOURCES, pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-O3", "-std=c++17", "--fmad=false", "-arch=native", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += ['-DNEXUS_CUDA_TARGETS="a variant"', "-DNEXUS_ISA=cuda"]
    command = ["nvcc", "-shared", *flags, *include, str(source), str(folder / "module.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    # Another name for each: pybind11 hands out the first module of a name again.
    spec = importlib.util.spec_from_file_location(f"{folder.name}.variant", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def in_use(name: str, built: dict[str, ModuleType]) -> Iterator[None]:
    """Lets the backends run a variant."""
    from nexus_fused.triton_kernels import elements

    of_launchers = elements.constants_of
    kept = cuda._C, table.PARTS
    blocks, table.PARTS = TRITON[name] if name in TRITON else (None, CUDA[name][1])
    cuda._C = built.get(name, cuda._C)
    if blocks is not None:

        def constants_of(of: table.Table, *, block: int) -> dict[str, Any]:
            return {**of_launchers(of, block=block), "BLOCK": blocks[0], "num_warps": blocks[1]}

        elements.constants_of = constants_of
    try:
        yield
    finally:
        cuda._C, table.PARTS = kept
        elements.constants_of = of_launchers


def milliseconds(run: Callable[[], Any]) -> float:
    """By the device's clock, which is busy until `run` has been started."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(3_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(backend: str, shapes: gpu.Shapes, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Of each kernel: milliseconds, and bandwidth over a copy's."""
    device, numel = torch.device("cuda"), sum(map(math.prod, shapes))
    contenders = [*kernels(shapes, dtype, backend, device), device_copy(numel, device)]
    filler = torch.zeros(48 * 2**20, device=device)
    took: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(rounds + 2):
        for c in contenders:
            filler.sum()
            time = milliseconds(c.run)
            if i >= 2:
                took[c.name].append(time)
    copy = took["copy"]
    return {
        c.name: {
            "milliseconds": statistics.median(took[c.name]),
            "over_copy": statistics.median(t * c.bytes / 8 / own for t, own in zip(copy, took[c.name], strict=True)),
        }
        for c in contenders
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sweep", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "variants", nargs="*", metavar="VARIANT", help=f"default: all of {' | '.join([*CUDA, *TRITON])}"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_args()
    names = options.variants or [*CUDA, *TRITON]
    unknown = [name for name in names if name not in CUDA and name not in TRITON]
    if unknown:
        parser.error(f"no such variant: {', '.join(unknown)}")
    result: dict[str, Any] = {**gpu.environment(torch.device("cuda", 0), options.commit), "errors": {}, "figures": {}}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            name: pool.submit(build, name, Path(scratch) / f"v{i}")
            for i, name in enumerate(names)
            if name in CUDA and CUDA[name][0]
        }
        built = {name: cuda._C for name in names if name in CUDA and not CUDA[name][0]}
        for name, job in jobs.items():
            try:
                built[name] = job.result()
            except (AssertionError, RuntimeError) as error:
                result["errors"][name] = str(error)
    for size, shapes in (("307M", gpu.FULL.kernels), ("10M in 200", gpu.FULL.small)):
        for dtype in (torch.float32, torch.bfloat16):
            for name in [name for name in names if name in built or name in TRITON]:
                title = f"{size}, {gpu.word(dtype)}, {name}"
                try:
                    with in_use(name, built):
                        backend = "triton" if name in TRITON else "cuda"
                        check_parity(gpu.FULL.small[:3], dtype, backend, torch.device("cuda"))
                        figures = result["figures"][title] = measure(backend, shapes, dtype, options.rounds)
                    row = (
                        f"{kernel.removeprefix('inner_step, ')} {f['over_copy']:.3f}" for kernel, f in figures.items()
                    )
                    print(f"{title:45}", *row, file=sys.stderr, flush=True)
                except Exception:
                    result["errors"][title] = traceback.format_exc(limit=-3)
                    print(title, result["errors"][title], file=sys.stderr, flush=True)
                gpu.free(torch.device("cuda"))
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["errors"]))


if __name__ == "__main__":
    sys.exit(main())
