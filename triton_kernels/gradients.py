"""G ← D · scale for other optimizers, after the end of a walk."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..cycle import Cycle
from ..table import Table
from . import elements, scalars

THREADS = 256  # of a program


@triton.jit
def _give(
    displacement, target, scale, offsets, n, total,
    STORAGE: tl.constexpr, OF_D: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes one block, of EACH elements for a thread. Returns `total` with each thread's squares added."""
    D = elements.widened(elements.load(displacement, offsets, n, OF_D, WIDE), OF_D)
    wide = D.to(tl.float64)
    elements.store_rounded(target, offsets, n, D * scale, STORAGE, WIDE)
    if EACH > 1:
        return total + tl.sum(tl.reshape(wide * wide, [total.shape[0], EACH]), axis=1)
    else:
        return total + wide * wide


@triton.jit
def gradients_kernel(
    rows, row_of_chunk, scale, partials,
    STORAGE: tl.constexpr, STATE: tl.constexpr, OF_D: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Writes G ← D · scale[group], rounded, to the gradient's address unless that is 0. partials[chunk] = Σ D²,
    float64. Bytes per element, D in bfloat16: reads D, writes G (float32: 6; bfloat16: 4).
    """
    row, begin, n = elements.part_of(rows, row_of_chunk, 1)
    target = elements.address_of(row, elements.GRAD, begin, STORAGE)
    sum_of_squares = tl.zeros([], tl.float64)
    if target != 0:
        displacement = elements.address_of(row, elements.DISPLACEMENT, begin, OF_D)
        of_group = tl.load(scale + tl.load(row + elements.GROUP)).to(STATE)
        wide = elements.wide_part((displacement | target) % 16 == 0, n, BLOCK)
        NARROW: tl.constexpr = BLOCK // EACH
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros([NARROW], tl.float64)
        for start in range(0, wide, BLOCK):
            total = _give(displacement, target, of_group, start + lanes, n, total, STORAGE, OF_D, EACH, True)
        sum_of_squares = tl.sum(total)
        lanes = tl.arange(0, NARROW)
        total = tl.zeros([NARROW], tl.float64)
        for start in range(wide, n, NARROW):
            total = _give(displacement, target, of_group, start + lanes, n, total, STORAGE, OF_D, 1, False)
        sum_of_squares += tl.sum(total)
    tl.store(partials + tl.program_id(0), sum_of_squares)


def gradients(table: Table, cycle: Cycle, scale: Tensor, targets: list[Tensor | None]) -> None:
    """Starts the kernel, and adds its sums to the cycle's."""
    rows, row_of_chunk, starts, _ = table.on_device_with(targets)
    each = 16 // max(table.dtype.itemsize, table.displacement_dtype.itemsize)  # with more, values change hands
    constants = {**elements.constants_of(table, block=THREADS * each), "num_warps": THREADS // elements.LANES}
    elements.launch(
        gradients_kernel, table.chunks,
        rows, row_of_chunk, scale, table.displacement_sq, **constants, EACH=each,
    )  # fmt: skip
    scalars.add_displacements(starts, table.displacement_sq, cycle)
