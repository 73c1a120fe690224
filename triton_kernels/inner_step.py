"""w ← w − γ·g/n, first and middle inner step."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cycle import Cycle
from ..table import Table
from .elements import (
    GRAD,
    GROUP,
    THETA,
    TOUCHED,
    WALK,
    WEIGHT,
    address_of,
    at_most_registers,
    constants_of,
    is_touched,
    launch,
    load,
    load_gradient,
    part_of,
    power_and_rest,
    store,
    wide_part,
)


@triton.jit
def _move(
    addresses, scale, taken, first, aligned_g, offsets, n, counts,
    STORAGE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block; returns `counts` with each lane's moves in the lower, lost moves in the upper 16 bits."""
    source, g, theta, walk, weight = addresses
    power, rest = scale
    w = load(source, offsets, n, STATE, WIDE)
    gradient = load_gradient(g, aligned_g, offsets, n, STORAGE, WIDE)
    gradient = tl.where(taken, gradient, 0.0)  # a skipped one may hold NaN
    step = (gradient * power) * rest
    w_next = w - step
    if STORAGE == STATE:
        if first:
            store(theta, offsets, n, w, STATE, WIDE)
    else:
        store(weight, offsets, n, w_next, STORAGE, WIDE)
    store(walk, offsets, n, w_next, STATE, WIDE)
    moved = step != 0
    return counts + moved.to(tl.int32) + ((moved & (w_next == w)).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["touch", "parts"])
def inner_step_kernel(
    rows, row_of_chunk, factor, counts, touch, parts,
    STORAGE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w ← w − γ·g/n, and θ ← w before the first move of a cycle; factor: ±γ/n per group, 0 where nothing moves.

    Bytes per element, float32: reads w g, writes w (12), the first time also θ (16). Below: reads walk (the first time
    θ) and g, writes walk and the weight (12). Counts are integers, whose atomic sum does not depend on an order.
    Source: Algorithm 3 of arXiv 2604.09258.
    """
    row, begin, n = part_of(rows, row_of_chunk, parts)
    g, weight = address_of(row, GRAD, begin, STORAGE), address_of(row, WEIGHT, begin, STORAGE)
    theta, walk = address_of(row, THETA, begin, STATE), address_of(row, WALK, begin, STATE)
    first = is_touched(tl.load(row + TOUCHED), g, touch) == 0
    factor_of_group = tl.load(factor + tl.load(row + GROUP))
    taken = factor_of_group != 0
    if (n > 0) & (g != 0) & (taken | first):
        if STORAGE == STATE:
            source = walk
        else:
            source = tl.where(first, theta, walk)
        addresses = (source, g, theta, walk, weight)
        scale = power_and_rest(factor_of_group, STATE)
        aligned_g = g % 16 == 0
        wide = wide_part((theta | walk | weight) % 16 == 0, n, BLOCK)
        lanes = tl.arange(0, BLOCK)
        of_lane = tl.zeros([BLOCK], tl.int32)
        for start in range(0, wide, BLOCK):
            of_lane = _move(addresses, scale, taken, first, aligned_g, start + lanes, n, of_lane, STORAGE, STATE, True)
        for start in range(wide, n, BLOCK):
            of_lane = _move(addresses, scale, taken, first, aligned_g, start + lanes, n, of_lane, STORAGE, STATE, False)
        made = tl.sum(of_lane)
        tl.atomic_add(counts, (made & 0xFFFF).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 1, (made >> 16).to(tl.int64), sem="relaxed")


def inner_step(table: Table, cycle: Cycle) -> None:
    """Starts the kernel, after `scalars.advance`."""
    rows, row_of_chunk, _, touch = table.on_device()
    constants = constants_of(table.dtype, block=1024) | at_most_registers(64)
    launch(
        inner_step_kernel, table.chunks * table.parts,
        rows, row_of_chunk, cycle.factor, cycle.counts, touch, table.parts, **constants,
    )  # fmt: skip
