"""Nexus: what the walk in front of other optimizers computes, and what they, schedulers and ranks see of it."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, assert_same, assert_theta, make_params, run, set_grads, values
from inside import only_table, segments
from processes import on_ranks
from sharded import give, gradients, model, spread, whole
from torch import nn
from two_models import TwoModels
from wrapped import OPTIONS, SHAPES, build, split

from nexus_fused import Nexus, NexusAdamW

# What it computes


@pytest.mark.parametrize("inner_steps", [1, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_two_models(backend, inner_steps, normalize):
    params = make_params(*SHAPES, dtype=torch.float64)
    twin = TwoModels(make_params(*SHAPES, dtype=torch.float64), 0.05, inner_steps, normalize, **OPTIONS)
    optimizer = Nexus(
        torch.optim.AdamW(params, **OPTIONS), inner_lr=0.05, inner_steps=inner_steps, normalize_displacement=normalize,
        backend=backend,
    )  # fmt: skip
    for seed in range(3 * inner_steps):
        set_grads(params, seed)
        twin.step([p.grad.clone() for p in params])
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(params, twin.outer, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


def test_it_is_nexus_adamw_but_for_the_rounding_of_d():
    """With displacements in float32 only the last step's rounding into D, and w = θ, is new."""
    params, _, optimizer = build(displacement_dtype=torch.float32)
    others = make_params(*SHAPES)
    run(optimizer, params, 20)
    fused = NexusAdamW(others, **OPTIONS, inner_lr=0.05, inner_steps=4, displacement_dtype=torch.float32)
    run(fused, others, 20)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    for key in ("alignment", "grad_norms", "lost_fraction"):
        assert optimizer.metrics()[key] == pytest.approx(fused.metrics()[key], rel=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_backends_agree(backend, dtype):
    """Bit for bit in float32 and below, where square roots are the optimizer's own affair."""
    (params, _, optimizer), (others, _, reference) = (
        build(dtype=dtype, kind=torch.optim.SGD, optimizer={"lr": 0.1}, backend=name) for name in (backend, "reference")
    )
    for cycle in range(3):
        for step in range(4):
            for each, walk in (params, optimizer), (others, reference):
                set_grads(each, 4 * cycle + step)
                walk.step()
            for a, b in zip(params, others, strict=True):  # in float64 the norm's last unit shows
                torch.testing.assert_close(a, b, rtol=0, atol=1e-14 if dtype == torch.float64 else 0)
        ours, theirs = optimizer.metrics(), reference.metrics()
        assert ours.pop("grad_norms") == pytest.approx(theirs.pop("grad_norms"), rel=1e-12)
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_one_norm_over_all_optimizers():
    """Two optimizers on parts walk and step as one on all."""
    params = make_params(*SHAPES)
    optimizer = Nexus(*(torch.optim.AdamW(part, **OPTIONS) for part in (params[:2], params[2:])), inner_lr=0.05)
    others, _, together = build()
    run(optimizer, params, 11)
    run(together, others, 11)
    assert_same(values(params), values(others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_optimizer(dtype):
    """At the end of a cycle w = θ, p.grad is D/Γ in the parameter's dtype and in memory of its own; then it is gone."""
    seen = []

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(
                [
                    (p.detach().clone(), p.grad.clone(), p.grad.data_ptr())
                    for g in self.param_groups
                    for p in g["params"]
                ]
            )

    params, _, optimizer = build(dtype=dtype, kind=Look, optimizer={"lr": 0.1})
    theta = values(params)
    for seed in range(4):
        set_grads(params, seed)
        optimizer.step()
    ((_, *_),) = (seen,)
    buffers = {segment.buffer("displacement").data_ptr() for segment in segments(optimizer) if segment.numel}
    total = sum(gradient.double().square().sum() for _, gradient, _ in seen[0]).sqrt()
    assert 0.3 < total < 0.7, "four unit gradients at random: about a half"
    for (weight, gradient, address), start, param in zip(seen[0], theta, params, strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == param.shape
        assert address not in buffers
        assert param.grad is None
        if dtype in (torch.bfloat16, torch.float16):
            assert (weight == start).all()
        else:
            assert_theta([weight], [start], longest=0.2)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize(maximize):
    """The walk goes uphill, and so does the optimizer, whose gradient is turned round again."""
    params, _, optimizer = build(kind=torch.optim.SGD, optimizer={"lr": 0.1, "maximize": maximize})
    before = values(params)
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, start in zip(params, before, strict=True):
            assert ((p > start) if maximize else (p < start)).all()


class TestCorners:
    def test_what_had_no_gradient_is_not_stepped(self):
        params, inner, optimizer = build()
        before = values(params)
        for seed in range(4):
            set_grads(params, seed)
            params[0].grad = None
            if seed != 2:
                params[1].grad = None
            optimizer.step()
        assert_same([params[0]], before[:1])
        assert params[0] not in inner.state
        assert inner.state[params[1]]["step"] == 1

    @pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
    def test_a_cycle_of_skipped_steps_steps_nothing(self, value):
        params, inner, optimizer = build()
        run(optimizer, params, 4)
        before, steps = values(params), [inner.state[p]["step"].item() for p in params]
        for _ in range(4):
            for p in params:
                p.grad = torch.full_like(p, value)
            optimizer.step()
        assert_same(values(params), before)
        assert [inner.state[p]["step"].item() for p in params] == steps
        assert optimizer.metrics()["skipped_outer_steps"] == 1

    def test_gradients_in_a_skipped_step_only(self):
        """G = 0 for it, as for NexusAdamW: moments decay, and weights."""
        params, inner, optimizer = build()
        run(optimizer, params, 4)
        for seed in range(4):
            set_grads(params, seed)
            if seed == 1:
                params[0].grad = torch.full_like(params[0], torch.nan)
            else:
                params[0].grad = None
            optimizer.step()
        assert inner.state[params[0]]["step"] == 2

    def test_partial_cycle(self):
        params, inner, optimizer = build()
        run(optimizer, params, 2)
        optimizer.outer_step()
        assert optimizer.at_boundary
        assert inner.state[params[0]]["step"] == 1
        optimizer.outer_step()
        assert inner.state[params[0]]["step"] == 1

    def test_groups_walk_apart(self):
        """A group's own inner_lr, and its own Γ."""
        params = make_params((4,), (4,))
        inner = torch.optim.SGD([{"params": params[:1], "inner_lr": 0.2}, {"params": params[1:]}], lr=0.0)
        optimizer = Nexus(inner, inner_lr=0.1)
        before = values(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        moves = [(start - p).mean().item() for start, p in zip(before, params, strict=True)]
        assert moves == pytest.approx([0.2 / 8**0.5, 0.1 / 8**0.5], rel=2**-9), "D is bfloat16"

    def test_gradients_of_another_dtype(self):
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this PyTorch has no p.grad_dtype")
        params, _, optimizer = build()
        for p in params:
            p.grad_dtype = torch.bfloat16
        for seed in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
            optimizer.step()
        assert [p.grad_dtype for p in params] == [torch.bfloat16] * len(params)
        assert [p.grad for p in params] == [None] * len(params)

    def test_layouts(self):
        """Strides, gaps and tied parameters."""
        weight = nn.Parameter(torch.randn(6, 4).t())
        gaps = nn.Parameter(torch.randn(8, 6)[::2, ::3])
        twice = nn.Parameter(torch.randn(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: of duplicates
            inner = torch.optim.SGD([weight, gaps, twice, twice], lr=0.0)
        optimizer = Nexus(inner, inner_lr=0.1)
        before = values([weight, gaps, twice])
        for step in range(8):
            set_grads([weight, gaps, twice], step)
            optimizer.step()
        assert_theta([weight, gaps, twice], before, longest=0.4)

    def test_an_error_of_an_optimizer(self):
        """The cycle has ended, and parameters hold θ."""

        class Fails(torch.optim.SGD):
            def step(self, closure=None):
                raise ArithmeticError("no")

        params, _, optimizer = build(kind=Fails, optimizer={"lr": 0.1})
        before = values(params)
        run(optimizer, params, 3)
        set_grads(params, 3)
        with pytest.raises(ArithmeticError):
            optimizer.step()
        assert optimizer.at_boundary
        assert_theta(params, before, longest=0.2)
        assert [p.grad for p in params] == [None] * len(params)

    def test_no_memory_for_the_gradients(self, monkeypatch):
        """D is lost then, θ is not; and the next cycle is one."""
        params, _, optimizer = build(kind=torch.optim.SGD, optimizer={"lr": 0.0})
        before = values(params)
        run(optimizer, params, 3)
        set_grads(params, 3)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_strided", lambda *_, **__: {}["no memory"])
            with pytest.raises(KeyError, match="no memory"):
                optimizer.step()
        assert optimizer.at_boundary
        assert_theta(params, before, longest=0.2)
        before = values(params)
        run(optimizer, params, 4, first_seed=4)
        assert_theta(params, before, longest=0.2)

    def test_one_inner_step_is_not_rounded(self):
        """G is g/‖g‖ in float32."""
        params, _, optimizer = build(kind=torch.optim.SGD, optimizer={"lr": 1.0}, inner_steps=1)
        before = values(params)
        set_grads(params, 0)
        gradients = [p.grad.clone() for p in params]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        optimizer.step()
        for p, start, g in zip(params, before, gradients, strict=True):
            torch.testing.assert_close(start - p, g / norm, rtol=1e-5, atol=1e-6)


# Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestRemainder:
    def make(self, dtype, inner_lr, n=200_000, low=0.01, zeros=1.0, **walk):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter((torch.rand(n, generator=generator) * low + low).to(dtype))
        param.data[: n // 8] *= -1
        param.data[-300:] = 2.0 ** -torch.arange(300).remainder(14)  # whose neighbours below are half as far
        param.data[-400:-300] = zeros
        return param, Nexus(torch.optim.SGD([param], lr=0.0), inner_lr=inner_lr, inner_steps=3, **walk)

    def walk(self, param, optimizer, seed=0):
        """One step along a gradient of ±1, times another number each time."""
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.where(torch.rand(len(param), generator=generator) < 0.5, -1.0, 1.0) * (1 + seed / 8)
        param.grad = gradient.to(param.dtype)
        optimizer.step()
        return gradient

    @pytest.mark.parametrize("share", [1e-3, 1e-1])
    def test_the_model_sees_the_walk_on_average(self, dtype, share, backend):
        """Steps of a small share of the parameters' spacing, which rounding to nearest would hide altogether."""
        spacing = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-17}[dtype]  # of numbers from 2^-7 to 2^-6
        param, optimizer = self.make(dtype, share * spacing * 200_000**0.5, low=2**-7, backend=backend)
        before = param.detach().float()
        gradient = self.walk(param, optimizer)
        shown = ((before - param.detach().float()) * gradient)[:-400].double()
        noise = spacing * (share / len(shown)) ** 0.5
        assert shown.mean().item() == pytest.approx(share * spacing, abs=4 * noise)

    def test_it_does_not_change_the_parameter(self, dtype):
        param, optimizer = self.make(dtype, 1e-30)
        before = param.detach().clone()
        for seed in range(9):
            self.walk(param, optimizer, seed)
            assert_same([param], [before])

    def test_the_end_is_the_start(self, dtype):
        param, optimizer = self.make(dtype, 0.05, zeros=0.0)
        before = param.detach().clone()
        for seed in range(3):
            self.walk(param, optimizer, seed)
        assert_same([param], [before])
        assert optimizer.at_boundary

    def test_it_is_another_one_in_each_cycle_and_the_same_in_each_run(self, dtype):
        found = []
        for _ in range(2):
            param, optimizer = self.make(dtype, 1e-9)
            for seed in range(4):
                self.walk(param, optimizer, seed)
                if seed in (0, 3):
                    found.append(only_table(optimizer).segments[0].buffer("remainder").view(torch.int16).clone())
        first, second, *again = found
        assert (first != second).float().mean() > 0.99
        assert_same([first, second], again)
        signed = first if dtype == torch.bfloat16 else torch.where(first < 0, -(first & 0x7FFF), first)
        counts = torch.histc(signed[:65521].float(), bins=16, min=-32768, max=32767)
        assert ((counts - 65521 / 16).abs() < 5 * (65521 / 16) ** 0.5).all(), "each part of the range as often"

    def test_metrics_count_what_the_model_sees_and_warn_once(self, dtype):
        param, optimizer = self.make(dtype, 0.05)
        for seed in range(3):
            self.walk(param, optimizer, seed)
        assert optimizer.metrics()["lost_fraction"] < 0.9
        param, optimizer = self.make(dtype, 1e-12)
        for seed in range(3):
            self.walk(param, optimizer, seed)
        with pytest.warns(UserWarning, match=r"saw \d+ of the walk's \d+ moves.*raise inner_lr"):
            assert optimizer.metrics()["lost_fraction"] > 0.99
        optimizer.metrics()  # once


# Memory


@pytest.mark.parametrize(("dtype", "own"), [(torch.float32, 2), (torch.bfloat16, 4)], ids=str)
def test_own_state(dtype, own):
    params, inner, optimizer = build(dtype=dtype)

    def size(state):
        return sum(
            tensor.nbytes
            for entry in state["state"].values()
            for tensor in entry.values()
            if isinstance(tensor, torch.Tensor)
        )

    elements = sum(p.numel() for p in params)
    run(optimizer, params, 5)
    assert size(optimizer.state_dict()) - size(inner.state_dict()) == own * elements
    run(optimizer, params, 3)
    assert size(optimizer.state_dict()) == size(inner.state_dict())


def test_the_peak_does_not_grow():
    """D/Γ is made when the last micro-batch's gradients are gone, and is gone after the optimizers' steps."""
    known = []

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            assert [gradient() for gradient in known] == [None] * len(params)
            known[:] = [weakref.ref(p.grad) for p in params]
            super().step()

    params, _, optimizer = build(kind=Look, optimizer={"lr": 0.1})
    for seed in range(8):
        set_grads(params, seed)
        if seed % 4 == 3:
            known[:] = [weakref.ref(p.grad) for p in params]
        optimizer.step()
    assert [gradient() for gradient in known] == [None] * len(params)


# Groups, schedulers, hooks


def test_groups_are_the_optimizers_own():
    _, (sgd, adamw), optimizer = split()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [id(group) for group in optimizer.param_groups] == [id(sgd.param_groups[0]), id(adamw.param_groups[0])]
    optimizer.param_groups[1]["lr"] = 0.5
    assert adamw.param_groups[0]["lr"] == 0.5
    assert "inner_lr: 0.05" in repr(optimizer)


@pytest.mark.parametrize("around", ["Nexus", "the optimizers"])
def test_schedulers(around, recwarn):
    """γ follows the learning rate, whoever schedules it; nothing warns of an order of calls."""
    params, inner, optimizer = split()
    targets = [optimizer] if around == "Nexus" else inner
    schedulers = [torch.optim.lr_scheduler.LambdaLR(target, lambda step: 1 - step / 16) for target in targets]
    for seed in range(8):
        set_grads(params, seed)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])
    set_grads(params, 8)
    optimizer.step()
    table = only_table(optimizer)
    assert optimizer._walk.cycles[table.device, table.spread].hyper[:, 0].tolist() == pytest.approx([0.025, 0.025])
    assert not [str(warning.message) for warning in recwarn.list]


def test_one_cycle_lr():
    params = make_params((4, 4))
    optimizer = Nexus(torch.optim.AdamW(params, lr=1e-3))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    for seed in range(12):
        set_grads(params, seed)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["max_lr"] == 0.1
    assert optimizer.param_groups[0]["betas"][0] != 0.9, "the scheduler found that it has momentum"


def test_hooks_and_profile():
    params, _, optimizer = build()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    run(optimizer, params, 1)
    assert calls == ["before", "after"]
    assert optimizer.state_dict()["more"] == 1


def test_grad_scaler():
    """An overflow skips an inner step; the wrapped optimizers know nothing of scales."""
    model = nn.Linear(4, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = Nexus(inner, inner_lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        scaler.scale(model(torch.ones(3, 4) * (torch.inf if step == 1 else 1)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.metrics()["skipped_inner_steps"] == 1
    assert optimizer.metrics()["grad_norms"] == pytest.approx([3 * 10**0.5] * 4), "3 for each of 8 weights and 2 biases"


def test_add_param_group_names_the_optimizers():
    _, _, optimizer = split()
    with pytest.raises(RuntimeError, match=r"0: SGD, 1: AdamW"):
        optimizer.add_param_group({"params": make_params((2,))})


class TestGroupsOfTheOptimizers:
    def test_added_at_a_boundary(self):
        """In the middle, where numbers of groups shift; an unfrozen parameter too."""
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 4)
        late = make_params((6,), seed=1)
        sgd.add_param_group({"params": late, "lr": 0.3})
        params += late
        before = values(late)
        run(optimizer, params, 4, first_seed=4)
        assert not torch.equal(late[0], before[0])
        group = optimizer.param_groups[1]
        assert (group["base_lr"], group["inner_lr"], group["nexus_optimizer"]) == (0.3, 0.05, 0)
        assert optimizer.metrics()["skipped_outer_steps"] == 0

    def test_removed_at_a_boundary(self):
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 4)
        sgd.param_groups[0]["params"] = params[:1]
        before = params[1].detach().clone()
        run(optimizer, params, 4, first_seed=4)
        assert_same([params[1]], [before])

    def test_bad_parameters_at_a_boundary(self):
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 4)
        before = values(params)
        sgd.add_param_group({"params": params[2:3]})
        set_grads(params, 4)
        with pytest.raises(ValueError, match="parameter 0 of group 2 appears in more than one"):
            optimizer.step()
        assert_same(values(params), before)

    @pytest.mark.parametrize("at", [4, 5])
    def test_unfrozen(self, at):
        """As if it had never been frozen, but without gradients."""
        results = []
        for freeze in (True, False):
            params = make_params(*SHAPES)
            params[0].requires_grad_(not freeze)
            inner = torch.optim.AdamW(params, **OPTIONS)
            optimizer = Nexus(inner, inner_lr=0.05)
            run(optimizer, params[1:], at)
            params[0].requires_grad_(True)
            run(optimizer, params, 12 - at, first_seed=at)
            assert len(segments(optimizer)) == len(params)
            results.append((values(params), optimizer.metrics()["grad_norms"]))
        assert_same(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]


# θ in mid-cycle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outer_weights(dtype):
    params, _, optimizer = build(dtype=dtype)
    theta = values(params)
    run(optimizer, params, 2)
    walk = values(params)
    with optimizer.outer_weights():
        if dtype == torch.float32:
            assert_theta(params, theta, longest=0.2)
        else:
            assert_same(values(params), theta)
        assert optimizer.state_dict()["param_groups"][0]["cycle_position"] == 0
        with pytest.raises(RuntimeError, match=r"outer_weights"):
            optimizer.step()
    assert_same(values(params), walk)
    optimizer.eval()
    optimizer.eval()
    optimizer.train()
    assert_same(values(params), walk)


def test_modes_of_the_optimizers():
    """eval() and train() reach optimizers that have them, θ being there; inside outer_weights() once."""

    class Modes(torch.optim.SGD):
        def eval(self):
            calls.append(("eval", self.param_groups[0]["params"][0].detach().clone()))

        def train(self):
            calls.append(("train", self.param_groups[0]["params"][0].detach().clone()))

    calls = []
    params, _, optimizer = build(kind=Modes, optimizer={"lr": 0.1})
    optimizer.train()
    theta = params[0].detach().clone()
    run(optimizer, params, 2)
    with optimizer.outer_weights(), optimizer.outer_weights():
        optimizer.eval()
    assert [name for name, _ in calls] == ["train", "eval", "train"]
    assert_theta([value for _, value in calls], [theta] * 3, longest=0.2)


# Ranks


def local_walks(dtype, fewer):
    params = make_params(*SHAPES, dtype=dtype)
    inner, group = torch.optim.AdamW(params, **{**OPTIONS, "lr": 0.1}), dist.group.WORLD
    optimizer = Nexus(inner, inner_lr=0.05, displacement_group=group)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for seed in range(6 if fewer and dist.get_rank() else 8):
        set_grads(params, 100 * dist.get_rank() + seed)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    optimizer.outer_step()
    assert inner.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    assert inner.state[params[0]]["step"] == 2
    with pytest.raises(RuntimeError, match="process group"):
        copy.deepcopy(optimizer)
    return values(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fewer", [False, True])
def test_local_walks(dtype, fewer):
    """Ranks that walk on their own end with the same weights, bit for bit, also where one has fewer micro-batches, and
    its schedule stands still."""
    left, right = on_ranks(2, local_walks, dtype, fewer)
    assert_same(left, right)
    assert not torch.equal(left[3], make_params(*SHAPES, dtype=dtype)[3])


def walks_without_lr():
    """What an optimizer whose groups say None sees as its learning rate."""
    seen = []

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])

    params = make_params((4,))
    inner = Look(params, lr=0.1)
    inner.param_groups[0]["lr"] = None
    optimizer = Nexus(inner, displacement_group=dist.group.WORLD)
    run(optimizer, params, 4)
    return seen


def test_local_walks_without_a_learning_rate():
    """There is nothing to average."""
    assert on_ranks(2, walks_without_lr) == [[None], [None]]


def sharded():
    module = spread("fsdp", model())
    params = list(module.parameters())
    optimizer = Nexus(torch.optim.AdamW(params, lr=0.01), inner_lr=0.05)
    twin = list(model().parameters())
    expected = Nexus(torch.optim.AdamW(twin, lr=0.01), inner_lr=0.05)
    for step in range(6):
        give(params, gradients(twin, step))
        for p, g in zip(twin, gradients(twin, step), strict=True):
            p.grad = g
        optimizer.step()
        expected.step()
    state = optimizer.state_dict()["state"][0]
    assert type(state["displacement"]) is type(params[0])
    return [whole(p) for p in params], values(twin)


def test_fsdp():
    """Parameters, gradients for the optimizer and displacements are DTensors."""
    for ours, expected in on_ranks(2, sharded):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
