"""Tables of random contents, and a backend's functions run on them beside the reference's."""

from __future__ import annotations

import inside
import torch
from conftest import assert_same
from torch import nn

from nexus_fused import backends, reference
from nexus_fused.cycle import Cycle, MicroBatch
from nexus_fused.flat import make_segment
from nexus_fused.table import CHUNK_ELEMENTS, Table

OFFSETS = [(0, 0), (1, 1), (3, 3), (0, 1)]  # of weights and of gradients, which may be the only ones off 16 bytes
LOW = [torch.bfloat16, torch.float16]
SIZES = [0, 1, 31, 1023, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1, 3 * CHUNK_ELEMENTS + 17]
HYPER = {
    "inner_lr": 0.01,
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "sign": 1,
    "normalize": 1,
}


CPU = torch.device("cpu")


def make_table(
    dtype, sizes, *, offsets=(0, 0), touched=(), gradients="all", flatten=False, amsgrad=False, bad=None, device=CPU
):
    """A table with random weights, moments, θ and gradients; unwritten memory is NaN. offsets: of both."""

    def randn(numel, offset):
        return torch.randn(numel + offset, dtype=torch.float64).to(device, dtype)[offset:]

    torch.manual_seed(0)
    table = Table(device, dtype)
    segments = []
    for i, size in enumerate(sizes):
        param = nn.Parameter(randn(size, offsets[0]))
        segments.append(make_segment(param, group=0, index=i, state={}))
    table.extend(segments, flatten=flatten)
    table.set_amsgrad(0, amsgrad)
    for bucket in table.buckets:  # whoever reads before writing is found out
        bucket.ensure("walk" if bucket.state_dtype != dtype else "anchor")
        (bucket.buffers["walk"] if bucket.state_dtype != dtype else bucket.buffers["anchor"]).fill_(float("nan"))
    table.ensure_cycle_buffers()
    inside.rebuild(table)
    for i, segment in enumerate(table.segments):
        segment.step.fill_(i)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in segment.bucket.buffers:
                segment.buffer(name).copy_(torch.rand(segment.numel) * 1e-2)
        if i in touched:
            if segment.low_precision:
                segment.walk.copy_(segment.theta + 0.01 * torch.randn(segment.numel).to(device))
                segment.weight.copy_(segment.walk)
            else:
                segment.theta.copy_(segment.walk + 0.01 * torch.randn(segment.numel).to(device))
        if gradients == "all" or i in gradients:
            segment.param.grad = randn(segment.numel, offsets[1])
            if bad is not None and segment.numel:
                segment.param.grad[-1] = bad
    table.set_touched([s for i, s in enumerate(table.segments) if i in touched], True)
    table.read_gradients(use=True)
    table.adopt_writes(restart=True)
    return table


def backend_of(name, device=CPU):
    return backends.resolve(name, None, device)


def make_cycle(name, device=CPU, **hyper):
    cycle = Cycle(device, 4, backend_of(name, device))
    cycle.grow(1)
    cycle.set_hyper([list({**HYPER, **hyper}.values())])
    return cycle


def contents(table, cycle):
    """All that a kernel may write."""
    tensors = []
    for segment in table.segments:
        tensors += [segment.weight.clone(), segment.step.clone()]
        tensors += [segment.buffer(name).clone() for name in sorted(segment.bucket.buffers)]
    sums = [cycle.sums, cycle.totals, *(cycle.finished or ())[:1]]
    return [*tensors, cycle.counts.clone()], [s.clone() for s in sums]


def run_function(function, table, cycle, micro_batch):
    if function == "inner_step":
        cycle.backend.inner_step([table], cycle, micro_batch)
    else:
        cycle.backend.outer_step([table], cycle, micro_batch, 3)


def compare(
    function, name, dtype, *, last_gradient=True, walk_length=0.03, hyper=None, device=CPU, tolerance=4e-16, **table
):
    """Runs a function of the reference and of `name` on equal tables and compares all they wrote.

    tolerance: of outer steps in float64, for the rounding of √v and βᵗ.
    """
    results = []
    for which in ("reference", name):
        made, cycle = make_table(dtype, device=device, **table), make_cycle(which, device, **(hyper or {}))
        cycle.walk_length.fill_(walk_length)
        run_function(function, made, cycle, MicroBatch([reference.sq_norm(made)], 2) if last_gradient else None)
        results.append(contents(made, cycle))
    (left, left_sums), (right, right_sums) = results
    if dtype == torch.float64 and function == "outer_step":
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        assert_same(left, right)
    # Sums of float64 in another order: N·2^-53 at most, far less in practice.
    torch.testing.assert_close(left_sums, right_sums, rtol=1e-12, atol=0, equal_nan=True)


def sq_norm(name, table):
    return backend_of(name, table.device).sq_norm(table).sum()


def check_conversions(name, storage, device=CPU):
    """All 65,536 values of a low-precision dtype are read, and they and points between and around them rounded, as
    PyTorch does it."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(storage).float()
    points = torch.cat([exact, torch.nextafter(exact, torch.tensor(torch.inf)), (exact + exact.roll(1)) / 2]).to(device)
    table = make_table(storage, [len(points)], touched=(0,), device=device)
    segment, cycle = table.segments[0], make_cycle(name, device, normalize=0, lr=0, weight_decay=0)
    # θ is stored as it is when lr and weight decay are 0: a pure rounding into the parameter. (D of inf is NaN.)
    segment.theta.copy_(points)
    segment.walk.copy_(points)
    cycle.walk_length.fill_(1)
    run_function("outer_step", table, cycle, None)
    finite = points.isfinite()
    assert torch.equal(segment.weight.view(torch.int16)[finite], points.to(storage).view(torch.int16)[finite])
    assert segment.weight[~finite].isnan().all()
    moved = []
    for which in ("reference", name):
        table, cycle = make_table(storage, [len(exact)], device=device), make_cycle(which, device)
        segment = table.segments[0]
        segment.param.grad.copy_(exact)
        # A norm of its own, as that of these gradients is not finite: what is inf or NaN moves there all the same.
        norm = torch.full((1,), 1e4, dtype=torch.float64, device=device)
        run_function("inner_step", table, cycle, MicroBatch([norm], 0))
        moved.append(segment.walk.clone())
        assert moved[-1].isnan().any()
    assert_same(*[[walk] for walk in moved])
