"""The definition of Nexus in plain PyTorch, for any device and dtype. Every other backend is held to this one.

One cycle, in the symbols of arXiv 2604.09258 (Algorithm 3); the displacement D = θ − w is kept, not θ:

    D = 0
    for k = 0 … K−1:
        n_k = ‖g_k‖₂                            one norm over all parameters
        θ = w + D
        D ← Q(D + γ_k · g_k / n_k)              Q rounds to D's dtype; nothing moves when n_k is 0, inf or nan
        w ← θ − D
    θ = w + D;  G = D / Γ,  Γ = Σ γ_k           the last step, fused with this, is rounded neither into D nor into w
    w ← AdamW(θ, G);  D = 0

A backend is a module with the functions `sq_norm` of one `table.Table` (weights, gradients, state), and `inner_step`,
`outer_step`, `end_walk` and `adamw` of all tables of a device, with a `cycle.Cycle` (that device's scalars) and a
`cycle.MicroBatch`. They update weights, state and scalars in place and return nothing but a norm. `outer_step` is the
last inner step, the end of the walk and AdamW in one. Where something happens to D in between, such as a mean over
ranks, `end_walk` leaves w = θ and D in its memory, and `adamw` goes on from there; for other optimizers, `gradients`
does. This module spends memory for clarity.

Rounding: scalars are computed in float64, elements in the state's dtype (float32, for float64 parameters float64),
each operation rounded on its own, in the order written here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cycle import Cycle, MicroBatch
from .flat import STATE_DTYPE, Segment, flat_view
from .options import BETA1, BETA2, EPS, LR, NORMALIZE, WEIGHT_DECAY
from .table import Table


def scaled_gradient(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns γ·g/n in `dtype`, with 0 for a skipped step (`factor` 0) even if the gradient is NaN or inf. g: any shape
    and floating dtype. factor: ±γ/n, 0-dim float64; applied as a power of two and the rest, since γ/n leaves
    float32's range long before γ·g/n does.
    """
    mantissa, exponent = torch.frexp(factor)
    half = exponent >> 1
    power, rest = torch.ldexp(torch.ones_like(factor), half), torch.ldexp(mantissa, exponent - half)
    return torch.where(factor != 0, (g.to(dtype) * power) * rest, torch.zeros((), dtype=dtype, device=g.device))


def read_weight(parameter: Tensor, remainder: Tensor | None) -> Tensor:
    """Returns a copy of w, float32 (float64 for float64 parameters), from a parameter and its remainder, a tensor of
    the same dtype of which only the bits count. None: w is the parameter.

    bfloat16: the upper and the lower half of w; where the lower one is 0x8000 or more, it borrows one from the upper.
    float16: |w| = |parameter| ± units of 2^-16 of the parameter's spacing; the lower 15 bits are their number, the
    upper one says minus, and minus none means minus 0x8000. Every pair is read: ±0 with a remainder from 0x8000 on,
    which `write_weight` never writes, and inf and NaN are w as they are.
    """
    if remainder is None:
        return parameter.clone()
    high, low = (tensor.view(torch.int16).int() for tensor in (parameter, remainder))
    magnitude, minus = high & 0x7FFF, low < 0
    alone = ((magnitude == 0) & minus) | ~parameter.isfinite()
    if parameter.dtype == torch.bfloat16:
        w = ((high - minus.int()) << 16 | (low & 0xFFFF)).view(torch.float32)
    else:
        number = low & 0x7FFF
        number = torch.where(minus, -torch.where(number == 0, 0x8000, number), number)
        rounded = parameter.float().abs()
        w = (rounded + number.float() * _unit(rounded)).copysign(parameter.float())
    return torch.where(alone, parameter.float(), w)


def write_weight(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The parameter, w rounded to nearest (ties away from zero), and its remainder; see `read_weight`.

    Lossless for finite w that do not round to inf, in float16 from 2^-17 on; below, w is first rounded to a multiple of
    2^-40. NaN is 0x7FC0 (0x7E00), and it and ±inf have the remainder 0.
    """
    if dtype == w.dtype:
        return w, None
    if dtype == torch.bfloat16:
        bits = w.view(torch.int32)
        high = torch.where(w.isnan(), 0x7FC0, (bits + 0x8000) >> 16)
        low = torch.where((high & 0x7FFF) >= 0x7F80, 0, bits & 0xFFFF)
    else:
        magnitude = w.abs()
        magnitude = torch.where(magnitude < 2**-17, (magnitude + 2**-17) - 2**-17, magnitude)
        finite = magnitude < 65520
        normal = (magnitude.view(torch.int32) - 0x38000000 + 0x1000) >> 13
        half = torch.where(magnitude < 2**-14, (magnitude * 2**24 + 0.5).int(), normal)
        half = torch.where(finite, half, 0x7C00)
        rounded = half.to(torch.int16).view(torch.float16).float()
        number = torch.where(finite, (magnitude - rounded) / _unit(rounded), 0).int()
        high = torch.where(w.isnan(), 0x7E00, half | (w.signbit().int() << 15))
        low = torch.where(number < 0, 0x8000 | (-number & 0x7FFF), number)
    return high.to(torch.int16).view(dtype), low.to(torch.int16).view(dtype)


def _unit(rounded: Tensor) -> Tensor:
    """2^-16 of float16's spacing at the number `rounded`, as float32; at inf, at the largest finite number."""
    exponent = (rounded.view(torch.int32) >> 23).clamp(113, 142)
    return ((exponent - 26) << 23).view(torch.float32)


def outer_weight(w: Tensor, D: Tensor) -> Tensor:
    """Returns θ. An element without a displacement is not touched: −0 stays −0."""
    return torch.where(D != 0, w + D, w)


def walked_weight(theta: Tensor, D: Tensor) -> Tensor:
    """Returns w, from θ and the displacement."""
    return torch.where(D != 0, theta - D, theta)


def adamw_formula(
    theta: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Applies torch.optim.AdamW's formula in its order of operations; returns the new θ, moments and maximum. Tensors
    have one shape and dtype; scalars are 0-dim float64; `step` is the number of this update, from 1. Source:
    Loshchilov and Hutter, arXiv 1711.05101; torch/optim/adam.py.
    """
    theta = theta * (1 - lr * weight_decay)
    # torch.lerp: from whichever end is nearer.
    change = G - exp_avg
    exp_avg = torch.where(1 - beta1 < 0.5, exp_avg + (1 - beta1) * change, G - beta1 * change)
    exp_avg_sq = beta2 * exp_avg_sq + ((1 - beta2) * G) * G
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    # Through float64, which rounds correctly; torch.sqrt of float32 on a CPU may be off by one unit in the last place.
    denom = second.double().sqrt().to(second.dtype) * (1 / (1 - beta2**step).sqrt()) + eps
    theta = theta + (-(lr / (1 - beta1**step)) * exp_avg) / denom
    return theta, exp_avg, exp_avg_sq, max_exp_avg_sq


def sq_norm(table: Table) -> Tensor:
    """Returns ‖g‖² over the table's gradients: 0-dim float64, squares and sums in float64."""
    total = torch.zeros((), dtype=torch.float64, device=table.device)
    for segment in table.with_gradient():
        total += _gradient(table, segment).double().square().sum()
    return total


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """D ← Q(D + γ·g/n) and w ← θ − D for every parameter with a gradient. D counts as 0 if the parameter has not moved
    before. If the table keeps an anchor, it becomes θ before the first move of a cycle.
    """
    cycle.advance(micro_batch)
    for table in tables:
        for segment in table.with_gradient():
            w, D = weight(segment), displacement(table, segment)
            if table.keeps_anchor and not segment.touched:
                segment.buffer("anchor").copy_(w, non_blocking=True)
            factor = cycle.factor[segment.group]
            step = scaled_gradient(_gradient(table, segment), factor, w.dtype)
            rounded = (D + step).to(table.displacement_dtype)
            moved = walked_weight(outer_weight(w, D), rounded.to(w.dtype))
            cycle.moves += (step != 0).sum()
            shown = segment.weight.clone()
            segment.buffer("displacement").copy_(rounded)
            set_weight(segment, moved, factor != 0)
            if table.counts_parameters:
                same = segment.weight.view(torch.int16) == shown.view(torch.int16)
            else:
                same = moved == w
            cycle.lost_moves += ((step != 0) & same).sum()


def outer_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int) -> None:
    """Takes the last inner step, ends the walk and applies AdamW, for every parameter that had a gradient in this
    cycle. A group with Γ = 0 keeps weights, moments and `step`. micro_batch: None if the cycle ends without a last
    gradient. taken: its inner steps. Leaves ‖D‖² for each group and the other sums of the cycle in `cycle.finished`.
    """
    cycle.advance(micro_batch)
    for table in tables:
        for segment in table.moving():
            D = displacement(table, segment)
            _outer_step(segment, cycle, outer_weight(weight(segment), D), _last_displacement(table, segment, cycle, D))
    cycle.finish(taken)


def end_walk(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Takes the last inner step and ends the walk of every parameter: w ← θ, exact if there is an anchor, D ← Q(D ·
    share). Includes parameters that did not move, whose D is 0. micro_batch: as for `outer_step`. share: 1/R if R
    ranks add up their D. Counts no moves, since the last step is not rounded into w.
    """
    cycle.advance(micro_batch)
    for table in tables:
        for segment in table.segments:
            D = displacement(table, segment)
            if segment.touched:
                anchor = on_device(segment, "anchor") if table.keeps_anchor else outer_weight(weight(segment), D)
                set_weight(segment, anchor)
            segment.buffer("displacement").copy_(_last_displacement(table, segment, cycle, D) * share)


def gradients(table: Table, cycle: Cycle, scale: Tensor, targets: list[Tensor | None]) -> None:
    """Writes D · scale, after `end_walk`, in the parameters' dtype, and sums ‖D‖². scale: [groups] float64, on the
    device. targets: flat memory for each segment, or None for one that takes no part.
    """
    for segment, target in zip(table.segments, targets, strict=True):
        if target is not None:
            D = segment.buffer("displacement").to(STATE_DTYPE[table.dtype])
            target.copy_(D * scale[segment.group])
            cycle.displacement_sq[segment.group] += D.double().square().sum()


def adamw(tables: list[Table], cycle: Cycle, moved: list[Tensor], taken: int) -> None:
    """Applies AdamW after `end_walk`, which has left w = θ, to D as it lies in memory, with Γ from `cycle`. moved: for
    each table a tensor [segments] on the device, != 0 for segments that take part.
    """
    cycle.advance(None)
    for table, who in zip(tables, moved, strict=True):
        for segment, takes_part in zip(table.segments, who.tolist(), strict=True):
            if takes_part:
                D = segment.buffer("displacement").to(STATE_DTYPE[table.dtype])
                _outer_step(segment, cycle, weight(segment), D)
    cycle.finish(taken)


def on_device(segment: Segment, name: str) -> Tensor:
    """Its part of a buffer of the state, where it is computed with: a copy where it lies on the host. Waits for
    nothing."""
    return segment.buffer(name).to(segment.bucket.device, non_blocking=True)


def weight(segment: Segment) -> Tensor:
    """w, a copy."""
    return read_weight(segment.weight, segment.buffer("remainder") if segment.low_precision else None)


def set_weight(segment: Segment, w: Tensor, moved: Tensor | None = None) -> None:
    """Stores w in the parameter and its remainder; where `moved` (0-dim bool) is False, these stay as they are."""
    parts = write_weight(w, segment.weight.dtype)
    memory = segment.weight, segment.buffer("remainder") if segment.low_precision else None
    for own, part in zip(memory, parts, strict=True):
        if own is not None and part is not None:
            own.copy_(part if moved is None else torch.where(moved, part, own))


def displacement(table: Table, segment: Segment) -> Tensor:
    """D in the state's dtype, a copy; 0 where the parameter has not moved in this cycle."""
    dtype = STATE_DTYPE[table.dtype]
    if not segment.touched:
        return torch.zeros(segment.numel, dtype=dtype, device=table.device)
    return segment.buffer("displacement").to(dtype, copy=True)


def _gradient(table: Table, segment: Segment) -> Tensor:
    gradient = table.gradient(segment)
    assert gradient is not None
    return flat_view(gradient)


def _last_displacement(table: Table, segment: Segment, cycle: Cycle, D: Tensor) -> Tensor:
    """D with the last inner step, if there is one; not rounded."""
    if table.gradient(segment) is None:
        return D
    return D + scaled_gradient(_gradient(table, segment), cycle.factor[segment.group], D.dtype)


def _outer_step(segment: Segment, cycle: Cycle, theta: Tensor, D: Tensor) -> None:
    group = segment.group
    hyper, walk_length = cycle.hyper[group], cycle.walk_length[group]
    walked = walk_length > 0
    cycle.displacement_sq[group] += torch.where(walked, D.double().square().sum(), 0.0)
    G = torch.where(hyper[NORMALIZE] != 0, D * (1 / walk_length), D)

    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * segment.bucket.amsgrad
    old = [on_device(segment, name) for name in names]
    new_theta, *new = adamw_formula(
        theta,
        G,
        old[0],
        old[1],
        old[2] if len(old) == 3 else None,
        step=segment.step.double() + 1,
        lr=hyper[LR],
        beta1=hyper[BETA1],
        beta2=hyper[BETA2],
        eps=hyper[EPS],
        weight_decay=hyper[WEIGHT_DECAY],
    )
    for name, before, after in zip(names, old, new, strict=False):
        assert after is not None
        segment.buffer(name).copy_(torch.where(walked, after, before), non_blocking=True)
    set_weight(segment, new_theta, walked)
    segment.step += walked
