"""The end of a walk and AdamW apart, through memory: cycles of several ranks, emulated in one process.

Function by function every backend is held to reference.py in test_parity.py.
"""

from __future__ import annotations

import copy

import inside
import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same, build, exact, run, set_grads, values
from kernel_tables import LOW, make_cycle, make_table
from torch import nn

from nexus_fused import NexusAdamW, reference
from nexus_fused.cycle import MicroBatch


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchor", [False, True])
def test_an_infinite_weight_that_never_moves(name, dtype, anchor):
    """Its D is 0, not inf − inf, which others would add to theirs; it comes back."""
    table, cycle = make_table(dtype, [40], gradients=(), anchor=anchor), make_cycle(name)
    (segment,) = table.segments
    segment.weight.fill_(-torch.inf)
    cycle.backend.end_walk([table], cycle, None, 0.5)
    assert (segment.buffer("displacement") == 0).all()
    cycle.backend.adamw([table], cycle, [torch.zeros(1)], 3)
    assert (segment.weight == -torch.inf).all()


# Whole cycles of several optimizers


def last_step(optimizers, *, gradients=True):
    """What ranks do in place of the last step of a cycle, or of `outer_step()`: returns ‖g‖² and Γ of each rank."""
    share, sums, who_moved = 1 / len(optimizers), [], []
    for optimizer in optimizers:
        inside.look(optimizer, gradients=gradients)
        norms = inside.sq_norms(optimizer) if gradients else []
        sums.append(sum(norm.sum() for norm in norms))
        micro_batch = MicroBatch(norms, optimizer.cycle_position) if gradients else None
        for cycle, tables in inside.work(optimizer):
            for table in tables:
                table.ensure_displacements()
            who_moved.append([table.took_part() for table in tables])
            cycle.backend.end_walk(tables, cycle, micro_batch, share)
    each = [inside.tables(optimizer) for optimizer in optimizers]
    moved = [sum(who) for who in zip(*who_moved, strict=True)]
    for tables in zip(*each, strict=True):
        for places in zip(*(table.displacements() for table in tables), strict=True):
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
            cycle.backend.adamw(tables, cycle, moved, taken)
            for table in tables:
                table.finish_outer_step(everything=True)
        inside.set_position(optimizer, 0)
        optimizer.zero_grad()
    return sums, lengths


def a_rank(*shapes, **options):
    """Parameters and an optimizer that keeps θ beside w, as with a `displacement_group`."""
    params, optimizer = build(*shapes, **options)
    inside.keep_anchors(optimizer)
    return params, optimizer


def add_up(places):
    """Σ over ranks, in the dtype that is sent, into all of them."""
    total = places[0].clone()
    for place in places[1:]:
        total += place
    for place in places:
        place.copy_(total)


def state_of(params, optimizer):
    state = [tensor for p in params for name, tensor in sorted(optimizer.state[p].items()) if name != "remainder"]
    return [*(exact(optimizer, p) for p in params), *copy.deepcopy(state)]


def tolerance_of(dtype):
    return 4e-16 if dtype in (torch.float64, torch.complex128) else 0


@pytest.mark.parametrize(
    ("dtype", "kept"), [*((dtype, torch.bfloat16) for dtype in DTYPES), *((dtype, torch.float32) for dtype in LOW)]
)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_ranks_agree_with_each_other_and_the_formula(backend, dtype, kept, inner_steps):
    """w ← AdamW(θ, ΣD/R ÷ ΣΓ/R), D from each rank's own walk."""
    n_ranks, shapes = 3, ((40, 30), (7,), (3,))
    options = {"dtype": dtype, "backend": backend, "inner_steps": inner_steps, "displacement_dtype": kept}
    ranks = [a_rank(*shapes, **options) for _ in range(n_ranks)]
    optimizers = [optimizer for _, optimizer in ranks]
    kept = torch.float64 if dtype == torch.float64 else kept
    for cycle_number in range(2):
        params, optimizer = ranks[0]
        before = [
            tuple(
                t.clone()
                for t in (exact(optimizer, p), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
            )
            for p in params
        ]
        for rank, (params, optimizer) in enumerate(ranks):
            run(optimizer, params, inner_steps - 1, first_seed=100 * rank + 10 * cycle_number)
            set_grads(params, 100 * rank + 10 * cycle_number + 9)
            params[2].grad = None  # moves nowhere in the last micro-batch, with K = 1 never
        walks, gradients = [], []
        for params, optimizer in ranks:
            walks.append([optimizer.state[p].get("displacement", torch.zeros(())).clone() for p in params])
            gradients.append([None if p.grad is None else p.grad.clone() for p in params])
        norms, lengths = last_step(optimizers)
        gamma = sum(lengths)[0] * (1 / n_ranks)
        for i, (theta, exp_avg, exp_avg_sq) in enumerate(before):
            parts = []
            for walk, gradient, norm in zip(walks, gradients, norms, strict=True):
                D = walk[i].to(theta.dtype).expand(theta.shape)
                if gradient[i] is not None:
                    D = D + reference.scaled_gradient(gradient[i], 0.05 / norm.sqrt(), theta.dtype)
                parts.append((D * (1 / n_ranks)).to(kept))
            add_up(parts)
            if inner_steps > 1 or i != 2:
                hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
                scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.items()}
                scalars["step"] = torch.tensor(cycle_number + 1.0, dtype=torch.float64)
                G = parts[0].to(theta.dtype) * (1 / gamma)
                theta, exp_avg, exp_avg_sq, _ = reference.adamw_formula(theta, G, exp_avg, exp_avg_sq, None, **scalars)
            for params, optimizer in ranks:
                state = optimizer.state[params[i]]
                made = [exact(optimizer, params[i]), state["exp_avg"], state["exp_avg_sq"]]
                expected = [theta, exp_avg, exp_avg_sq]
                if dtype == torch.float16:  # its remainder rounds small weights
                    expected[0] = reference.read_weight(*reference.write_weight(theta, dtype))
                t = tolerance_of(dtype)
                torch.testing.assert_close(made, expected, rtol=t, atol=t)
        for params, optimizer in ranks[1:]:
            assert_same(state_of(params, optimizer), state_of(*ranks[0]))


def one_rank(
    backend, dtype, *, groups=None, gradients=set_grads, micro_batches=(2, 2), shapes=((40, 30), (7,)), **options
):
    """A rank alone, cycle by cycle, beside the same optimizer's ordinary steps; K = 2. D is float32, as a last step
    that is fused is not rounded into it."""
    made, options = [], {"displacement_dtype": torch.float32, **options}
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
    ranks = [a_rank((40,), (7,), (5,), backend=backend, inner_steps=2) for _ in range(2)]
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
        params, optimizer = a_rank((40,), backend=backend)
        run(optimizer, params, 1, first_seed=rank)
        late = [nn.Parameter(torch.arange(30.0)), nn.Parameter(torch.arange(3.0).bfloat16())]
        optimizer.add_param_group({"params": late})
        inside.keep_anchors(optimizer)
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
        inside.keep_anchors(optimizer)
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
