"""Compiles ahead of time, for a target, every Triton kernel that the backend tries out; no GPU is needed.

python tests/compile_kernels.py cuda:90 [--write]: prints JSON, {kernel and constants: figures}. `--write` puts the
register counts into tests/registers.json, which test_triton_compile.py compares with.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import inside
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nexus_fused.triton_kernels import elements

TABLE = Path(__file__).with_name("registers.json")
DTYPES = [  # of parameters, of displacements
    *itertools.product((torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32)),
    (torch.float64, torch.float64),
]
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}


def launches():
    """What the backend starts when it tries out all dtypes: (kernel, arguments, constants), each once."""
    found = {}

    def record(kernel, programs, *args, **constants):
        types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else a if a is None else "i32" for a in args]
        stated = [param.annotation_type for param in kernel.params]
        types = [type_ or given for type_, given in zip(stated, types, strict=False)]
        found[kernel.__name__, str(types), str(constants)] = kernel, types, constants

    elements.launch = record
    for dtypes in DTYPES:
        inside.try_out(torch.device("cpu"), *dtypes)
    return found.values()


def compile_kernel(kernel, types, constants, target):
    """The compiled kernel; pointers are multiples of 16 bytes, as PyTorch's allocators give them."""
    options = {name: constants[name] for name in ("num_warps", "maxnreg") if name in constants}
    options["enable_fp_fusion"] = False
    constants = {name: value for name, value in constants.items() if name not in options}
    given = dict(zip(kernel.arg_names, types, strict=False))
    constants |= {name: None for name, type_ in given.items() if type_ is None}
    signature = {name: "constexpr" if name in constants else given[name] for name in kernel.arg_names}
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    attributes = {index[n]: [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")}
    source = ASTSource(kernel, signature, {index[name]: value for name, value in constants.items()}, attributes)
    return triton.compile(source, target=target, options=options)


def conversions(ttgir):
    """Of each loop, in their order: how many values change hands between threads, through shared memory, each turn."""
    counts, loop = [], None  # indentation of the one we are in
    for line in ttgir.splitlines():
        indentation = len(line) - len(line.lstrip())
        if loop is not None and line.strip() and indentation <= loop:
            loop = None
        if loop is None and "scf.for" in line:
            loop = indentation
            counts.append(0)
        elif loop is not None:
            counts[-1] += "ttg.convert_layout" in line
    return counts


def nvidia_figures(ptx, arch):
    """From PTX: accesses of 16 bytes and contracted products; from the ptxas of Triton: registers, spills."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    name = "ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas"
    gpu = re.search(r"\.target (\w+)", ptx).group(1)
    report = subprocess.run(
        [folder / name, "-v", "--fmad=false", "--gpu-name", gpu, "-", "-o", "/dev/null"],
        input=ptx, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "loads": len(re.findall(r"ld\.global[.\w]*\.(?:v4\.b32|v2\.b64)", ptx)),
        "stores": len(re.findall(r"st\.global[.\w]*\.(?:v4\.b32|v2\.b64)", ptx)),
        "contracted": len(re.findall(r"fma\.rn\.f32", ptx)),
        "barriers": len(re.findall(r"bar(?:rier)?\.sync", ptx)),
    }


def amd_figures(assembly):
    """The same from AMD's assembly."""
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", assembly).group(1)),
        "spilled": sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))),
        "loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
    }


def figures(target_name):
    """{kernel and constants: figures} for "cuda:90" or "hip:gfx942"."""
    platform, _, arch = target_name.partition(":")
    elements.LANES, elements.LIMITS_REGISTERS = (64, False) if platform == "hip" else (32, True)
    target = GPUTarget(platform, int(arch), 32) if platform == "cuda" else GPUTarget(platform, arch, 64)
    made = {}
    for kernel, types, constants in launches():
        compiled = compile_kernel(kernel, types, constants, target)
        shown = [f"{name}={value}" for name, value in constants.items()] + ["no scale"] * types.count(None)
        assembly = compiled.asm
        key = f"{kernel.__name__} {' '.join(shown)}"
        made[key] = (
            nvidia_figures(assembly["ptx"], int(arch)) if platform == "cuda" else amd_figures(assembly["amdgcn"])
        )
        made[key]["conversions"] = conversions(assembly["ttgir"])
    return made


if __name__ == "__main__":
    made = figures(sys.argv[1])
    if "--write" in sys.argv:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        registers = {key: value["registers"] for key, value in made.items()}
        table.setdefault(triton.__version__, {})[sys.argv[1]] = registers
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(json.dumps(made, indent=1))
