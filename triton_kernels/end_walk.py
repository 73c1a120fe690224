"""w ← θ and D ← Q((D + γ·g/n) · share), for ranks that walk on their own and average their displacements."""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from ..cycle import Cycle
from ..table import Table
from . import elements


@triton.jit
def _end(
    walk, step, share, offsets, n, STATE: tl.constexpr, STORAGE: tl.constexpr, OF_D: tl.constexpr, WIDE: tl.constexpr
):
    """Ends the walk of one block."""
    weight, remainder, displacement, anchor, touched = walk
    theta = elements.load(anchor, offsets, n, STATE, WIDE, touched & (anchor != 0))
    w = elements.load_weight(weight, remainder, offsets, n, STORAGE, WIDE, touched & (anchor == 0))
    D = elements.load(displacement, offsets, n, OF_D, WIDE, touched)
    change = elements.load_step(step, offsets, n, STATE, WIDE)
    D = elements.widened(D, OF_D)
    theta = tl.where(anchor != 0, theta, elements.outer_weight(elements.joined(w, STORAGE), D))
    elements.store_weight(weight, remainder, offsets, n, theta, STORAGE, WIDE, touched)
    elements.store_rounded(displacement, offsets, n, (D + change) * share, OF_D, WIDE)


@triton.jit(do_not_specialize=["touch", "parts", "share"])
def end_walk_kernel(
    rows, row_of_chunk, factor, share: tl.int64, touch, parts,
    STORAGE: tl.constexpr, STATE: tl.constexpr, OF_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w ← θ (the anchor if there is one, else w + D); D ← Q((D + γ·g/n) · share), for every parameter. share: the bits
    of a float64, which an argument cannot be. Bytes per element, D in bfloat16: reads θ (the anchor, or w) D g,
    writes w D (float32: 16; bfloat16: 14). What did not walk has w = θ: reads g, writes D.
    """
    row, begin, n = elements.part_of(rows, row_of_chunk, parts)
    weight, remainder, displacement, anchor, touched = elements.walk_of(row, begin, touch, STORAGE, STATE, OF_D)
    walk = (weight, remainder, displacement, anchor, touched)
    step = elements.last_step_of(row, begin, factor, STATE)
    of_one = share.to(tl.float64, bitcast=True).to(STATE)
    wide = elements.wide_part((weight | remainder | displacement | anchor) % 16 == 0, n, BLOCK)
    NARROW: tl.constexpr = BLOCK // 2
    for start in range(0, wide, BLOCK):
        _end(walk, step, of_one, start + tl.arange(0, BLOCK), n, STATE, STORAGE, OF_D, True)
    for start in range(wide, n, NARROW):
        _end(walk, step, of_one, start + tl.arange(0, NARROW), n, STATE, STORAGE, OF_D, False)


def end_walk(table: Table, cycle: Cycle, share: float) -> None:
    """Starts the kernel, after `scalars.advance`."""
    rows, row_of_chunk, _, touch = table.on_device()
    (bits,) = struct.unpack("q", struct.pack("d", share))
    elements.launch(
        end_walk_kernel, table.chunks * table.parts,
        rows, row_of_chunk, cycle.factor, bits, touch, table.parts,
        **elements.constants_of(table, block=1024), **elements.at_most_registers(64),
    )  # fmt: skip
