"""‖g‖², first stage: a partial sum for each chunk. The second stage is in scalars.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..table import Table
from .elements import GRAD, address_of, constants_of, launch, load, part_of, wide_part


@triton.jit
def sq_norm_kernel(rows, row_of_chunk, partials, STORAGE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """partials[chunk] = Σ g² in float64, 0 without a gradient.

    Bytes per element: reads g (float32: 4, below: 2).
    """
    row, begin, n = part_of(rows, row_of_chunk, 1)
    g = address_of(row, GRAD, begin, STORAGE)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    if g != 0:
        wide = wide_part(g % 16 == 0, n, BLOCK)
        for start in range(0, wide, BLOCK):
            values = load(g, start + lanes, n, STORAGE, True).to(tl.float64)
            total += values * values
        for start in range(wide, n, BLOCK):
            values = load(g, start + lanes, n, STORAGE, False).to(tl.float64)
            total += values * values
    tl.store(partials + tl.program_id(0), tl.sum(total))


def sq_norm(table: Table) -> Tensor:
    """Starts the kernel; returns the partial sums [chunks], float64."""
    rows, row_of_chunk, _, _ = table.on_device()
    launch(
        sq_norm_kernel, table.chunks,
        rows, row_of_chunk, table.partials, **constants_of(table.dtype, block=2048, each=16),
    )  # fmt: skip
    return table.partials
