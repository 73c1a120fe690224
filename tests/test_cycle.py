"""The cycle's rules: an independent two-model walk with torch.optim.AdamW, and every corner case."""

from __future__ import annotations

import copy
import math

import inside
import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same, build, exact, make_params, run, set_grads, values
from torch import nn
from two_models import TwoModels

from nexus_fused import NexusAdamW
from nexus_fused.reference import write_weight

OPTIONS = [
    {},
    {"weight_decay": 0.2, "betas": (0.9, 0.95)},
    {"amsgrad": True, "eps": 1e-4},
    {"maximize": True},
    {"inner_steps": 1},
    {"inner_steps": 7},
    {"normalize_displacement": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_two_models_in_float64(backend, dtype, options):
    """15 cycles with missing gradients. Rounding: the displacement is a difference of weights around 1, 1e-16 each,
    divided by a walk of 0.2; AdamW divides by √v once more."""
    params, theirs = (
        make_params((4, 3), (6,), (1,), dtype=dtype),
        make_params((4, 3), (6,), (1,), dtype=dtype),
    )
    steps = options.get("inner_steps", 4)
    ours = NexusAdamW(params, lr=1e-2, inner_lr=0.05, backend=backend, **options)
    adamw = {key: value for key, value in options.items() if key not in ("inner_steps", "normalize_displacement")}
    sign = -1 if adamw.pop("maximize", False) else 1
    definition = TwoModels(theirs, 0.05, steps, options.get("normalize_displacement", True), lr=1e-2, **adamw)
    for seed in range(15 * steps):
        set_grads(params, seed)
        if seed % 3 == 0:
            params[1].grad = None
        if seed // steps % 4 == 1:
            params[2].grad = None
        definition.step([None if p.grad is None else sign * p.grad for p in params])
        ours.step()
        if ours.at_boundary:
            for p, q in zip(params, theirs, strict=True):
                torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
    for p, q in zip(params, theirs, strict=True):
        state = definition.adamw.state.get(q, {"step": torch.tensor(0.0)})
        assert ours.state[p]["step"] == state["step"]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_fed_with_the_same_gradient(backend, dtype, amsgrad):
    """K = 1 is AdamW on g/‖g‖. float32 on both sides, AdamW with a fused multiply-add here and there: a unit or two of
    each operand (moments around 0.1: 1e-8, weights around 1: 1e-7) an update."""
    params = make_params((30, 7), (50,), dtype=dtype)
    theirs = [nn.Parameter(p.detach().float()) for p in params]
    ours = NexusAdamW(params, lr=1e-3, inner_steps=1, weight_decay=0.1, amsgrad=amsgrad, backend=backend)
    adamw = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.1, amsgrad=amsgrad)
    for seed in range(50):
        set_grads(params, seed)
        norm = torch.cat([p.grad.flatten().double() for p in params]).norm()
        for p, q in zip(params, theirs, strict=True):
            q.grad = (p.grad.double() / norm).float()
        ours.step()
        adamw.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(exact(ours, p), q.detach(), rtol=5e-6, atol=5e-7)
        torch.testing.assert_close(ours.state[p]["exp_avg"], adamw.state[q]["exp_avg"], rtol=1e-5, atol=2e-8)
    assert "displacement" not in inside.only_table(ours).buckets[0].buffers  # none is needed


@pytest.mark.interpreted
class TestCornerCases:
    @pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
    def test_nothing_moves_when_the_norm_is_unusable(self, backend, dtype, bad):
        params, optimizer = build(dtype=dtype, backend=backend)
        before = values(params)
        for p in params:
            p.grad = torch.full_like(p, bad)
        optimizer.step()
        assert_same(values(params), before)
        assert optimizer.cycle_position == 1
        assert optimizer.metrics()["skipped_inner_steps"] == 1

    def test_a_skip_never_leaves_an_older_displacement(self, backend, dtype):
        """A first inner step is skipped in the second cycle: the walk must start from this cycle's θ."""
        with_skip, without = build(dtype=dtype, backend=backend), build(dtype=dtype, backend=backend)
        for params, optimizer in (with_skip, without):
            run(optimizer, params, 4)
        params, optimizer = with_skip
        for p in params:
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        run(optimizer, params, 3, 10)
        params, optimizer = without
        run(optimizer, params, 3, 10)
        optimizer.outer_step()
        for p, q in zip(with_skip[0], without[0], strict=True):  # D of the last step is rounded into w in one of them
            torch.testing.assert_close(p, q, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)

    def test_group_without_a_walk_keeps_everything(self, backend, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, 4)
        before, state = values(params), copy.deepcopy(optimizer.state_dict()["state"])
        for _ in range(4):
            for p in params:
                p.grad = torch.full_like(p, float("nan"))
            optimizer.step()
        assert_same(values(params), before)
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
        assert optimizer.metrics()["skipped_outer_steps"] == 1
        assert math.isnan(optimizer.metrics()["alignment"])
        assert all(math.isnan(norm) for norm in optimizer.metrics()["grad_norms"])

    def test_missing_gradients(self, backend, dtype):
        """Late first gradient, none in one micro-batch, none in the whole cycle."""
        params, optimizer = build((3,), (4,), (5,), dtype=dtype, backend=backend)
        before = values(params)
        for seed in range(4):
            set_grads(params, seed)
            params[2].grad = None
            if seed < 2:
                params[1].grad = None
            expected = params[1].detach().clone()
            optimizer.step()
            if seed < 2:
                assert_same([params[1].detach()], [expected])
        assert_same([params[2].detach()], [before[2]])
        assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1, 0]
        assert optimizer.state[params[2]]["exp_avg"].count_nonzero() == 0
        assert optimizer.state[params[1]]["exp_avg"].count_nonzero() > 0

    def test_gradients_only_in_skipped_steps(self, backend):
        """AdamW with G = 0: the moments decay, the weights too."""
        params, optimizer = build((3,), (4,), backend=backend, weight_decay=0.5)
        run(optimizer, params, 4)
        before, moment = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg"].clone()
        second = optimizer.state[params[0]]["exp_avg_sq"].clone()
        set_grads(params, 0)
        params[1].grad[0] = float("inf")
        optimizer.step()
        for seed in range(3):
            set_grads(params, seed)
            params[0].grad = None
            optimizer.step()
        torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], 0.9 * moment)
        torch.testing.assert_close(optimizer.state[params[0]]["exp_avg_sq"], 0.999 * second)
        assert not torch.equal(params[0], before)
        assert optimizer.state[params[0]]["step"] == 2

    def test_steps_without_any_gradient_are_micro_batches(self, backend):
        params, optimizer = build(backend=backend)
        before = values(params)
        for position in (1, 2, 3):
            optimizer.step()
            assert optimizer.cycle_position == position
        with pytest.warns(UserWarning, match="no parameter had a gradient"):
            optimizer.step()
        assert optimizer.at_boundary
        assert_same(values(params), before)
        assert optimizer.metrics()["skipped_inner_steps"] == 4

    def test_several_backward_passes_are_one_inner_step_on_their_sum(self, backend):
        (p,), optimizer = build((3,), backend=backend)
        (q,), other = build((3,), backend=backend)
        for factor in (1.0, 2.0):
            (factor * p * torch.arange(3.0)).sum().backward()
        optimizer.step()
        q.grad = 3 * torch.arange(3.0)
        other.step()
        assert_same([p.detach()], [q.detach()])

    def test_group_added_in_mid_cycle(self, backend, dtype):
        """Its walk starts where it joins: the same as a group that saw two gradients, both with its own Γ."""
        params, optimizer = build((3,), dtype=dtype, backend=backend)
        (late,) = make_params((4,), dtype=dtype, seed=5)
        run(optimizer, params, 2)
        optimizer.add_param_group({"params": [late], "inner_lr": 0.02})
        run(optimizer, [*params, late], 1, 2)
        lengths = [float(g["walk_length"]) for g in optimizer.param_groups]
        assert lengths == pytest.approx([0.15, 0.02])
        run(optimizer, [*params, late], 1, 3)
        assert optimizer.at_boundary
        assert optimizer.state[late]["step"] == 1
        # AdamW's first update is lr in size after the decay, unless the walk were measured from elsewhere.
        moved = exact(optimizer, late).double()
        decayed = make_params((4,), dtype=dtype, seed=5)[0].detach().double() * (1 - 1e-4)
        torch.testing.assert_close((moved - decayed).abs(), torch.full((4,), 1e-2).double(), rtol=1e-3, atol=1e-5)

    def test_partial_cycle(self, backend, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        before = values(params)
        optimizer.outer_step()  # nothing to apply
        assert_same(values(params), before)
        run(optimizer, params, 2)
        set_grads(params, 9)  # waits, is not used
        optimizer.outer_step()
        assert optimizer.at_boundary
        assert all(optimizer.state[p]["step"] == 1 for p in params)
        assert len(optimizer.metrics()["grad_norms"]) == 2
        assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))

    def test_tied_and_strided_parameters(self, backend, dtype):
        """A transposed, a sliced and a channels-last parameter give what contiguous ones give."""
        plain = make_params((4, 6), (5, 3), (2, 3, 4, 4), dtype=dtype)
        permuted = nn.Parameter(plain[0].detach().clone().t().contiguous().t())
        memory = torch.zeros(5, 10, dtype=dtype)
        sliced = nn.Parameter(memory[:, 2:5])
        sliced.data.copy_(plain[1])
        last = nn.Parameter(plain[2].detach().clone(memory_format=torch.channels_last))
        strided = [permuted, sliced, last]
        optimizers = [NexusAdamW(group, inner_lr=0.05, backend=backend) for group in (plain, strided)]
        for seed in range(9):
            for group, optimizer in zip((plain, strided), optimizers, strict=True):
                set_grads(group, seed)
                optimizer.step()
        # The norm sums in another order: 1e-16 of γ/n, which float32 rounds away but for rare ties.
        for p, q in zip(plain, strided, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert memory[:, :2].count_nonzero() == memory[:, 5:].count_nonzero() == 0
        assert optimizers[1].state[permuted]["exp_avg"].stride() == permuted.stride()
        assert [p.stride() for p in strided] == [(1, 4), (10, 1), (48, 1, 12, 3)]

    def test_gradient_with_other_strides(self, backend, dtype):
        (p,), (q,) = (make_params((4, 6), dtype=dtype) for _ in range(2))
        first, second = NexusAdamW([p], backend=backend), NexusAdamW([q], backend=backend)
        for seed in range(5):
            set_grads([p], seed)
            q.grad = torch.empty_strided((4, 6), (1, 4), dtype=dtype).copy_(p.grad)
            first.step()
            second.step()
        assert_same([p.detach()], [q.detach()])

    def test_complex_is_pairs_of_reals(self, backend):
        (z,) = make_params((5,), dtype=torch.complex64)
        x = nn.Parameter(torch.view_as_real(z.detach()).clone())
        optimizers = NexusAdamW([z], backend=backend), NexusAdamW([x], backend=backend)
        for seed in range(9):
            set_grads([z], seed)
            if seed == 3:
                z.grad = z.grad.conj()
            x.grad = torch.view_as_real(z.grad.resolve_conj()).clone()
            for optimizer in optimizers:
                optimizer.step()
        assert_same([torch.view_as_real(z.detach())], [x.detach()])
        assert optimizers[0].state[z]["exp_avg"].dtype == torch.complex64

    def test_unfrozen_later(self, backend, dtype):
        params = make_params((3,), (4,), dtype=dtype)
        params[1].requires_grad_(False)
        optimizer = NexusAdamW(params, backend=backend)
        assert params[1] not in optimizer.state
        run(optimizer, params[:1], 5)
        params[1].requires_grad_(True)
        run(optimizer, params, 3, 5)
        assert optimizer.state[params[1]]["step"] == 1

    def test_closure(self, backend):
        (p,), optimizer = build((3,), backend=backend)

        def closure():
            optimizer.zero_grad()
            loss = (p * p).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx((make_params((3,))[0] ** 2).sum().item())
        assert optimizer.cycle_position == 1


def test_one_norm_over_all_groups_and_dtypes(backend):
    params = [
        *make_params((3,), (4,)),
        *make_params((5,), dtype=torch.bfloat16),
        *make_params((2,), dtype=torch.float64),
    ]
    optimizer = NexusAdamW([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    set_grads(params, 0)
    total = torch.cat([p.grad.double() for p in params]).norm()
    for _ in range(4):
        optimizer.step()
    assert optimizer.metrics()["grad_norms"] == pytest.approx([float(total)] * 4)


@pytest.mark.parametrize("constant", [True, False])
def test_alignment_is_the_mean_pairwise_cosine(backend, constant):
    """With equal steps the mean over pairs of micro-batches; float64, so only the sums' order differs."""
    params, optimizer = build(dtype=torch.float64, backend=backend)
    units = []
    for seed in range(4):
        set_grads(params, seed if not constant else 0)
        units.append(torch.cat([p.grad.flatten() for p in params]))
        units[-1] /= units[-1].norm()
        optimizer.step()
    pairs = [float(units[i] @ units[j]) for i in range(4) for j in range(i)]
    assert optimizer.metrics()["alignment"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_lost_fraction(backend):
    """Half of the elements too large to notice γ: their moves are lost, and the metric says so."""
    p = nn.Parameter(torch.cat([torch.full((50,), 1e9), torch.zeros(50)]))
    optimizer = NexusAdamW([p], inner_lr=0.1, backend=backend)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.metrics()["lost_fraction"] == 0.5
    run(optimizer, [p], 2)
    optimizer.outer_step()
    assert optimizer.metrics()["lost_fraction"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_moves_like_float32(backend, dtype):
    """A walk rounded to bfloat16 would not move at all: θ must follow the float32 model's to its own rounding."""
    low, wide = make_params((64, 64), dtype=dtype), make_params((64, 64), dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    optimizers = [NexusAdamW(group, lr=1e-4, inner_lr=1e-4, backend=backend) for group in (low, wide)]
    for seed in range(8):
        set_grads(low, seed)
        wide[0].grad = low[0].grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert_same([exact(optimizers[0], low[0])], [wide[0].detach()])
    assert_same([low[0].detach()], [write_weight(wide[0].detach(), dtype)[0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_repeat_bit_for_bit(backend, dtype):
    results = []
    for _ in range(2):
        params, optimizer = build((70, 33), (40000,), dtype=dtype, backend=backend)
        run(optimizer, params, 10)
        results.append([*values(params), *[v for s in optimizer.state_dict()["state"].values() for v in s.values()]])
    assert_same(*results)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"triton", "cuda"}))  # slow here, and equal anyway
def test_convergence(backend):
    """Least squares with one data source per micro-batch: the loss falls by more than 100."""
    torch.manual_seed(0)
    data = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(4)]
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = NexusAdamW(model.parameters(), lr=1e-2, inner_lr=0.02, backend=backend)

    def loss(x, y):
        return (model(x) - y).square().mean()

    first = sum(loss(*batch).item() for batch in data)
    for _ in range(300):
        for batch in data:
            loss(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(loss(*batch).item() for batch in data) < first / 100
