"""(θ − w) + γ·g/n in place of w, for ranks that walk on their own and average where they came to."""

from __future__ import annotations

import struct

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
def _displace(
    addresses, scale, touched, taken, in_weight, share, aligned_g, offsets, n,
    STORAGE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block."""
    theta, g, walk, weight = addresses
    power, rest = scale
    D = tl.zeros([offsets.shape[0]], STATE)
    if touched:
        D = load(theta, offsets, n, STATE, WIDE) - load(walk, offsets, n, STATE, WIDE)
    elif STORAGE == STATE:
        store(theta, offsets, n, load(walk, offsets, n, STATE, WIDE), STATE, WIDE)
    if taken:  # the gradient of a skipped step may hold NaN
        D = D + (load_gradient(g, aligned_g, offsets, n, STORAGE, WIDE) * power) * rest
    D = D * share
    if in_weight:
        store(weight, offsets, n, D, STORAGE, WIDE)
    else:
        store(walk, offsets, n, D, STATE, WIDE)


@triton.jit(do_not_specialize=["touch", "parts", "share", "in_weight"])
def displace_kernel(
    rows, row_of_chunk, factor, share: tl.int64, in_weight, touch, parts,
    STORAGE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D = (θ − w) + γ·g/n; D · share overwrites the walk or, with in_weight, rounded the weight; for every parameter.

    share: the bits of a float64, which an argument cannot be. Bytes per element, float32: reads θ w g, writes w, or
    reads w g, writes θ w (16). Below: reads θ walk g, writes walk (14) or the weight (12).
    """
    row, begin, n = part_of(rows, row_of_chunk, parts)
    g, weight = address_of(row, GRAD, begin, STORAGE), address_of(row, WEIGHT, begin, STORAGE)
    theta, walk = address_of(row, THETA, begin, STATE), address_of(row, WALK, begin, STATE)
    touched = is_touched(tl.load(row + TOUCHED), g, touch)
    factor_of_group = tl.load(factor + tl.load(row + GROUP))
    taken = (g != 0) & (factor_of_group != 0)
    addresses = (theta, g, walk, weight)
    scale = power_and_rest(factor_of_group, STATE)
    of_one = share.to(tl.float64, bitcast=True).to(STATE)
    in_weight = in_weight != 0
    aligned_g = g % 16 == 0
    wide = wide_part((theta | walk | weight) % 16 == 0, n, BLOCK)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, wide, BLOCK):
        offsets = start + lanes
        _displace(addresses, scale, touched, taken, in_weight, of_one, aligned_g, offsets, n, STORAGE, STATE, True)
    for start in range(wide, n, BLOCK):
        offsets = start + lanes
        _displace(addresses, scale, touched, taken, in_weight, of_one, aligned_g, offsets, n, STORAGE, STATE, False)


def displace(table: Table, cycle: Cycle, share: float) -> None:
    """Starts the kernel, after `scalars.advance`."""
    rows, row_of_chunk, _, touch = table.on_device()
    (bits,) = struct.unpack("q", struct.pack("d", share))
    launch(
        displace_kernel, table.chunks * table.parts,
        rows, row_of_chunk, cycle.factor, bits, int(table.displacement_in_weight), touch, table.parts,
        **constants_of(table.dtype, block=1024), **at_most_registers(64),
    )  # fmt: skip
