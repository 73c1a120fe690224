"""Last inner step, displacement, AdamW and w ← θ, fused."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..cycle import BETA1, BETA2, EPS, HYPER, LR, NORMALIZE, WEIGHT_DECAY, Cycle
from ..table import Table
from .elements import (
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    GROUP,
    MAX_EXP_AVG_SQ,
    STEP,
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

_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _NORMALIZE = (
    tl.constexpr(column) for column in (LR, BETA1, BETA2, EPS, WEIGHT_DECAY, NORMALIZE)
)
_N_HYPER = tl.constexpr(len(HYPER))


@triton.jit
def _divide(a, b):
    """a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _sqrt(x):
    """√x, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _scalars(hyper, group, step, gamma, STATE: tl.constexpr):
    """What one update of a group's parameters needs: computed in float64, rounded to STATE as PyTorch does."""
    of_group = hyper + group * _N_HYPER
    lr, eps, weight_decay = tl.load(of_group + _LR), tl.load(of_group + _EPS), tl.load(of_group + _WEIGHT_DECAY)
    beta1, beta2 = tl.load(of_group + _BETA1), tl.load(of_group + _BETA2)
    # βᵗ to a unit or two of float64; β = 0 has no logarithm, and 1e-300 gives the same corrections.
    bias_correction1 = 1 - tl.exp2(step * tl.log2(tl.maximum(beta1, 1e-300)))
    bias_correction2 = 1 - tl.exp2(step * tl.log2(tl.maximum(beta2, 1e-300)))
    inv_gamma = tl.where(tl.load(of_group + _NORMALIZE) != 0, 1 / gamma, 1.0)
    return (
        inv_gamma.to(STATE),
        (1 - lr * weight_decay).to(STATE),
        beta1.to(STATE),
        (1 - beta1).to(STATE),
        1 - beta1 < 0.5,
        beta2.to(STATE),
        (1 - beta2).to(STATE),
        (lr / bias_correction1 * -1.0).to(STATE),  # −0 for 0; Triton's minus is a subtraction from 0
        (1 / tl.sqrt(bias_correction2)).to(STATE),
        eps.to(STATE),
    )


@triton.jit
def _update(
    addresses, scale, scalars, with_gradient, aligned_g, offsets, n, total,
    STORAGE: tl.constexpr, STATE: tl.constexpr, AMSGRAD: tl.constexpr, DISPLACED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block; returns `total` with the D² of the 4 elements (of float64: 2) that one thread has added, float64.

    DISPLACED: D is read from g, in the dtype of gradients, or without one from `walk_source`.
    """
    theta_source, walk_source, g, exp_avg, exp_avg_sq, max_exp_avg_sq, theta, weight = addresses
    power, rest = scale
    inv_gamma, decay, beta1, one_minus_beta1, from_start, beta2, one_minus_beta2, neg_step_size, inv_root, eps = scalars
    old = load(theta_source, offsets, n, STATE, WIDE)
    if DISPLACED:
        if STORAGE == STATE:
            D = load(walk_source, offsets, n, STATE, WIDE)
        elif with_gradient:
            D = load_gradient(g, aligned_g, offsets, n, STORAGE, WIDE)
        else:
            D = load(walk_source, offsets, n, STATE, WIDE)
    else:
        walk = load(walk_source, offsets, n, STATE, WIDE)
        gradient = load_gradient(g, aligned_g, offsets, n, STORAGE, WIDE)
        gradient = tl.where(with_gradient, gradient, 0.0)
    m = load(exp_avg, offsets, n, STATE, WIDE)
    v = load(exp_avg_sq, offsets, n, STATE, WIDE)

    if not DISPLACED:
        D = (old - walk) + (gradient * power) * rest
    wide = D.to(tl.float64)
    total += tl.sum(tl.reshape(wide * wide, [total.shape[0], 4]), axis=1)
    G = D * inv_gamma
    change = G - m
    m = tl.where(from_start, m + one_minus_beta1 * change, G - beta1 * change)
    v = beta2 * v + (one_minus_beta2 * G) * G
    store(exp_avg, offsets, n, m, STATE, WIDE)
    store(exp_avg_sq, offsets, n, v, STATE, WIDE)
    if AMSGRAD:
        if max_exp_avg_sq != 0:
            maximum = load(max_exp_avg_sq, offsets, n, STATE, WIDE)
            # As torch.maximum: NaN wins.
            v = tl.where((maximum > v) | (maximum != maximum), maximum, v)
            store(max_exp_avg_sq, offsets, n, v, STATE, WIDE)
    denom = _sqrt(v) * inv_root + eps
    new = old * decay + _divide(neg_step_size * m, denom)
    store(theta, offsets, n, new, STATE, WIDE)
    if STORAGE != STATE:
        store(weight, offsets, n, new, STORAGE, WIDE)
    return total


@triton.jit
def _restore(theta, weight, offsets, n, STORAGE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr):
    """w ← θ, one block."""
    store(weight, offsets, n, load(theta, offsets, n, STATE, WIDE), STORAGE, WIDE)


@triton.jit(do_not_specialize=["touch"])
def outer_step_kernel(
    rows, row_of_chunk, hyper, factor, walk_length, partials, touch,
    STORAGE: tl.constexpr, STATE: tl.constexpr, AMSGRAD: tl.constexpr, DISPLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D = (θ − w) + γ·g/n;  G = D/Γ;  θ ← AdamW(θ, G);  w ← θ.  partials[chunk] = Σ D², float64.

    Bytes per element, float32: reads θ w g m v, writes w m v (32). Below: reads θ walk g m v, writes θ m v and the
    weight (32). AMSGRAD: some group has maxima (8 more where it does).
    DISPLACED: rows are `Table.displaced_on_device`'s, D is read where these say; who takes no part gets w ← θ. Bytes,
    float32: reads θ D m v, writes w m v (28). Below: reads θ D m v, writes θ m v and the weight (30, D in it: 28).
    Source: Algorithm 3 of arXiv 2604.09258; AdamW: arXiv 1711.05101 in torch.optim's order of operations.
    """
    row, begin, n = part_of(rows, row_of_chunk, 1)
    g, weight = address_of(row, GRAD, begin, STORAGE), address_of(row, WEIGHT, begin, STORAGE)
    theta, walk = address_of(row, THETA, begin, STATE), address_of(row, WALK, begin, STATE)
    touched = is_touched(tl.load(row + TOUCHED), g, touch)
    group = tl.load(row + GROUP)
    gamma = tl.load(walk_length + group)
    total = tl.zeros([], tl.float64)
    lanes = tl.arange(0, BLOCK)
    if (touched | (g != 0)) & (gamma > 0):
        exp_avg = address_of(row, EXP_AVG, begin, STATE)
        exp_avg_sq = address_of(row, EXP_AVG_SQ, begin, STATE)
        max_exp_avg_sq = address_of(row, MAX_EXP_AVG_SQ, begin, STATE)
        # Where the parameter did not move, D is θ − θ; where it has no last gradient, what is read for it goes unused.
        if STORAGE == STATE:
            theta_source = tl.where(touched, theta, walk)
            theta = walk
        else:
            theta_source = theta
        walk_source = tl.where(touched, walk, theta_source)
        factor_of_group = tl.load(factor + group)
        with_gradient = (g != 0) & (DISPLACED | (factor_of_group != 0))
        g = tl.where(g != 0, g, theta_source)
        addresses = (theta_source, walk_source, g, exp_avg, exp_avg_sq, max_exp_avg_sq, theta, weight)
        scale = power_and_rest(factor_of_group, STATE)
        step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
        scalars = _scalars(hyper, group, step, gamma, STATE)
        aligned_g = g % 16 == 0
        state = theta_source | walk_source | theta | weight | exp_avg | exp_avg_sq | max_exp_avg_sq
        wide = wide_part(state % 16 == 0, n, BLOCK)
        squares = tl.zeros([BLOCK // 4], tl.float64)
        for start in range(0, wide, BLOCK):
            squares = _update(
                addresses, scale, scalars, with_gradient, aligned_g, start + lanes, n, squares,
                STORAGE, STATE, AMSGRAD, DISPLACED, True,
            )  # fmt: skip
        for start in range(wide, n, BLOCK):
            squares = _update(
                addresses, scale, scalars, with_gradient, aligned_g, start + lanes, n, squares,
                STORAGE, STATE, AMSGRAD, DISPLACED, False,
            )  # fmt: skip
        total = tl.sum(squares)
    elif DISPLACED:
        wide = wide_part((theta | weight) % 16 == 0, n, BLOCK)
        for start in range(0, wide, BLOCK):
            _restore(theta, weight, start + lanes, n, STORAGE, STATE, True)
        for start in range(wide, n, BLOCK):
            _restore(theta, weight, start + lanes, n, STORAGE, STATE, False)
    tl.store(partials + tl.program_id(0), total)


def outer_step(table: Table, on_device: tuple[Tensor, Tensor, Tensor, int], cycle: Cycle, *, displaced: bool) -> None:
    """Starts the kernel, after `scalars.advance`; `step` advances in `scalars.finish`.

    on_device: `table.on_device()` or, with `displaced`, `table.displaced_on_device()`.
    """
    rows, row_of_chunk, _, touch = on_device
    amsgrad = any(bucket.amsgrad for bucket in table.buckets)
    block = 1024 if table.dtype.itemsize >= 4 else 512  # measured: docs/gpu.md
    constants = {**constants_of(table.dtype, block=block), "AMSGRAD": amsgrad, "DISPLACED": displaced}
    # 80 registers: in float32 three programs of 256 threads are on a multiprocessor, below five of 128.
    constants |= at_most_registers(128 if displaced else 96 if amsgrad else 80)
    launch(
        outer_step_kernel, table.chunks,
        rows, row_of_chunk, cycle.hyper, cycle.factor, cycle.walk_length, table.displacement_sq, touch, **constants,
    )  # fmt: skip
