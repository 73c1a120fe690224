"""‖g‖², first stage: a partial sum for each chunk. The second stage is in scalars.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..table import Table
from .elements import GRAD, address_of, chunk_of, constants_of, launch, load


@triton.jit
def _sum_of_squares(g, n, STORAGE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    full = n // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        values = load(g, start + tl.arange(0, BLOCK), n, STORAGE, ALIGNED, False).to(tl.float64)
        total += values * values
    if full < n:
        values = load(g, full + tl.arange(0, BLOCK), n, STORAGE, False, True).to(tl.float64)
        total += values * values
    return tl.sum(total)


@triton.jit
def sq_norm_kernel(rows, row_of_chunk, partials, STORAGE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """partials[chunk] = Σ g² in float64, 0 without a gradient.

    Bytes per element: reads g (float32: 4, below: 2).
    """
    row, begin, n = chunk_of(rows, row_of_chunk)
    g = address_of(row, GRAD, begin, STORAGE)
    total = tl.zeros([], tl.float64)
    if g != 0:
        if g % 16 == 0:
            total = _sum_of_squares(g, n, STORAGE, BLOCK, True)
        else:
            total = _sum_of_squares(g, n, STORAGE, BLOCK, False)
    tl.store(partials + tl.program_id(0), total)


def sq_norm(table: Table) -> Tensor:
    """Starts the kernel; returns the partial sums [chunks], float64."""
    rows, row_of_chunk, _, _ = table.on_device()
    constants = constants_of(table.dtype, block=2048)
    launch(sq_norm_kernel, table.chunks, rows, row_of_chunk, table.partials, **constants)
    return table.partials
