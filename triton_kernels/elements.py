"""What the kernels share: columns of the table, blocks of memory, γ·g/n. No kernel of its own."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..table import CHUNK_ELEMENTS, COLUMNS

N_COLUMNS = tl.constexpr(len(COLUMNS))
WEIGHT, GRAD, THETA, WALK, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, LENGTH, GROUP, TOUCHED, FIRST_CHUNK = (
    tl.constexpr(column) for column in range(len(COLUMNS))
)
CHUNK = tl.constexpr(CHUNK_ELEMENTS)

LANES = 32 if torch.version.hip is None else 64  # threads of a warp
LIMITS_REGISTERS = torch.version.hip is None and getattr(torch.version, "xpu", None) is None  # as NVIDIA's compiler

STORAGE = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Starts a kernel on the current device's current stream. RuntimeError that names kernel and signature if it fails.

    Products and sums are not contracted, so that results equal reference.py's.
    """
    if programs == 0:
        return
    try:
        kernel[(programs,)](*args, **constants, enable_fp_fusion=False)
    except Exception as error:
        types = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args]
        types += [f"{name}={value}" for name, value in constants.items()]
        where = next(a.device for a in args if isinstance(a, torch.Tensor))
        raise RuntimeError(
            f"Triton {triton.__version__} could not compile or start {kernel.__name__}({', '.join(types)}) on {where}: "
            f"{error}\nbackend='reference' runs there without Triton"
        ) from error


def constants_of(dtype: torch.dtype, *, block: int, each: int = 4) -> dict[str, Any]:
    """STORAGE (of weight and gradient), STATE (of everything else), BLOCK (elements that a program works on at a time)
    and num_warps of a table's kernels.

    each: elements of a thread, in float64 half of them. With 4 it has 16 bytes of float32 state: with more, blocks of
    2-byte weights and gradients are moved between threads through shared memory, and registers run short.
    """
    wide = dtype == torch.float64
    state, each = (tl.float64, each // 2) if wide else (tl.float32, each)
    return {"STORAGE": STORAGE[dtype], "STATE": state, "BLOCK": block, "num_warps": block // each // LANES}


def at_most_registers(limit: int) -> dict[str, Any]:
    """Constants that keep a thread to so many. Left to itself, NVIDIA's compiler aims lower and spills."""
    return {"maxnreg": limit} if LIMITS_REGISTERS else {}


@triton.jit
def part_of(rows, row_of_chunk, parts):
    """This program's row, the first element of its part of a chunk (int64) and the number of elements (int32), 0 behind
    the row's end. parts: of each chunk."""
    number = tl.program_id(0)
    chunk = (number // parts).to(tl.int64)
    row = rows + tl.load(row_of_chunk + chunk).to(tl.int64) * N_COLUMNS
    size = CHUNK // parts
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK + number % parts * size
    return row, begin, tl.maximum(tl.minimum(tl.load(row + LENGTH) - begin, size), 0).to(tl.int32)


@triton.jit
def address_of(row, COLUMN: tl.constexpr, begin, DTYPE: tl.constexpr):
    """Address of element `begin` in a column's memory; 0 where the row has none."""
    address = tl.load(row + COLUMN)
    return tl.where(address != 0, address + begin * (DTYPE.primitive_bitwidth // 8), 0)


@triton.jit
def is_touched(touched, g, touch):
    """Whether θ and walk of rows are valid, from their columns TOUCHED and GRAD; `touch` as in `Table.on_device`."""
    return tl.where(touch == 2, touched != 0, (touch == 1) & (g != 0))


@triton.jit
def _pointers(address, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if DTYPE == tl.bfloat16:  # as its bits: the interpreter's own conversions do not round to nearest
        base = address.to(tl.pointer_type(tl.int16))
    else:
        base = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # said of a value that this function makes: it would be lost on an argument
        base = tl.multiple_of(base, 16)
    return base + offsets


@triton.jit
def _load(address, offsets, n, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    pointers = _pointers(address, offsets, DTYPE, ALIGNED)
    if MASKED:
        values = tl.load(pointers, mask=offsets < n, other=0)
    else:
        values = tl.load(pointers)
    if DTYPE == tl.bfloat16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return values.to(tl.float32)
    else:
        return values


@triton.jit
def load(address, offsets, n, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Elements at `offsets` as float32 (float64 for float64); zeros from `n` on.

    WIDE promises that `address` is a multiple of 16 and that all elements exist, and lets the compiler load 16 bytes at
    a time. It could not under a mask that depends on a length: the last block of a chunk goes one by one.
    """
    return _load(address, offsets, n, DTYPE, WIDE, not WIDE)


@triton.jit
def load_gradient(address, aligned, offsets, n, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The same of a gradient, which may lie anywhere: in a bucket of DistributedDataParallel, for example."""
    if WIDE:
        if aligned:
            values = _load(address, offsets, n, DTYPE, True, False)
        else:
            values = _load(address, offsets, n, DTYPE, False, False)
    else:
        values = _load(address, offsets, n, DTYPE, False, True)
    return values


@triton.jit
def store(address, offsets, n, values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Writes `values`, rounded to nearest, ties to even; see `load`."""
    pointers = _pointers(address, offsets, DTYPE, WIDE)
    if DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values == values, rounded, 0x7FC0)
        values = rounded.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        values = values.to(DTYPE)
    if WIDE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=offsets < n)


@triton.jit
def wide_part(aligned, n, BLOCK: tl.constexpr):
    """How many of n elements, from the first on, are in blocks that can be WIDE."""
    return tl.where(aligned, n // BLOCK * BLOCK, 0)


@triton.jit
def power_and_rest(factor, DTYPE: tl.constexpr):
    """factor (float64) as power · rest, power a power of two near its root: see reference.scaled_gradient."""
    half = (((factor.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022) >> 1
    power = ((half + 1023) << 52).to(tl.float64, bitcast=True)
    inverse = ((1023 - half) << 52).to(tl.float64, bitcast=True)
    return power.to(DTYPE), (factor * inverse).to(DTYPE)
