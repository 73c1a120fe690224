"""Walks of several ranks: `displace` and the displaced outer step of every backend, the ranks emulated in one process.

Elements must equal reference.py's bit for bit; for float64's square root see test_parity.py.
"""

from __future__ import annotations

import copy

import inside
import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same, build, run, set_grads, values
from kernel_tables import LOW, contents, make_cycle, make_table
from torch import nn

from nexus_fused import NexusAdamW, reference
from nexus_fused.cycle import MicroBatch
from nexus_fused.table import CHUNK_ELEMENTS

FUSED = [name for name in BACKENDS if name != "reference"]
SIZES = [1, 0, CHUNK_ELEMENTS + 1]


# Function by function, over tables


def displaced(
    name, dtype, *, moved="own", share=1 / 3, last_gradient=True, walk_length=0.03, low=False, hyper=None, **kw
):
    """What `displace` and then the displaced outer step write into a table. moved: rows, "own" those of this rank."""
    table, cycle = make_table(dtype, **kw), make_cycle(name, **(hyper or {}))
    table.reduces_low_precision = low
    cycle.walk_length.fill_(walk_length)
    micro_batch = MicroBatch([reference.sq_norm(table)], 2) if last_gradient else None
    own = [segment.row for segment in table.moving()]
    cycle.backend.displace([table], cycle, micro_batch, share)
    written = contents(table, cycle)[0]
    rows = own if moved == "own" else moved
    table.moved = torch.tensor([3 * (segment.row in rows) for segment in table.segments])
    cycle.backend.outer_step([table], cycle, None, 3, displaced=True)
    left, sums = contents(table, cycle)
    return written, left, sums


def compare(name, dtype, **kwargs):
    written, left, sums = displaced("reference", dtype, **kwargs)
    own_written, own_left, own_sums = displaced(name, dtype, **kwargs)
    assert_same(own_written, written)
    tolerance = 4e-16 if dtype == torch.float64 else 0
    torch.testing.assert_close(own_left, left, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(own_sums, sums, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("dtype", "low"), [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in LOW)])
class TestParity:
    @pytest.mark.parametrize(("sizes", "offsets"), [(SIZES, (0, 0)), ([1023, 5, 33], (1, 1)), ([1100], (0, 3))])
    def test_sizes_and_alignments(self, name, dtype, low, sizes, offsets):
        for touched in ((), range(len(sizes))):
            compare(name, dtype, low=low, sizes=sizes, offsets=offsets, touched=touched)

    def test_who_takes_part(self, name, dtype, low):
        """Touched or not, with or without a gradient, moved on another rank or on none."""
        for touch in ((0, 1), (0, 1, 2)):  # others than those with a gradient, and just those
            for moved in ("own", (1, 3, 4)):
                kwargs = {"touched": touch, "gradients": (0, 1, 2) if len(touch) == 3 else (1, 2), "moved": moved}
                compare(name, dtype, low=low, sizes=[50, 60, 1025, 0, 80], **kwargs)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_skipped_step(self, name, dtype, low, bad):
        for touched in ((), (0,)):
            compare(name, dtype, low=low, sizes=[1100, 9], touched=touched, bad=bad)

    def test_no_last_gradient(self, name, dtype, low):
        kwargs = {"sizes": [50, 60, 70], "touched": (0, 1), "gradients": (), "last_gradient": False}
        compare(name, dtype, low=low, **kwargs)

    @pytest.mark.parametrize("flatten", [False, True])
    @pytest.mark.parametrize("hyper", [{}, {"normalize": 0}, {"sign": -1, "beta1": 0.3}])
    def test_options(self, name, dtype, low, flatten, hyper):
        compare(name, dtype, low=low, sizes=[70, 1100], touched=(1,), flatten=flatten, amsgrad=flatten, hyper=hyper)

    def test_group_that_never_walked(self, name, dtype, low):
        """Its last step is skipped too: weights are θ again."""
        kwargs = {"sizes": [1050, 0, 60], "touched": (0,), "bad": float("nan"), "walk_length": 0}
        compare(name, dtype, low=low, **kwargs)

    def test_nothing_but_empty(self, name, dtype, low):
        compare(name, dtype, low=low, sizes=[0, 0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_that_never_moves(name, dtype):
    """Its D is 0, not inf − inf, which others would add to theirs; it comes back."""
    table, cycle = make_table(dtype, [40], gradients=()), make_cycle(name)
    (segment,) = table.segments
    segment.weight.fill_(-torch.inf)
    if segment.low_precision:
        segment.theta.fill_(-torch.inf)
    cycle.backend.displace([table], cycle, None, 0.5)
    assert (table.displacement(segment) == 0).all()
    table.moved = torch.zeros(1, dtype=torch.int64)
    cycle.backend.outer_step([table], cycle, None, 3, displaced=True)
    assert (segment.weight == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_and_threads_agree(dtype):
    extension = pytest.importorskip("nexus_fused._C")
    threads, best = torch.get_num_threads(), extension.instruction_set()
    results = []
    try:
        for isa in extension.instruction_sets():
            for n in (1, 3):
                extension.set_instruction_set(isa)
                torch.set_num_threads(n)
                results += [
                    [*(t for part in displaced("cpu", dtype, low=low, **kwargs) for t in part)]
                    for low in (False, True)
                    for kwargs in ({"sizes": [50, 70000, 1], "touched": (1,), "gradients": (0, 1)},)
                ]
    finally:
        extension.set_instruction_set(best)
        torch.set_num_threads(threads)
    for i, other in enumerate(results):
        assert_same(results[i % 2], other)


# Whole cycles of several optimizers


def last_step(optimizers, *, low=False, gradients=True):
    """What ranks do in place of the last step of a cycle, or of `outer_step()`: returns ‖g‖² and Γ of each rank."""
    share, sums = 1 / len(optimizers), []
    for optimizer in optimizers:
        inside.look(optimizer, gradients=gradients)
        norms = inside.sq_norms(optimizer) if gradients else []
        sums.append(sum(norm.sum() for norm in norms))
        micro_batch = MicroBatch(norms, optimizer.cycle_position) if gradients else None
        for cycle, tables in inside.work(optimizer):
            for table in tables:
                table.reduces_low_precision = low
                if not table.displacement_in_weight:
                    table.ensure_cycle_buffers()
                table.moved = torch.tensor([int(segment in table.moving()) for segment in table.segments])
            cycle.backend.displace(tables, cycle, micro_batch, share)
    each = [inside.tables(optimizer) for optimizer in optimizers]
    for tables in zip(*each, strict=True):
        moved = sum(table.moved for table in tables)
        for table in tables:
            table.moved = moved
        for segments in zip(*(table.segments for table in tables), strict=True):
            places = [table.displacement(segment) for table, segment in zip(tables, segments, strict=True)]
            add_up(places)
    cycles = [cycle for optimizer in optimizers for cycle, _ in inside.work(optimizer)]
    lengths = [cycle.walk_length.clone() for cycle in cycles]
    for name in ("walk_length", "walk_sq_length"):
        mean = sum(getattr(cycle, name) for cycle in cycles) * share
        for cycle in cycles:
            getattr(cycle, name).copy_(mean)
    for optimizer in optimizers:
        taken = optimizer.cycle_position + gradients
        for cycle, tables in inside.work(optimizer):
            cycle.backend.outer_step(tables, cycle, None, taken, displaced=True)
            for table in tables:
                table.finish_outer_step(displaced=True)
        inside.set_position(optimizer, 0)
        optimizer.zero_grad()
    return sums, lengths


def add_up(places):
    """Σ over ranks, in the dtype that is sent, into all of them."""
    total = places[0].clone()
    for place in places[1:]:
        total += place
    for place in places:
        place.copy_(total)


def state_of(params, optimizer):
    state = [tensor for p in params for _, tensor in sorted(optimizer.state[p].items())]
    return [*values(params), *copy.deepcopy(state)]


def tolerance_of(dtype):
    return 4e-16 if dtype in (torch.float64, torch.complex128) else 0


@pytest.mark.parametrize(("dtype", "low"), [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in LOW)])
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_ranks_agree_with_each_other_and_the_formula(backend, dtype, low, inner_steps):
    """θ ← AdamW(θ, ΣD/R ÷ ΣΓ/R), D from each rank's own walk."""
    n_ranks = 3
    ranks = [build((40, 30), (7,), (3,), dtype=dtype, backend=backend, inner_steps=inner_steps) for _ in range(n_ranks)]
    optimizers = [optimizer for _, optimizer in ranks]
    for cycle_number in range(2):
        segments = inside.segments(ranks[0][1])
        before = [
            (
                *values([s.theta if s.low_precision else s.weight]),
                *values([s.buffer("exp_avg"), s.buffer("exp_avg_sq")]),
            )
            for s in segments
        ]
        for rank, (params, optimizer) in enumerate(ranks):
            run(optimizer, params, inner_steps - 1, first_seed=100 * rank + 10 * cycle_number)
            set_grads(params, 100 * rank + 10 * cycle_number + 9)
            params[2].grad = None  # moves nowhere in the last micro-batch, with K = 1 never
        walks, gradients = [], []
        for params, optimizer in ranks:
            segments = inside.segments(optimizer)
            walks.append([s.walk.clone() if s.touched else None for s in segments])
            gradients.append([None if p.grad is None else p.grad.clone().view(-1) for p in params])
        norms, lengths = last_step(optimizers, low=low)
        gamma = sum(lengths)[0] * (1 / n_ranks)
        for i, (theta, exp_avg, exp_avg_sq) in enumerate(before):
            parts = []
            for walk, gradient, norm in zip(walks, gradients, norms, strict=True):
                D = torch.zeros_like(theta) if walk[i] is None else theta - walk[i]
                if gradient[i] is not None:
                    D = D + reference.scaled_gradient(gradient[i], 0.05 / norm.sqrt(), theta.dtype)
                parts.append((D * (1 / n_ranks)).to(dtype if low else theta.dtype))
            add_up(parts)
            if inner_steps > 1 or i != 2:
                hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
                scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.items()}
                scalars["step"] = torch.tensor(cycle_number + 1.0, dtype=torch.float64)
                G = parts[0].to(theta.dtype) * (1 / gamma)
                theta, exp_avg, exp_avg_sq, _ = reference.adamw(theta, G, exp_avg, exp_avg_sq, None, **scalars)
            for params, optimizer in ranks:
                state = optimizer.state[params[i]]
                made = [params[i].detach(), state["exp_avg"], state["exp_avg_sq"]]
                expected = [theta.to(dtype), exp_avg, exp_avg_sq]
                if "master" in state:
                    made, expected = [*made, state["master"]], [*expected, theta]
                expected = [tensor.view(params[i].shape) for tensor in expected]
                t = tolerance_of(dtype)
                torch.testing.assert_close(made, expected, rtol=t, atol=t)
        for params, optimizer in ranks[1:]:
            assert_same(state_of(params, optimizer), state_of(*ranks[0]))


def one_rank(
    backend, dtype, *, groups=None, gradients=set_grads, micro_batches=(2, 2), shapes=((40, 30), (7,)), **options
):
    """A rank alone, cycle by cycle, beside the same optimizer's ordinary steps; K = 2."""
    made = []
    for alone in (False, True):
        params, optimizer = build(*shapes, dtype=dtype, backend=backend, **{"inner_steps": 2, **options})
        for number, length in enumerate(micro_batches):
            for k in range(length):
                gradients(params, 10 * number + k)
                if alone and k == optimizer.param_groups[0]["inner_steps"] - 1:
                    last_step([optimizer])
                else:
                    optimizer.step()
                    optimizer.zero_grad()
            if length < optimizer.param_groups[0]["inner_steps"]:
                if alone:
                    last_step([optimizer], gradients=False)
                else:
                    optimizer.outer_step()
        made.append((state_of(params, optimizer), optimizer.metrics()))
    (left, metrics), (right, own) = made
    assert_same(right, left)
    assert str(own) == str(metrics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
class TestOneRank:
    """share = 1 and nobody to add: the ordinary outer step bit for bit, sums and counts included."""

    @pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"inner_steps": 1}], ids=str)
    def test_options(self, backend, dtype, options):
        one_rank(backend, dtype, micro_batches=[options.get("inner_steps", 2)] * 2, **options)

    def test_partial_cycles(self, backend, dtype):
        one_rank(backend, dtype, micro_batches=(1, 2, 1))

    def test_partly_without_gradients(self, backend, dtype):
        """Only in the first micro-batch, only in the last, never."""

        def some(params, seed):
            set_grads(params, seed)
            for i, param in enumerate(params[1:]):
                if i == 2 or seed % 10 != i:
                    param.grad = None

        one_rank(backend, dtype, gradients=some, shapes=[(30,), (20, 3), (7,), (5,), (0,)])

    @pytest.mark.parametrize("which", [(1,), (0, 1)], ids=str)
    def test_skipped_steps(self, backend, dtype, which):
        def some_bad(params, seed):
            set_grads(params, seed)
            if seed % 10 in which:
                params[0].grad[-1] = float("nan")

        one_rank(backend, dtype, gradients=some_bad)


def test_gradients_on_one_rank_only(backend):
    """A parameter moves with everybody when it moved anywhere, and everybody's `step` of it advances."""
    ranks = [build((40,), (7,), (5,), backend=backend, inner_steps=2) for _ in range(2)]
    start = values(ranks[0][0])
    for rank, (params, optimizer) in enumerate(ranks):
        for k in range(2):
            set_grads(params, 10 * rank + k)
            params[2].grad = None
            if rank == 0:
                params[1].grad = None
            if k == 0:
                optimizer.step()
    last_step([optimizer for _, optimizer in ranks])
    assert_same(state_of(*ranks[0]), state_of(*ranks[1]))
    for params, optimizer in ranks:
        assert [optimizer.state[p]["step"].item() for p in params] == [1, 1, 0]
        assert not torch.equal(params[1], start[1])
        assert torch.equal(params[2], start[2])


def test_a_group_that_did_not_walk(backend):
    """Γ = 0 for one group, whose only micro-batch was skipped: weights come back, state keeps its values."""
    ranks = []
    for rank in range(2):
        params, optimizer = build((40,), backend=backend)
        run(optimizer, params, 1, first_seed=rank)
        late = [nn.Parameter(torch.arange(30.0)), nn.Parameter(torch.arange(3.0).bfloat16())]
        optimizer.add_param_group({"params": late})
        set_grads(late, rank)
        late[0].grad[3] = float("nan")
        optimizer.step()
        ranks.append(([*params, *late], optimizer))
    last_step([optimizer for _, optimizer in ranks], gradients=False)
    for params, optimizer in ranks:
        assert_same(params[1:], [torch.arange(30.0), torch.arange(3.0).bfloat16()])
        assert [optimizer.state[p]["step"].item() for p in params] == [1, 0, 0]
        assert not any(optimizer.state[p]["exp_avg"].any() for p in params[1:])
        assert_same(state_of(params, optimizer), state_of(*ranks[0]))


def test_gaps(backend):
    """A parameter with gaps: kernels work on its dense twin, and what lies between its elements stays."""
    ranks = []
    for rank in range(2):
        memory = torch.arange(48.0).view(6, 8)
        params = [nn.Parameter(memory[:, ::2]), nn.Parameter(torch.ones(3))]
        optimizer = NexusAdamW(params, backend=backend, inner_steps=2)
        run(optimizer, params, 1, first_seed=rank)
        set_grads(params, 10 + rank)
        if rank == 1:
            params[0].grad = None
        ranks.append((params, optimizer, memory))
    last_step([optimizer for _, optimizer, _ in ranks])
    for params, optimizer, memory in ranks:
        assert torch.equal(memory[:, 1::2], torch.arange(48.0).view(6, 8)[:, 1::2])
        assert not torch.equal(memory[:, ::2], torch.arange(48.0).view(6, 8)[:, ::2])
        assert_same(state_of(params, optimizer), state_of(*ranks[0][:2]))
