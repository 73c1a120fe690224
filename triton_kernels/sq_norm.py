"""‖g‖², first stage: a partial sum for each chunk of a table or of one gradient. The second stage is in scalars.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..flat import Segment
from ..table import CHUNK_ELEMENTS, Table
from .elements import CHUNK, GRAD, address_of, constants_of, launch, load, part_of, wide_part


@triton.jit
def _sum_chunk(g, n, STORAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Σ g² of n elements at an address: one function for both kernels, whose sums must be equal bit for bit."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    wide = wide_part(g % 16 == 0, n, BLOCK)
    for start in range(0, wide, BLOCK):
        values = load(g, start + lanes, n, STORAGE, True).to(tl.float64)
        total += values * values
    for start in range(wide, n, BLOCK):
        values = load(g, start + lanes, n, STORAGE, False).to(tl.float64)
        total += values * values
    return tl.sum(total)


@triton.jit
def sq_norm_kernel(rows, row_of_chunk, partials, STORAGE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """partials[chunk] = Σ g² in float64, 0 without a gradient.

    Bytes per element: reads g (float32: 4, below: 2).
    """
    row, begin, n = part_of(rows, row_of_chunk, 1)
    g = address_of(row, GRAD, begin, STORAGE)
    total = tl.zeros([], tl.float64)
    if g != 0:
        total = _sum_chunk(g, n, STORAGE, BLOCK)
    tl.store(partials + tl.program_id(0), total)


@triton.jit(do_not_specialize=["g", "length", "first_chunk"])
def sum_squares_kernel(
    g: tl.int64, length: tl.int64, first_chunk: tl.int64, partials,
    STORAGE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[first_chunk + i] = Σ g² in float64 over chunk i of the gradient of `length` elements at address g.

    The types stand there so that no value is compiled anew. Bytes per element as `sq_norm_kernel`.
    """
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    n = tl.minimum(length - begin, CHUNK).to(tl.int32)
    total = _sum_chunk(g + begin * (STORAGE.primitive_bitwidth // 8), n, STORAGE, BLOCK)
    tl.store(partials + first_chunk + chunk, total)


def _constants(table: Table) -> dict[str, Any]:
    return constants_of(table.dtype, block=2048, each=16)


def sum_squares(table: Table, segment: Segment, gradient: Tensor) -> None:
    """Starts the kernel for one gradient, dense as its segment is; writes its part of `table.partials`."""
    launch(
        sum_squares_kernel, -(-segment.numel // CHUNK_ELEMENTS),
        gradient.data_ptr(), segment.numel, segment.chunk, table.partials, **_constants(table),
    )  # fmt: skip


def sq_norm(table: Table) -> Tensor:
    """Starts the kernel; returns the partial sums [chunks], float64."""
    rows, row_of_chunk, _, _ = table.on_device()
    launch(sq_norm_kernel, table.chunks, rows, row_of_chunk, table.partials, **_constants(table))
    return table.partials
