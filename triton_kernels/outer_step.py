"""The last inner step, the end of the walk and AdamW, fused."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..cycle import Cycle
from ..options import BETA1, BETA2, EPS, HYPER, LR, NORMALIZE, WEIGHT_DECAY
from ..table import Table
from . import elements

_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _NORMALIZE = (
    tl.constexpr(column) for column in (LR, BETA1, BETA2, EPS, WEIGHT_DECAY, NORMALIZE)
)
_N_HYPER = tl.constexpr(len(HYPER))


@triton.jit
def _divide(a, b):
    """Returns a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _sqrt(x):
    """Returns √x, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _scalars(hyper, group, step, gamma, STATE: tl.constexpr):
    """Returns what one update of a group's parameters needs, computed in float64
    and rounded to STATE as PyTorch does.
    """
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
    walk, last, moments, scalars, has_ended, offsets, n, total,
    STORAGE: tl.constexpr, STATE: tl.constexpr, OF_D: tl.constexpr, AMSGRAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Updates one block. Returns `total`, float64, with the D² of its elements; if WIDE, they are first added up
    by 4, also in float64. With float32 state these 4 are one thread's.
    """
    weight, remainder, displacement, _, touched = walk
    exp_avg, exp_avg_sq, max_exp_avg_sq = moments
    inv_gamma, decay, beta1, one_minus_beta1, from_start, beta2, one_minus_beta2, neg_step_size, inv_root, eps = scalars
    w = elements.load_weight(weight, remainder, offsets, n, STORAGE, WIDE)
    D = elements.load(displacement, offsets, n, OF_D, WIDE, touched)
    m = elements.load(exp_avg, offsets, n, STATE, WIDE)
    v = elements.load(exp_avg_sq, offsets, n, STATE, WIDE)
    change = elements.load_step(last, offsets, n, STATE, WIDE)

    w, D = elements.joined(w, STORAGE), elements.widened(D, OF_D)
    theta = tl.where(has_ended, w, elements.outer_weight(w, D))
    D = D + change
    wide = D.to(tl.float64)
    if WIDE:
        total += tl.sum(tl.reshape(wide * wide, [total.shape[0], 4]), axis=1)
    else:
        total += wide * wide
    G = D * inv_gamma
    change = G - m
    m = tl.where(from_start, m + one_minus_beta1 * change, G - beta1 * change)
    v = beta2 * v + (one_minus_beta2 * G) * G
    elements.store(exp_avg, offsets, n, m, STATE, WIDE)
    elements.store(exp_avg_sq, offsets, n, v, STATE, WIDE)
    if AMSGRAD:
        if max_exp_avg_sq != 0:
            maximum = elements.load(max_exp_avg_sq, offsets, n, STATE, WIDE)
            # As torch.maximum: NaN wins.
            v = tl.where((maximum > v) | (maximum != maximum), maximum, v)
            elements.store(max_exp_avg_sq, offsets, n, v, STATE, WIDE)
    denom = _sqrt(v) * inv_root + eps
    new = theta * decay + _divide(neg_step_size * m, denom)
    elements.store_weight(weight, remainder, offsets, n, new, STORAGE, WIDE)
    return total


@triton.jit(do_not_specialize=["touch", "has_ended"])
def outer_step_kernel(
    rows, row_of_chunk, hyper, factor, walk_length, partials, touch, has_ended,
    STORAGE: tl.constexpr, STATE: tl.constexpr, OF_D: tl.constexpr, AMSGRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """θ = w + D; D ← D + γ·g/n; G = D/Γ; w ← AdamW(θ, G). partials[chunk] = Σ D², float64.

    has_ended: θ = w, after `end_walk`. AMSGRAD: some group has maxima (8 bytes more there). Bytes per element, float32
    with D in bfloat16: reads w D g m v, writes w m v (30). bfloat16: 28. Without a last gradient, 4 or 2 less. Source:
    arXiv 2604.09258, Algorithm 3; AdamW: arXiv 1711.05101 in torch.optim's order of operations.
    """
    row, begin, n = elements.part_of(rows, row_of_chunk, 1)
    weight, remainder, displacement, anchor, touched = elements.walk_of(row, begin, touch, STORAGE, STATE, OF_D)
    last = elements.last_step_of(row, begin, factor, STATE)
    group = tl.load(row + elements.GROUP)
    gamma = tl.load(walk_length + group)
    total = tl.zeros([], tl.float64)
    if (touched | (last[0] != 0)) & (gamma > 0):
        walk = (weight, remainder, displacement, anchor, touched)
        exp_avg = elements.address_of(row, elements.EXP_AVG, begin, STATE)
        exp_avg_sq = elements.address_of(row, elements.EXP_AVG_SQ, begin, STATE)
        max_exp_avg_sq = elements.address_of(row, elements.MAX_EXP_AVG_SQ, begin, STATE)
        moments = (exp_avg, exp_avg_sq, max_exp_avg_sq)
        step = tl.load(tl.load(row + elements.STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
        scalars = _scalars(hyper, group, step, gamma, STATE)
        ended = has_ended != 0
        state = weight | remainder | displacement | exp_avg | exp_avg_sq | max_exp_avg_sq
        wide = elements.wide_part(state % 16 == 0, n, BLOCK)
        lanes = tl.arange(0, BLOCK)
        squares = tl.zeros([BLOCK // 4], tl.float64)
        for start in range(0, wide, BLOCK):
            squares = _update(
                walk, last, moments, scalars, ended, start + lanes, n, squares, STORAGE, STATE, OF_D, AMSGRAD, True
            )
        total = tl.sum(squares)
        NARROW: tl.constexpr = BLOCK // 2
        lanes = tl.arange(0, NARROW)
        squares = tl.zeros([NARROW], tl.float64)
        for start in range(wide, n, NARROW):
            squares = _update(
                walk, last, moments, scalars, ended, start + lanes, n, squares, STORAGE, STATE, OF_D, AMSGRAD, False
            )
        total += tl.sum(squares)
    tl.store(partials + tl.program_id(0), total)


def outer_step(table: Table, on_device: tuple[Tensor, Tensor, Tensor, int], cycle: Cycle, *, has_ended: bool) -> None:
    """Starts the kernel, after `scalars.advance`; `scalars.finish` advances `step`. on_device: `table.on_device()` or,
    with `has_ended`, that of `table.on_device_after_walk`.
    """
    rows, row_of_chunk, _, touch = on_device
    amsgrad = any(bucket.amsgrad for bucket in table.buckets)
    block = 1024 if table.dtype.itemsize >= 4 else 512  # measured: docs/gpu.md
    constants = {**elements.constants_of(table, block=block), "AMSGRAD": amsgrad}
    # 80 registers: in float32 three programs of 256 threads are on a multiprocessor, below five of 128.
    constants |= elements.at_most_registers(96 if amsgrad else 80)
    elements.launch(
        outer_step_kernel, table.chunks,
        rows, row_of_chunk, cycle.hyper, cycle.factor, cycle.walk_length, table.displacement_sq, touch, int(has_ended),
        **constants,
    )  # fmt: skip
