"""‖g‖², first stage: a partial sum for each chunk. scalars.py has the second stage."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..table import Table
from . import elements


@triton.jit
def _squares(g, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns Σ g² of whole aligned blocks."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        values = elements.widened(elements.load(g, start + tl.arange(0, BLOCK), n, DTYPE, True), DTYPE).to(tl.float64)
        total += values * values
    return tl.sum(total)


@triton.jit
def sq_norm_kernel(rows, row_of_chunk, partials, BLOCK: tl.constexpr):
    """partials[chunk] = Σ g² in float64, 0 without a gradient. Bytes per element: reads g (float32: 4, below: 2)."""
    row, begin, n = elements.part_of(rows, row_of_chunk, 1)
    g, dtype = elements.gradient_of(row, begin)
    sum_of_squares = tl.zeros([], tl.float64)
    if g != 0:
        wide = elements.wide_part(g % 16 == 0, n, BLOCK)
        if dtype == elements.FLOAT32:
            sum_of_squares = _squares(g, wide, tl.float32, BLOCK)
        elif dtype == elements.BFLOAT16:
            sum_of_squares = _squares(g, wide, tl.bfloat16, BLOCK)
        elif dtype == elements.FLOAT64:
            sum_of_squares = _squares(g, wide, tl.float64, BLOCK // 2)
        else:
            sum_of_squares = _squares(g, wide, tl.float16, BLOCK)
        if wide < n:
            NARROW: tl.constexpr = BLOCK // 4
            total = tl.zeros([NARROW], tl.float64)
            for start in range(wide, n, NARROW):
                values = elements.load_gradient(g, dtype, start + tl.arange(0, NARROW), n, tl.float64, False)
                total += values * values
            sum_of_squares += tl.sum(total)
    tl.store(partials + tl.program_id(0), sum_of_squares)


def sq_norm(table: Table) -> Tensor:
    """Starts the kernel. Returns the partial sums [chunks], float64."""
    rows, row_of_chunk, _, _ = table.on_device()
    constants = {"BLOCK": 2048, "num_warps": 2048 // 16 // elements.LANES}
    elements.launch(sq_norm_kernel, table.chunks, rows, row_of_chunk, table.partials, **constants)
    return table.partials
