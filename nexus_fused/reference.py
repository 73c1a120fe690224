"""The definition of Nexus in plain PyTorch, for any device and dtype. Every other backend is held to this one.

One cycle, in the symbols of arXiv 2604.09258 (Algorithm 3):

    w_0 = θ
    for k = 0 … K−1:
        n_k = ‖g_k‖₂                            one norm over all parameters
        w_{k+1} = w_k − γ_k · g_k / n_k         nothing moves when n_k is 0, inf or nan
    D = (θ − w_{K−1}) + γ_{K−1} · g_{K−1} / n_{K−1}
    G = D / Γ,  Γ = Σ γ_k
    θ ← AdamW(θ, G);  w ← θ

Where ranks walk on their own, θ ← AdamW(θ, mean D / mean Γ): `displace` puts D/R in place of w, others sum it over the
R ranks and average Γ, and a displaced `outer_step` goes on from there.

A backend is a module with four functions: `sq_norm` of one `table.Table` (weights, gradients, state), `inner_step`,
`outer_step` and `displace` of all tables of a device, with a `cycle.Cycle` (that device's scalars) and a
`cycle.MicroBatch`. They update weights, state and scalars in place and return nothing but a norm. This one spends
memory for clarity.

Rounding: scalars are computed in float64, elements in the state's dtype (float32, for float64 parameters float64),
each operation rounded on its own, in the order written here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cycle import BETA1, BETA2, EPS, LR, NORMALIZE, WEIGHT_DECAY, Cycle, MicroBatch
from .flat import Segment, flat_view
from .table import Table


def scaled_gradient(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """γ·g/n in `dtype`; 0 where the step is skipped (`factor` 0), even for a gradient of NaN or inf.

    g: any shape and floating dtype. factor: 0-dim float64, ±γ/n, applied as a power of two and the rest, since γ/n
    leaves float32's range long before γ·g/n does.
    """
    mantissa, exponent = torch.frexp(factor)
    half = exponent >> 1
    power, rest = torch.ldexp(torch.ones_like(factor), half), torch.ldexp(mantissa, exponent - half)
    return torch.where(factor != 0, (g.to(dtype) * power) * rest, torch.zeros((), dtype=dtype, device=g.device))


def adamw(
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
    """torch.optim.AdamW's formula in its order of operations; returns the new θ, moments and maximum.

    Tensors have one shape and dtype; scalars are 0-dim float64, `step` the number of this update, from 1.
    Source: Loshchilov and Hutter, arXiv 1711.05101; torch/optim/adam.py.
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
    """‖g‖² over the table's gradients: 0-dim float64, squares and sums in float64."""
    total = torch.zeros((), dtype=torch.float64, device=table.device)
    for segment in table.with_gradient():
        total += _gradient(table, segment).double().square().sum()
    return total


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """w ← w − γ·g/n for every parameter with a gradient; writes θ first where it has not moved in this cycle."""
    cycle.advance(micro_batch)
    for table in tables:
        for segment in table.with_gradient():
            w = segment.walk if segment.touched else (segment.theta if segment.low_precision else segment.weight)
            w = w.clone()
            if not segment.touched:
                segment.theta.copy_(w)
            step = scaled_gradient(_gradient(table, segment), cycle.factor[segment.group], w.dtype)
            w_next = w - step
            cycle.moves += (step != 0).sum()
            cycle.lost_moves += ((step != 0) & (w_next == w)).sum()
            segment.walk.copy_(w_next)
            if segment.low_precision:
                segment.weight.copy_(w_next)


def outer_step(
    tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int, *, displaced: bool = False
) -> None:
    """Last inner step, displacement, AdamW and w ← θ for every parameter that had a gradient in this cycle.

    A group with Γ = 0 keeps weights, moments and `step`. `micro_batch`: None where the cycle ends without a last
    gradient. `taken`: its inner steps. Leaves ‖D‖² per group and the other sums of the cycle in `cycle.finished`.

    displaced: the last inner step is `displace`'s, and `micro_batch` is not looked at. D lies where that put it, Γ is
    `cycle.walk_length`, and `table.moved` tells which parameters had a gradient; the others get their weights back.
    """
    if displaced:
        for table in tables:
            for segment, moved in zip(table.segments, table.moved.tolist(), strict=True):
                theta = segment.theta.clone()
                D = table.displacement(segment).to(theta.dtype, copy=True)
                segment.weight.copy_(theta)
                if moved:
                    _outer_step(segment, cycle, theta, D)
    else:
        cycle.advance(micro_batch)
        for table in tables:
            for segment in table.moving():
                theta = segment.theta if segment.touched or segment.low_precision else segment.weight
                _outer_step(segment, cycle, theta.clone(), _displacement(table, segment, cycle))
    cycle.finish(taken)


def displace(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Last inner step and displacement of every parameter; D · share overwrites its walk.

    That is the parameter's own memory, and its anchor must be allocated; below float32 the float32 walk or, with
    `table.reduces_low_precision`, again the parameter, and D · share is rounded to its dtype. Also for parameters that
    did not move, whose D is 0; θ is valid for all afterwards. `micro_batch`: as for `outer_step`, which must follow,
    with `displaced=True`. `share`: 1/R where the D of R ranks are summed. Nothing is counted: D is not rounded into w.
    """
    cycle.advance(micro_batch)
    for table in tables:
        for segment in table.segments:
            D = _displacement(table, segment, cycle)
            if not (segment.touched or segment.low_precision):
                segment.theta.copy_(segment.weight)
            table.displacement(segment).copy_(D * share)


def _gradient(table: Table, segment: Segment) -> Tensor:
    gradient = table.gradient(segment)
    assert gradient is not None
    return flat_view(gradient)


def _displacement(table: Table, segment: Segment, cycle: Cycle) -> Tensor:
    dtype = segment.bucket.state_dtype
    D = segment.theta - segment.walk if segment.touched else torch.zeros_like(segment.weight, dtype=dtype)
    if table.gradient(segment) is not None:
        D = D + scaled_gradient(_gradient(table, segment), cycle.factor[segment.group], dtype)
    return D


def _outer_step(segment: Segment, cycle: Cycle, theta: Tensor, D: Tensor) -> None:
    group = segment.group
    hyper, walk_length = cycle.hyper[group], cycle.walk_length[group]
    walked = walk_length > 0
    cycle.displacement_sq[group] += torch.where(walked, D.double().square().sum(), 0.0)
    G = torch.where(hyper[NORMALIZE] != 0, D * (1 / walk_length), D)

    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * segment.bucket.amsgrad
    old = [segment.buffer(name) for name in names]
    new_theta, *new = adamw(
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
    for before, after in zip(old, new, strict=False):
        assert after is not None
        before.copy_(torch.where(walked, after, before))
    if segment.low_precision:
        segment.theta.copy_(torch.where(walked, new_theta, theta))
    segment.weight.copy_(torch.where(walked, new_theta.to(segment.weight.dtype), segment.weight))
    segment.step += walked
