"""Weights in two parts: a 16-bit parameter and a remainder that makes it float32. The definition in reference.py.

That other backends read and write them alike is in test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, assert_same, build, run, values
from kernel_tables import LOW
from torch import nn

from nexus_fused import NexusAdamW
from nexus_fused.reference import read_weight, write_weight

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
REMAINDERS = torch.tensor([0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, -0x8000, -0x7FFF, -0x1234, -2, -1], dtype=torch.int16)


def every_pair(dtype):
    """All parameters, with each of some remainders: [pairs], both in `dtype`."""
    return EVERY.repeat(len(REMAINDERS)).view(dtype), REMAINDERS.repeat_interleave(len(EVERY)).view(dtype)


def spacing(parameter):
    """Between a number and its neighbours, in float64, where it is the larger of two."""
    exact = parameter.double()
    digits, smallest = (7, -126) if parameter.dtype == torch.bfloat16 else (10, -14)
    exponent = torch.where(exact == 0, smallest, torch.frexp(exact).exponent - 1).clamp(min=smallest)
    return torch.ldexp(torch.ones_like(exact), exponent - digits)


def numbers():
    """float32 of all magnitudes and both signs, ties and their neighbours among them."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, [2**18], generator=generator).to(torch.int32).view(torch.float32)
    usual = torch.randn(2**16, generator=generator) * torch.logspace(-9, 4, 2**16)
    ties = torch.cat([(EVERY.view(dtype).float() + EVERY.view(dtype).float().roll(1)) / 2 for dtype in LOW])
    beside = torch.nextafter(ties, torch.tensor(torch.inf))
    edges = torch.tensor([0.0, -0.0, 65519.996, 65520.0, 65504.0, 2**-17, 2**-25, 2**-41, 3.3895314e38, 3.4e38])
    return torch.cat([random, usual, ties, beside, edges, -edges, torch.tensor([torch.inf, -torch.inf])])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_is_written_is_read(dtype):
    """Lossless for finite weights that do not round to inf; float16 from 2^-17 on, below to a multiple of 2^-40."""
    w = numbers()
    parameter, remainder = write_weight(w, dtype)
    assert parameter.dtype == remainder.dtype == dtype
    read = read_weight(parameter, remainder)
    finite = w.isfinite() & parameter.isfinite()
    exact = finite & (w.abs() >= (0 if dtype == torch.bfloat16 else 2**-17))
    assert exact.sum() > 2**17
    assert_same([read[exact].view(torch.int32)], [w[exact].view(torch.int32)])
    rest = finite & ~exact
    assert ((read - w).abs()[rest] <= 2**-41).all()
    assert torch.equal(read.signbit()[rest], w.signbit()[rest])
    assert_same([read[~finite & ~w.isnan()]], [parameter[~finite & ~w.isnan()].float()])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_parameter_is_its_weight_rounded_to_nearest(dtype):
    """Ties go away from zero. (Of float16, what is rounded to a multiple of 2^-40 before may become one.)"""
    w = numbers()
    w = w[w.isnan() | (w.abs() >= (0 if dtype == torch.bfloat16 else 2**-17))]
    parameter, _ = write_weight(w, dtype)
    away = w.to(dtype)  # to even
    tie = w.isfinite() & away.isfinite() & ((w.double() - away.double()).abs() * 2 == spacing(away))
    assert_same([parameter[~tie & ~w.isnan()]], [away[~tie & ~w.isnan()]])
    assert (parameter.double().abs()[tie] >= away.double().abs()[tie]).all()
    assert (parameter.double().abs()[tie] > w.double().abs()[tie]).all()
    assert tie.sum() > 2**14


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_nan_and_inf_of_ours(dtype):
    w = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e39])
    parameter, remainder = write_weight(torch.cat([w, -w[:1]]), dtype)
    nan, inf = (0x7FC0, 0x7F80) if dtype == torch.bfloat16 else (0x7E00, 0x7C00)
    bits = [int(bit) & 0xFFFF for bit in parameter.view(torch.int16)]
    assert bits == [nan, inf, inf | 0x8000, inf, nan]
    assert not remainder.view(torch.int16).any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_parameter_over_every_kind_of_remainder(dtype):
    """What others write over a remainder of ours: ±0, inf and NaN are w as they are, any other value to within half of
    its spacing; ±0 only where the remainder is one that we never write there."""
    parameter, remainder = every_pair(dtype)
    w = read_weight(parameter, remainder)
    bits = remainder.view(torch.int16)
    alone = ~parameter.isfinite() | ((parameter == 0) & (bits < 0))
    assert_same([w[alone]], [parameter[alone].float()])
    assert ((w.double() - parameter.double()).abs() <= spacing(parameter) / 2)[~alone].all()
    assert torch.equal(w.signbit(), parameter.signbit())
    assert torch.equal(w[bits == 0].view(torch.int32), parameter[bits == 0].float().view(torch.int32))


def test_the_halves_of_bfloat16():
    """Together, parameter and remainder are w's bits; from 0x8000 on the remainder borrows one."""
    parameter, remainder = every_pair(torch.bfloat16)
    high, low = parameter.view(torch.int16).long() & 0xFFFF, remainder.view(torch.int16).long() & 0xFFFF
    whole = (high << 16) + low - (low >= 0x8000).long() * 0x10000
    plain = parameter.isfinite() & ((parameter != 0) | (low < 0x8000))
    read = read_weight(parameter, remainder).view(torch.int32).long() & 0xFFFFFFFF
    assert torch.equal(read[plain], whole[plain])


def test_units_of_float16():
    """|w| = |parameter| ± number · 2^-16 · spacing; minus none is minus 0x8000."""
    parameter, remainder = every_pair(torch.float16)
    bits = remainder.view(torch.int16).long() & 0xFFFF
    number = torch.where(bits == 0x8000, -0x8000, torch.where(bits > 0x8000, 0x8000 - bits, bits))
    size = parameter.double().abs() + number * 2.0**-16 * spacing(parameter)
    plain = parameter.isfinite() & ((parameter != 0) | (bits < 0x8000))
    assert_same([read_weight(parameter, remainder).abs()[plain]], [size[plain].float()])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_steps_add_up(dtype, backend):
    """AdamW with a remainder is AdamW with a float32 master: updates far below the parameter's spacing count."""
    low, optimizer = build((64,), dtype=dtype, lr=1e-6, weight_decay=0.01, backend=backend, inner_lr=1e-4)
    wide = [nn.Parameter(p.detach().float()) for p in low]
    master = NexusAdamW(wide, lr=1e-6, weight_decay=0.01, backend=backend, inner_lr=1e-4)
    for seed in range(40):
        torch.manual_seed(seed)
        low[0].grad = torch.randn(64).to(dtype)
        wide[0].grad = low[0].grad.float()
        optimizer.step(), master.step()
    read = read_weight(low[0].detach(), optimizer.state[low[0]]["remainder"])
    # float16's last digits are of 2^-16 of a spacing: the same float32, but where a weight is tiny.
    assert_same([read], [wide[0].detach()])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeroed_by_others(dtype, backend):
    """Half of all remainders borrow one from a parameter: a pruned weight must not become NaN."""
    params, optimizer = build((500,), dtype=dtype, backend=backend)
    run(optimizer, params, 4)
    with torch.no_grad():
        params[0].zero_()
    before = values(params)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert_same(values(params), before)
    run(optimizer, params, 3)
    assert params[0].isfinite().all()
