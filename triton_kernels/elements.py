"""What the kernels share: columns of the table, blocks of memory, weights in two parts, γ·g/n. Holds no kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..flat import COLUMNS, DTYPES
from ..table import CHUNK_ELEMENTS, Table

N_COLUMNS = tl.constexpr(len(COLUMNS))
(
    WEIGHT, REMAINDER, DISPLACEMENT, ANCHOR, GRAD, GRAD_DTYPE, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, LENGTH, GROUP,
    TOUCHED, FIRST_CHUNK,
) = (tl.constexpr(column) for column in range(len(COLUMNS)))  # fmt: skip
FLOAT64, FLOAT32, BFLOAT16 = (tl.constexpr(DTYPES[d]) for d in (torch.float64, torch.float32, torch.bfloat16))
CHUNK = tl.constexpr(CHUNK_ELEMENTS)

LANES = 32 if torch.version.hip is None else 64  # threads of a warp
LIMITS_REGISTERS = torch.version.hip is None and getattr(torch.version, "xpu", None) is None  # as NVIDIA's compiler

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Starts a kernel on the current device's current stream. A failure raises RuntimeError, which names kernel and
    signature. Products and sums are not contracted, so that results equal reference.py's.
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


def constants_of(table: Table, *, block: int) -> dict[str, Any]:
    """Returns STORAGE (of the parameter), STATE (of w and AdamW's state), OF_D, BLOCK (elements that a program works on
    at a time) and num_warps for a table's kernels. A thread has 16 bytes of state: with more, the compiler moves
    blocks of 2-byte values between threads through shared memory, and registers run short.
    """
    state, each = (tl.float64, 2) if table.dtype == torch.float64 else (tl.float32, 4)
    types = {"STORAGE": TYPES[table.dtype], "STATE": state, "OF_D": TYPES[table.displacement_dtype]}
    return {**types, "BLOCK": block, "num_warps": block // each // LANES}


def at_most_registers(limit: int) -> dict[str, Any]:
    """Returns constants that limit a thread's registers. Left to itself, NVIDIA's compiler aims lower and spills."""
    return {"maxnreg": limit} if LIMITS_REGISTERS else {}


@triton.jit
def part_of(rows, row_of_chunk, parts):
    """Returns this program's row, the first element of its part of a chunk (int64), and the number of elements (int32),
    0 past the row's end. parts: of each chunk.
    """
    number = tl.program_id(0)
    chunk = (number // parts).to(tl.int64)
    row = rows + tl.load(row_of_chunk + chunk).to(tl.int64) * N_COLUMNS
    size = CHUNK // parts
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK + number % parts * size
    return row, begin, tl.maximum(tl.minimum(tl.load(row + LENGTH) - begin, size), 0).to(tl.int32)


@triton.jit
def address_of(row, COLUMN: tl.constexpr, begin, DTYPE: tl.constexpr):
    """Returns the address of element `begin` in a column's memory; 0 if the row has none."""
    address = tl.load(row + COLUMN)
    return tl.where(address != 0, address + begin * (DTYPE.primitive_bitwidth // 8), 0)


@triton.jit
def gradient_of(row, begin):
    """Returns the address of a gradient's element, and the number of the gradient's dtype."""
    address, dtype = tl.load(row + GRAD), tl.load(row + GRAD_DTYPE)
    size = tl.where(dtype == FLOAT64, 8, tl.where(dtype == FLOAT32, 4, 2))
    return tl.where(address != 0, address + begin * size, 0), dtype


@triton.jit
def walk_of(row, begin, touch, STORAGE: tl.constexpr, STATE: tl.constexpr, OF_D: tl.constexpr):
    """Returns addresses of w (two: the parameter and its remainder), of D and of the anchor, and whether D is valid."""
    weight, remainder = address_of(row, WEIGHT, begin, STORAGE), address_of(row, REMAINDER, begin, STORAGE)
    displacement, anchor = address_of(row, DISPLACEMENT, begin, OF_D), address_of(row, ANCHOR, begin, STATE)
    return weight, remainder, displacement, anchor, is_touched(tl.load(row + TOUCHED), tl.load(row + GRAD), touch)


@triton.jit
def last_step_of(row, begin, factor, STATE: tl.constexpr):
    """Returns what `load_step` needs: the gradient's address and dtype, whether the step is taken, and γ/n in two
    parts.
    """
    g, dtype = gradient_of(row, begin)
    factor_of_group = tl.load(factor + tl.load(row + GROUP))
    # As a power of two near its root and the rest: see reference.scaled_gradient.
    half = (((factor_of_group.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022) >> 1
    power = ((half + 1023) << 52).to(tl.float64, bitcast=True)
    inverse = ((1023 - half) << 52).to(tl.float64, bitcast=True)
    return g, dtype, (g != 0) & (factor_of_group != 0), power.to(STATE), (factor_of_group * inverse).to(STATE)


@triton.jit
def is_touched(touched, g, touch):
    """Returns whether D of rows is valid, from their columns TOUCHED and GRAD; `touch` as in `Table.on_device`."""
    return tl.where(touch == 2, touched != 0, (touch == 1) & (g != 0))


@triton.jit
def _pointers(address, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if DTYPE.primitive_bitwidth == 16:  # as bits: the interpreter's own conversions do not round to nearest
        base = address.to(tl.pointer_type(tl.int16))
    else:
        base = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # said of a value that this function makes: it would be lost on an argument
        base = tl.multiple_of(base, 16)
    return base + offsets


@triton.jit
def load(address, offsets, n, DTYPE: tl.constexpr, WIDE: tl.constexpr, valid=True, ALIGNED: tl.constexpr = True):
    """Returns elements at `offsets` for `widened`; zeros from `n` on, and everywhere unless `valid`. WIDE promises that
    all elements exist and, with ALIGNED, that `address` is a multiple of 16, and lets the compiler load 16 bytes at
    a time. It cannot do so under a mask that depends on a length, so the rest of a chunk goes one element at a time.
    """
    mask = valid if WIDE else (offsets < n) & valid
    return tl.load(_pointers(address, offsets, DTYPE, WIDE and ALIGNED), mask=mask, other=0)


@triton.jit
def widened(values, DTYPE: tl.constexpr):
    """Returns float32 (float64 for float64) of what `load` gave. Widen late: a
    wait for one value delays the next load.
    """
    if DTYPE == tl.bfloat16:
        return (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return values.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return values


@triton.jit
def store(address, offsets, n, values, DTYPE: tl.constexpr, WIDE: tl.constexpr, valid=True):
    """Writes `values`, floats of DTYPE or 16 bits in integers, unless `valid` says no. WIDE: see `load`."""
    if DTYPE.primitive_bitwidth == 16:
        values = values.to(tl.int16)
    mask = valid if WIDE else (offsets < n) & valid
    tl.store(_pointers(address, offsets, DTYPE, WIDE), values, mask=mask)


@triton.jit
def store_rounded(address, offsets, n, values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Writes `values`, rounded to nearest, ties to even. Returns what was written, widened."""
    if DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = tl.where(values == values, rounded, 0x7FC0)
    elif DTYPE == tl.float16:
        values = values.to(tl.float16).to(tl.int16, bitcast=True)
    store(address, offsets, n, values, DTYPE, WIDE)
    return widened(values, DTYPE)


@triton.jit
def _load_anywhere(address, offsets, n, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        if address % 16 == 0:
            values = load(address, offsets, n, DTYPE, True)
        else:
            values = load(address, offsets, n, DTYPE, True, True, False)
    else:
        values = load(address, offsets, n, DTYPE, False)
    return values


@triton.jit
def load_gradient(address, dtype, offsets, n, STATE: tl.constexpr, WIDE: tl.constexpr):
    """Returns a gradient of any dtype in STATE. It may lie anywhere, such as in a bucket of DistributedDataParallel."""
    if dtype == FLOAT32:
        values = _load_anywhere(address, offsets, n, tl.float32, WIDE).to(STATE)
    elif dtype == FLOAT64:
        values = _load_anywhere(address, offsets, n, tl.float64, WIDE).to(STATE)
    else:
        bits = _load_anywhere(address, offsets, n, tl.int16, WIDE)
        values = tl.where(dtype == BFLOAT16, widened(bits, tl.bfloat16), widened(bits, tl.float16)).to(STATE)
    return values


@triton.jit
def load_step(step, offsets, n, STATE: tl.constexpr, WIDE: tl.constexpr):
    """Returns γ·g/n, 0 if the step is not taken, since its gradient may hold NaN. Load it last: it waits."""
    g, dtype, taken, power, rest = step
    values = tl.zeros([offsets.shape[0]], STATE)
    if taken:
        values = load_gradient(g, dtype, offsets, n, STATE, WIDE)
    return (values * power) * rest


@triton.jit
def _of_half(magnitude):
    """Returns float32 of float16's bits, 2^-16 of the spacing there (at inf, that of the largest) and its inverse."""
    rounded = widened(magnitude.to(tl.int16), tl.float16)
    unit = (tl.minimum(tl.maximum(rounded.to(tl.int32, bitcast=True) >> 23, 113), 142) - 26) << 23
    return rounded, unit.to(tl.float32, bitcast=True), (0x7F000000 - unit).to(tl.float32, bitcast=True)


@triton.jit
def load_weight(weight, remainder, offsets, n, STORAGE: tl.constexpr, WIDE: tl.constexpr, valid=True):
    """Returns w for `joined`: twice the same in float32 and float64."""
    high = load(weight, offsets, n, STORAGE, WIDE, valid)
    low = high
    if STORAGE.primitive_bitwidth == 16:
        low = load(remainder, offsets, n, STORAGE, WIDE, valid)
    return high, low


@triton.jit
def joined(w, STORAGE: tl.constexpr):
    """Returns w in STATE, below float32 from a parameter and its remainder: reference.read_weight."""
    high, low = w
    if STORAGE.primitive_bitwidth > 16:
        return high
    else:
        high, low = high.to(tl.int32), low.to(tl.int32)
        magnitude, minus = high & 0x7FFF, low < 0
        none = (magnitude == 0) & minus
        if STORAGE == tl.bfloat16:
            bits = ((high - minus.to(tl.int32)) << 16) | (low & 0xFFFF)
            return tl.where(none | (magnitude >= 0x7F80), high << 16, bits).to(tl.float32, bitcast=True)
        else:
            alone = none | (magnitude >= 0x7C00)
            rounded, unit, _ = _of_half(magnitude)
            number = low & 0x7FFF
            number = tl.where(minus, 0 - tl.where(number == 0, 0x8000, number), number)
            w = tl.where(alone, 0.0, rounded) + number.to(tl.float32) * unit
            bits = tl.where(alone, rounded, w).to(tl.int32, bitcast=True) | (high & 0x8000) << 16
            return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_weight(weight, remainder, offsets, n, w, STORAGE: tl.constexpr, WIDE: tl.constexpr, valid=True):
    """Writes w, below float32 in two parts: reference.write_weight. Returns the parameter, below float32 its bits."""
    if STORAGE.primitive_bitwidth > 16:
        store(weight, offsets, n, w, STORAGE, WIDE, valid)
        return w
    else:
        bits = w.to(tl.uint32, bitcast=True)
        if STORAGE == tl.bfloat16:
            high = tl.where(w == w, (bits + 0x8000) >> 16, 0x7FC0)
            low = tl.where((high & 0x7FFF) >= 0x7F80, 0, bits & 0xFFFF)
        else:
            magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
            finite = magnitude < 65520.0
            magnitude = tl.where(finite, magnitude, 0.0)
            magnitude = tl.where(magnitude < 2.0**-17, (magnitude + 2.0**-17) - 2.0**-17, magnitude)
            subnormal = magnitude < 2.0**-14
            normal = (magnitude.to(tl.int32, bitcast=True) - 0x38000000 + 0x1000) >> 13
            half = tl.where(subnormal, (tl.where(subnormal, magnitude, 0.0) * 2.0**24 + 0.5).to(tl.int32), normal)
            rounded, _, inverse_unit = _of_half(half)
            number = ((magnitude - rounded) * inverse_unit).to(tl.int32)
            half = tl.where(finite, half, 0x7C00) | (bits >> 16 & 0x8000).to(tl.int32)
            high = tl.where(w == w, half, 0x7E00)
            low = tl.where(number < 0, 0x8000 | (0 - number & 0x7FFF), number)
        store(weight, offsets, n, high, STORAGE, WIDE, valid)
        store(remainder, offsets, n, low, STORAGE, WIDE, valid)
        return high.to(tl.int32)


@triton.jit
def outer_weight(w, D):
    """Returns θ. An element without a displacement is not touched: −0 stays −0."""
    return tl.where(D != 0, w + D, w)


@triton.jit
def wide_part(aligned, n, BLOCK: tl.constexpr):
    """Returns how many of n elements, from the first on, are in blocks that can be WIDE."""
    return tl.where(aligned, n // BLOCK * BLOCK, 0)
