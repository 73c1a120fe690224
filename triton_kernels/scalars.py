"""The scalars of a cycle, advanced on the device: the norm's second stage before the kernels, sums and counters after
them. Each is one small launch, whose bytes do not count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cycle import Cycle, MicroBatch
from ..options import HYPER, INNER_LR, SIGN
from ..table import Table
from . import elements

_INNER_LR, _SIGN, _N_HYPER = tl.constexpr(INNER_LR), tl.constexpr(SIGN), tl.constexpr(len(HYPER))


@triton.jit(do_not_specialize=["n_partials", "n_groups", "position", "ends_cycle"])
def advance_kernel(
    partials, n_partials, hyper, factor, sums, totals, grad_scale, found_inf, n_groups, position, ends_cycle,
    HAS_NORM: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`Cycle.advance` in one program: n = √(Σ partials) in a fixed order, whether the step is taken, ±γ/n, Γ, Σγ².
    ends_cycle: also counts a cycle in which nothing moved. HAS_NORM False: there is no last gradient, so factor is
    0.
    """
    norm = tl.zeros([], tl.float64)
    taken = norm != 0
    if HAS_NORM:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, n_partials, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            total += tl.load(partials + offsets, mask=offsets < n_partials, other=0)
        norm = tl.sqrt(tl.sum(total))
        taken = (norm > 0) & (norm < float("inf"))
        if found_inf is not None:
            taken = taken & (tl.load(found_inf) == 0)
        unscaled = norm
        if grad_scale is not None:
            unscaled = norm / tl.load(grad_scale).to(tl.float64)
        tl.store(sums + 3 * n_groups + position, tl.where(unscaled == unscaled, unscaled, -1.0))
        tl.store(totals, tl.load(totals) + tl.where(taken, 0.0, 1.0))
    divisor = tl.where(taken, norm, 1.0)
    walked = tl.zeros([GROUPS], tl.int32)
    for start in range(0, n_groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        mask = group < n_groups
        gamma = tl.load(hyper + group * _N_HYPER + _INNER_LR, mask=mask, other=0)
        sign = tl.load(hyper + group * _N_HYPER + _SIGN, mask=mask, other=0)
        step = tl.where(taken, gamma, 0.0)
        tl.store(factor + group, tl.where(taken, sign * gamma / divisor, 0.0), mask=mask)
        walk_length = tl.load(sums + group, mask=mask, other=0) + step
        walk_sq_length = tl.load(sums + n_groups + group, mask=mask, other=0) + step * step
        tl.store(sums + group, walk_length, mask=mask)
        tl.store(sums + n_groups + group, walk_sq_length, mask=mask)
        walked += (walk_length > 0).to(tl.int32)
    if ends_cycle:
        tl.store(totals + 1, tl.load(totals + 1) + tl.where(tl.sum(walked) == 0, 1.0, 0.0))


@triton.jit
def _sum_of_group(partials, start, BLOCK: tl.constexpr):
    """Returns Σ partials of a group's chunks in a fixed order. start: the group's row of `starts`."""
    total = tl.zeros([BLOCK], tl.float64)
    end = tl.load(start + 3)
    for first in range(tl.load(start + 1), end, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        total += tl.load(partials + chunk, mask=chunk < end, other=0)
    return tl.sum(total)


@triton.jit
def add_kernel(starts, partials, sums, BLOCK: tl.constexpr):
    """sums[group] += Σ partials of its chunks; one program for each group."""
    group = tl.program_id(0)
    tl.store(sums + group, tl.load(sums + group) + _sum_of_group(partials, starts + 2 * group, BLOCK))


@triton.jit(do_not_specialize=["n_groups", "known_groups", "inner_steps", "taken", "touch"])
def finish_kernel(
    rows, starts, partials, sums, counts, finished, finished_counts, n_groups, known_groups, inner_steps, taken, touch,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ends a cycle; one program for each group and one for the rest. For a group, advances `step` of the parameters
    that took part, sums partials in a fixed order to its ‖D‖², and moves its Γ and Σγ² to `finished`, so that they
    start from 0. The rest: norms and counts. starts [known_groups + 1, 2]: first row and first chunk of a group in
    this table. FIRST, LAST: among the tables of a device.
    """
    group = tl.program_id(0)
    if group < n_groups:
        walk_length = tl.load(sums + group)
        displacement_sq = tl.zeros([], tl.float64)
        if group < known_groups:
            of_group = starts + 2 * group
            first_row, end_row = tl.load(of_group), tl.load(of_group + 2)
            if walk_length > 0:
                for start in range(first_row, end_row, BLOCK):
                    index = start + tl.arange(0, BLOCK)
                    inside = index < end_row
                    row = rows + index * elements.N_COLUMNS
                    g = tl.load(row + elements.GRAD, mask=inside, other=0)
                    touched = elements.is_touched(tl.load(row + elements.TOUCHED, mask=inside, other=0), g, touch)
                    moving = inside & ((g != 0) | touched)
                    step = tl.load(row + elements.STEP, mask=moving, other=0).to(tl.pointer_type(tl.float32))
                    tl.store(step, tl.load(step, mask=moving, other=0) + 1, mask=moving)
            displacement_sq = _sum_of_group(partials, of_group, BLOCK)
        target = finished + 2 * n_groups + group
        if not FIRST:
            displacement_sq += tl.load(target)
        tl.store(target, displacement_sq)
        if LAST:
            tl.store(finished + group, walk_length)
            tl.store(finished + n_groups + group, tl.load(sums + n_groups + group))
            tl.debug_barrier()  # every thread has read what is now set to zero
            tl.store(sums + group, 0.0)
            tl.store(sums + n_groups + group, 0.0)
    elif LAST:
        for position in range(0, inner_steps):
            norm = tl.load(sums + 3 * n_groups + position)
            tl.debug_barrier()
            tl.store(finished + 3 * n_groups + position, norm)
            tl.store(sums + 3 * n_groups + position, 0.0)
        moves, lost_moves = tl.load(counts), tl.load(counts + 1)
        tl.debug_barrier()
        tl.store(finished_counts, moves)
        tl.store(finished_counts + 1, lost_moves)
        tl.store(finished_counts + 2, taken.to(tl.int64))
        tl.store(counts, tl.zeros([], tl.int64))
        tl.store(counts + 1, tl.zeros([], tl.int64))


def advance(cycle: Cycle, micro_batch: MicroBatch | None, *, ends_cycle: bool) -> None:
    """Decides about an inner step and counts its length. None: there is no last gradient."""
    partials, position, grad_scale, found_inf = micro_batch.on(cycle.device) if micro_batch else ([], 0, None, None)
    # Tables and devices in their order: the sum must not depend on who is first.
    total = torch.cat([p.view(-1) for p in partials]) if len(partials) > 1 else (*partials, cycle.factor)[0]
    elements.launch(
        advance_kernel, 1,
        total, total.numel(), cycle.hyper, cycle.factor, cycle.sums, cycle.totals, grad_scale, found_inf,
        len(cycle.factor), position, int(ends_cycle),
        HAS_NORM=micro_batch is not None, BLOCK=4096, GROUPS=32, num_warps=8,
    )  # fmt: skip


def add_displacements(starts: Tensor, partials: Tensor, cycle: Cycle) -> None:
    """Adds ‖D‖² of a table to that of its groups, from the sums of its chunks."""
    elements.launch(add_kernel, len(starts) - 1, starts, partials, cycle.displacement_sq, BLOCK=1024, num_warps=4)


def finish(tables: list[Table], on_device: list[tuple[Tensor, Tensor, Tensor, int]], cycle: Cycle, taken: int) -> None:
    """Ends the cycle of all tables of a device, whose outer steps have been started with these on the device."""
    sums, counts = cycle.results
    for table, (rows, _, starts, touch) in zip(tables, on_device, strict=True):
        elements.launch(
            finish_kernel, len(cycle.factor) + 1,
            rows, starts, table.displacement_sq, cycle.sums, cycle.counts, sums, counts,
            len(cycle.factor), len(starts) - 1, cycle.room, taken, touch,
            FIRST=table is tables[0], LAST=table is tables[-1], BLOCK=1024, num_warps=4,
        )  # fmt: skip
    cycle.finished = cycle.results
