"""D ← Q(D + γ·g/n) and w ← θ − D: every inner step but the last."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cycle import Cycle
from ..table import Table
from . import elements


@triton.jit
def _move(
    walk, step, offsets, n, counts, of_parameter,
    STATE: tl.constexpr, STORAGE: tl.constexpr, OF_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Moves one block. Returns `counts` with each lane's moves in the lower 16 bits, its lost moves in the upper."""
    weight, remainder, displacement, anchor, touched = walk
    parts = elements.load_weight(weight, remainder, offsets, n, STORAGE, WIDE)
    D = elements.load(displacement, offsets, n, OF_D, WIDE, touched)
    change = elements.load_step(step, offsets, n, STATE, WIDE)
    w, D = elements.joined(parts, STORAGE), elements.widened(D, OF_D)
    shown = w  # what a lost move leaves as it is
    if STORAGE.primitive_bitwidth == 16:
        shown = tl.where(of_parameter != 0, (parts[0].to(tl.int32) & 0xFFFF).to(STATE), w)
    theta = elements.outer_weight(w, D)
    if (anchor != 0) & (touched == 0):
        elements.store(anchor, offsets, n, w, STATE, WIDE)
    D = elements.store_rounded(displacement, offsets, n, D + change, OF_D, WIDE)
    w_next = tl.where(D != 0, theta - D, theta)
    parameter = elements.store_weight(weight, remainder, offsets, n, w_next, STORAGE, WIDE, step[2])
    if STORAGE.primitive_bitwidth == 16:
        w_next = tl.where(of_parameter != 0, (parameter & 0xFFFF).to(STATE), w_next)
    moved, stays = change != 0, w_next == shown
    return counts + moved.to(tl.int32) + ((moved & stays).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["touch", "parts", "of_parameter"])
def inner_step_kernel(
    rows, row_of_chunk, factor, counts, touch, parts, of_parameter,
    STORAGE: tl.constexpr, STATE: tl.constexpr, OF_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D' = Q(D + γ·g/n), w ← (w + D) − D', D ← D'; anchor, if there is one, ← w before the first move of a cycle.

    factor: ±γ/n for each group. Where it is 0 nothing moves, but a first step leaves D = 0. Bytes per element, float32
    with D in bfloat16: reads w D g, writes w D (16); the first time, when D is not read, 14. bfloat16 (w is the
    parameter and its remainder): 14 and 12. An anchor takes 4 more, the first time. Counts are integers, whose atomic
    sum does not depend on the order. of_parameter: a move is lost if the parameter stays, not only if w does. Source:
    arXiv 2604.09258, Algorithm 3.
    """
    row, begin, n = elements.part_of(rows, row_of_chunk, parts)
    weight, remainder, displacement, anchor, touched = elements.walk_of(row, begin, touch, STORAGE, STATE, OF_D)
    walk = (weight, remainder, displacement, anchor, touched)
    step = elements.last_step_of(row, begin, factor, STATE)
    if (n > 0) & (step[2] | ((step[0] != 0) & (touched == 0))):
        wide = elements.wide_part((weight | remainder | displacement | anchor) % 16 == 0, n, BLOCK)
        NARROW: tl.constexpr = BLOCK // 2
        of_lane = tl.zeros([BLOCK], tl.int32)
        for start in range(0, wide, BLOCK):
            of_lane = _move(
                walk, step, start + tl.arange(0, BLOCK), n, of_lane, of_parameter, STATE, STORAGE, OF_D, True
            )
        made = tl.sum(of_lane)
        of_lane = tl.zeros([NARROW], tl.int32)
        for start in range(wide, n, NARROW):
            of_lane = _move(
                walk, step, start + tl.arange(0, NARROW), n, of_lane, of_parameter, STATE, STORAGE, OF_D, False
            )
        made += tl.sum(of_lane)
        tl.atomic_add(counts, (made & 0xFFFF).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 1, (made >> 16).to(tl.int64), sem="relaxed")


def inner_step(table: Table, cycle: Cycle) -> None:
    """Starts the kernel, after `scalars.advance`."""
    rows, row_of_chunk, _, touch = table.on_device()
    constants = elements.constants_of(table, block=1024) | elements.at_most_registers(64)
    elements.launch(
        inner_step_kernel, table.chunks * table.parts,
        rows, row_of_chunk, cycle.factor, cycle.counts, touch, table.parts, int(table.counts_parameters), **constants,
    )  # fmt: skip
