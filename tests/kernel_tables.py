"""Tables of random contents, and a backend's functions run on them beside the reference's."""

from __future__ import annotations

import torch
from conftest import assert_same
from torch import nn

from nexus_fused import backends, reference
from nexus_fused.cycle import Cycle, MicroBatch
from nexus_fused.flat import KEPT, make_segment
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
    dtype,
    sizes,
    *,
    offsets=(0, 0),
    touched=(),
    gradients="all",
    flatten=False,
    amsgrad=False,
    bad=None,
    device=CPU,
    displacement_dtype=None,
    grad_dtype=None,
    anchor=False,
    keeps=KEPT,
    groups=1,
):
    """A table with random weights, moments, displacements and gradients, zeros and -0 among them; unwritten memory is
    NaN. offsets: of weights and gradients. displacement_dtype: None is bfloat16 (float64 for float64). grad_dtype: None
    is the parameters'. groups: how many share the parameters."""

    def randn(numel, offset, dtype=dtype):
        return torch.randn(numel + offset, dtype=torch.float64).to(device, dtype)[offset:]

    torch.manual_seed(0)
    kept_in = torch.float64 if dtype == torch.float64 else displacement_dtype or torch.bfloat16
    table = Table(device, dtype, kept_in, keeps_anchor=anchor, keeps=keeps)
    segments = []
    for i, size in enumerate(sizes):
        param = nn.Parameter(randn(size, offsets[0]))
        param.data[::35] = -0.0
        param.grad_dtype = None
        segments.append(make_segment(param, group=i * groups // len(sizes), index=i))
    table.extend(segments, flatten=flatten)
    table.follow_amsgrad([amsgrad] * groups)
    table.ensure_displacements()
    for bucket in table.buckets:  # whoever reads before writing is found out
        for name in ("displacement", "anchor"):
            if name in bucket.buffers:
                bucket.buffers[name].fill_(float("nan"))
    for i, segment in enumerate(table.segments):
        segment.step.fill_(i)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in segment.bucket.buffers:
                segment.buffer(name).copy_(torch.rand(segment.numel) * 1e-2)
        if segment.low_precision:
            bits = torch.randint(-(2**15), 2**15, [segment.numel], dtype=torch.int32).to(device, torch.int16)
            segment.buffer("remainder").view(torch.int16).copy_(bits)
        if i in touched:
            D = 0.01 * torch.randn(segment.numel)
            D[::7] = 0
            segment.buffer("displacement").copy_(D.to(device))
            if anchor:
                segment.buffer("anchor").copy_(reference.weight(segment) + D.to(device))
        if gradients == "all" or i in gradients:
            grad = randn(segment.numel, offsets[1], grad_dtype or dtype)
            grad[::5] = 0
            if bad is not None and segment.numel:
                grad[-1] = bad
            segment.param.grad = grad
    table.set_touched([s for i, s in enumerate(table.segments) if i in touched], True)
    table.read_gradients(use=True)
    return table


def backend_of(name, device=CPU):
    return backends.resolve(name, None, device)


def make_cycle(name, device=CPU, groups=1, **hyper):
    cycle = Cycle(device, 4, backend_of(name, device))
    cycle.grow(groups)
    cycle.set_hyper([list({**HYPER, **hyper}.values())] * groups)
    return cycle


def contents(table, cycle):
    """All that a kernel may write."""
    tensors = []
    for segment in table.segments:
        tensors += [segment.weight.clone(), segment.step.clone()]
        for name in sorted(segment.bucket.buffers):
            values = segment.buffer(name).clone()
            tensors.append(values.view(torch.int16) if name == "remainder" else values)
    sums = [cycle.sums, cycle.totals, *(cycle.finished or ())[:1]]
    return [*tensors, cycle.counts.clone()], [s.clone() for s in sums]


def give_gradients(table, cycle, takes=None, *, offset=0):
    """Runs `gradients` for these rows (None: all) and returns its targets with memory around them, NaN before; `offset`
    elements lie before each."""
    around = [torch.full([s.numel + offset + 3], torch.nan, dtype=table.dtype).to(table.device) for s in table.segments]
    targets = [memory[offset : len(memory) - 3] for memory in around]
    takes = range(len(targets)) if takes is None else takes
    scale = torch.linspace(-3, 40, len(cycle.factor), dtype=torch.float64).to(table.device) / 3
    cycle.backend.gradients(table, cycle, scale, [target if i in takes else None for i, target in enumerate(targets)])
    return around


def run_function(function, table, cycle, micro_batch, *, moved=None, offset=0):
    """Returns what it wrote elsewhere. moved: rows that take part in `adamw` and `gradients`; None: those that took
    part. offset: as for `give_gradients`."""
    if function == "inner_step":
        cycle.backend.inner_step([table], cycle, micro_batch)
    elif function == "outer_step":
        cycle.backend.outer_step([table], cycle, micro_batch, 3)
    elif function == "end_walk":
        cycle.backend.end_walk([table], cycle, micro_batch, 1 / 3)
    elif function == "gradients":
        takes = table.took_part().nonzero().flatten().tolist() if moved is None else moved
        cycle.backend.end_walk([table], cycle, micro_batch, 1.0)
        return give_gradients(table, cycle, takes, offset=offset)
    else:
        who = table.took_part() if moved is None else torch.tensor([3 * (s.row in moved) for s in table.segments])
        cycle.backend.end_walk([table], cycle, micro_batch, 1 / 3)
        cycle.backend.adamw([table], cycle, [who.double().to(table.device)], 3)
    return []


def compare(
    function,
    name,
    dtype,
    *,
    last_gradient=True,
    walk_length=0.03,
    hyper=None,
    device=CPU,
    tolerance=4e-16,
    moved=None,
    **table,
):
    """Runs a function of the reference and of `name` on equal tables and compares all they wrote.

    tolerance: in float64, for the rounding of √v and βᵗ, and of the norm's root.
    """
    results, offset = [], table.get("offsets", (0, 0))[1]
    for which in ("reference", name):
        made = make_table(dtype, device=device, **table)
        cycle = make_cycle(which, device, table.get("groups", 1), **(hyper or {}))
        cycle.walk_length.fill_(walk_length)
        micro_batch = MicroBatch([reference.sq_norm(made)], 2) if last_gradient else None
        written = run_function(function, made, cycle, micro_batch, moved=moved, offset=offset)
        tensors, sums = contents(made, cycle)
        results.append(([*tensors, *written], sums))
    (left, left_sums), (right, right_sums) = results
    if dtype == torch.float64:
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        assert_same(left, right)
    # Sums of float64 in another order: N·2^-53 at most, far less in practice.
    torch.testing.assert_close(left_sums, right_sums, rtol=1e-12, atol=0, equal_nan=True)


def sq_norm(name, table):
    return backend_of(name, table.device).sq_norm(table).sum()


def check_conversions(name, storage, device=CPU):
    """All 65,536 values of a low-precision dtype as parameters, with remainders of every kind, and as gradients; all of
    them, points beside them and points between them as weights and displacements that are written."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(storage).float()
    near = torch.nextafter(exact, torch.tensor(torch.inf))
    points = torch.cat([exact, near, (exact + exact.roll(1)) / 2, near * 0.5**11]).to(device)
    norm = torch.full((1,), 1e4, dtype=torch.float64, device=device)  # not theirs, which is not finite
    results = []
    for which in ("reference", name):
        left = []
        for shift in range(3):  # nothing moves: what is read is written
            table, cycle = make_table(storage, [len(bits)], device=device), make_cycle(which, device, lr=0)
            segment = table.segments[0]
            segment.weight.view(torch.int16).copy_(bits)
            remainders = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, -0x8000, -0x7FFF, -2, -1, 0x1234, -0x1234])
            segment.buffer("remainder").view(torch.int16).copy_(remainders.repeat(6000)[shift:][: len(bits)])
            segment.param.grad.zero_()
            cycle.walk_length.fill_(1)
            run_function("outer_step", table, cycle, None)
            left += contents(table, cycle)[0]
        table, cycle = make_table(storage, [len(bits)], device=device), make_cycle(which, device)
        table.segments[0].param.grad.view(torch.int16).copy_(bits)
        run_function("inner_step", table, cycle, MicroBatch([norm], 0))
        left += contents(table, cycle)[0]
        table, cycle = make_table(storage, [len(bits)], device=device, keeps=()), make_cycle(which, device)
        table.segments[0].weight.view(torch.int16).copy_(bits)  # lost is what leaves them as they are, NaN too
        run_function("inner_step", table, cycle, MicroBatch([norm], 0))
        left += contents(table, cycle)[0]
        for kept_in in (torch.float32, torch.bfloat16):
            table = make_table(storage, [len(points)], touched=(0,), displacement_dtype=kept_in, device=device)
            segment, cycle = table.segments[0], make_cycle(which, device)
            segment.weight.zero_()
            segment.buffer("remainder").zero_()
            segment.buffer("displacement").copy_(points)
            run_function("end_walk", table, cycle, None)  # w = 0 + D
            left += contents(table, cycle)[0]
        table, cycle = make_table(torch.float32, [len(points)], device=device), make_cycle(which, device)
        table.segments[0].param.grad.copy_(points)
        run_function("inner_step", table, cycle, MicroBatch([norm], 0))
        left += contents(table, cycle)[0]
        results.append([values.cpu() for values in left])
    for one, other in zip(*results, strict=True):
        assert_same([one], [other])
