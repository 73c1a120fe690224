"""What drives an optimizer: GradScaler, schedulers, hooks, clipping, tensor learning rates."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, assert_same, build, make_params, run, set_grads, values
from torch import nn

from nexus_fused import NexusAdamW
from nexus_fused.table import Table


class TestGradScaler:
    @pytest.mark.parametrize("attributes", [("grad_scale",), ("found_inf",), ("grad_scale", "found_inf")], ids="+".join)
    def test_each_attribute_works_without_the_other(self, backend, dtype, attributes):
        params, optimizer = build(dtype=dtype, backend=backend)
        plain, other = build(dtype=dtype, backend=backend)
        for seed in range(4):
            set_grads(params, seed)
            set_grads(plain, seed)
            if "grad_scale" in attributes:
                optimizer.grad_scale = torch.tensor(128.0)
                for p in params:
                    p.grad *= 128
            if "found_inf" in attributes:
                optimizer.found_inf = torch.tensor(float(seed == 1))
                if seed == 1:
                    plain[0].grad.fill_(float("nan"))
            optimizer.step()
            other.step()
        assert_same(values(params), values(plain))  # a power of two cannot matter to the walk
        ours, theirs = optimizer.metrics(), other.metrics()
        assert ours["skipped_inner_steps"] == theirs["skipped_inner_steps"] == ("found_inf" in attributes)
        for k, (n, m) in enumerate(zip(ours["grad_norms"], theirs["grad_norms"], strict=True)):
            assert n == pytest.approx(m) or (k == 1 and math.isnan(m))

    def test_the_real_one(self, backend):
        model = nn.Linear(6, 4)
        optimizer = NexusAdamW(model.parameters(), backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for i in range(9):
            x = torch.randn(3, 6)
            if i == 5:
                x[0, 0] = float("inf")
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.cycle_position == 1
        assert optimizer.metrics()["skipped_inner_steps"] == 1
        assert all(p.isfinite().all() for p in model.parameters())
        assert scaler.get_scale() != 2.0**10

    def test_unscaled_and_clipped_before(self, backend):
        model = nn.Linear(6, 4)
        optimizer = NexusAdamW(model.parameters(), backend=backend, inner_steps=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(2):
            scaler.scale(model(torch.ones(3, 6)).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.metrics()["grad_norms"] == pytest.approx([0.1, 0.1], rel=1e-4)


class TestSchedules:
    def test_inner_lr_follows_lr(self, backend):
        params, optimizer = build(backend=backend, lr=1.0, inner_lr=0.5)
        expected = 0.0
        for lr in (1.0, 0.3, 0.0):
            optimizer.param_groups[0]["lr"] = lr
            run(optimizer, params, 1)
            expected += 0.5 * max(lr, 0.1)
            assert float(optimizer.param_groups[0]["walk_length"]) == pytest.approx(expected)

    @pytest.mark.parametrize(("options", "gamma"), [({"inner_lr_follows_lr": False}, 0.5), ({"lr": 0.0}, 0.5)])
    def test_constant_inner_lr(self, backend, options, gamma):
        params, optimizer = build(backend=backend, **{"lr": 1.0, "inner_lr": 0.5, **options})
        optimizer.param_groups[0]["lr"] = 0.01
        run(optimizer, params, 1)
        assert float(optimizer.param_groups[0]["walk_length"]) == gamma

    def test_one_cycle(self, backend):
        """The peak counts, not the tiny rate at the start."""
        params, optimizer = build(backend=backend, lr=1e-3, inner_lr=0.5)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.0, total_steps=8, div_factor=5, cycle_momentum=False
        )
        for _ in range(3):
            lr = optimizer.param_groups[0]["lr"]
            before = float(optimizer.param_groups[0]["walk_length"])
            run(optimizer, params, 1)
            scheduler.step()
            walked = float(optimizer.param_groups[0]["walk_length"]) - before
            assert walked == pytest.approx(0.5 * max(lr, 0.1))

    def test_tensor_lr_belongs_to_its_group(self, backend):
        lr = torch.tensor(0.1)
        params = make_params((3,), (4,))
        optimizer = NexusAdamW(
            [{"params": params[:1]}, {"params": params[1:]}],
            lr=lr,
            inner_lr=torch.tensor([0.05]),
            backend=backend,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 1.0, lambda k: 0.5**k])
        for _ in range(4):
            run(optimizer, params, 1)
            scheduler.step()
        assert lr == pytest.approx(0.1)
        assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.1, 0.00625])

    def test_tensors_and_floats_are_the_same(self, backend):
        results = []
        for kind in (float, torch.tensor, lambda x: torch.tensor([x], dtype=torch.float64)):
            params, optimizer = build(
                backend=backend, lr=kind(0.25), inner_lr=kind(0.0625), betas=(kind(0.875), kind(0.96875))
            )
            run(optimizer, params, 9)
            results.append(values(params))
        assert_same(results[0], results[1])
        assert_same(results[0], results[2])

    def test_edits_between_steps(self, backend):
        """Also amsgrad, switched on late."""
        params, optimizer = build(backend=backend)
        run(optimizer, params, 4)
        optimizer.param_groups[0].update(weight_decay=0.3, betas=(0.5, 0.6), amsgrad=True, maximize=True)
        run(optimizer, params, 4)
        assert optimizer.state[params[0]]["max_exp_avg_sq"].any()
        maxima = optimizer.state[params[0]]["max_exp_avg_sq"].clone()
        optimizer.param_groups[0]["amsgrad"] = False
        run(optimizer, params, 4)
        assert_same([optimizer.state[params[0]]["max_exp_avg_sq"]], [maxima])


def test_hooks(backend):
    params, optimizer = build(backend=backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("state"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    run(optimizer, params, 2)
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["pre", "post", "pre", "post", "state", "loaded"]


def test_repr(backend):
    _, optimizer = build(backend=backend, inner_lr=0.05)
    text = repr(optimizer)
    assert "NexusAdamW (inner_steps: 4" in text
    assert "inner_lr: 0.05" in text
    assert "walk_length" not in text


def test_set_to_zero_instead_of_none(backend):
    """zero_grad(set_to_none=False) keeps the gradients' memory; a zero gradient is a gradient."""
    params, optimizer = build(backend=backend)
    for _ in range(4):
        for i, p in enumerate(params):
            p.grad = torch.zeros_like(p) if i else torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(optimizer.state[p]["step"] == 1 for p in params)


def test_scales_of_lr_zero_steps(backend):
    """A checkpoint helper's artificial step with zero gradients and lr = 0 changes no weight."""
    params, optimizer = build(backend=backend)
    before = values(params)
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(values(params), before)


def test_group_without_parameters(backend):
    (p,) = make_params((3,))
    optimizer = NexusAdamW([{"params": []}, {"params": [p]}], backend=backend)
    run(optimizer, [p], 5)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.state[p]["step"] == 1


def test_named_parameters(backend):
    model = nn.Linear(3, 2)
    optimizer = NexusAdamW(model.named_parameters(), backend=backend)
    run(optimizer, list(model.parameters()), 4)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_gradients_are_let_go(backend):
    """Between steps the optimizer keeps no gradient alive."""
    import gc
    import weakref

    (p,), optimizer = build((3,), backend=backend)
    for _ in range(5):
        set_grads([p], 0)
        alive = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
def test_threads(backend):
    """Whatever torch.set_num_threads says: the same bits."""
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            params, optimizer = build((200, 300), (70001,), backend=backend)
            run(optimizer, params, 9)
            results.append(values(params))
    finally:
        torch.set_num_threads(threads)
    if backend == "reference":  # torch sums a norm in an order of its own
        results = [[p.round(decimals=5) for p in params] for params in results]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("elements", [4, 300_000])
def test_a_forked_child_steps(elements):
    """It has none of the threads that its parent's kernels started: it must not wait for them."""
    code = f"""
import multiprocessing, torch
from nexus_fused import NexusAdamW
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.zeros({elements}))
p.grad = torch.ones_like(p)  # here: torch's own kernels would start threads in the child
optimizer = NexusAdamW([p])
def cycle():
    for _ in range(4):
        optimizer.step()
cycle()
child = multiprocessing.get_context("fork").Process(target=cycle)
child.start()
child.join(30)
code = child.exitcode
child.kill()
raise SystemExit("it hangs" if code is None else code)
"""
    pytest.importorskip("nexus_fused._C")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_few_elements_start_no_threads(monkeypatch):
    """On busy cores it takes longer to wake them than to do the work."""
    extension = pytest.importorskip("nexus_fused._C")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen, sq_norm = [], extension.sq_norm
    monkeypatch.setattr(extension, "sq_norm", lambda *args: seen.append(args[-1]) or sq_norm(*args))
    for size in (50_000, 50_001):
        params, optimizer = build((size,), (50_000,), backend="cpu")
        run(optimizer, params, 1)
    assert seen == [1, 3]


def test_a_group_for_each_parameter(backend, monkeypatch):
    """What layer-wise decay makes: all of them get their memory and their table at once, and walk as in one group."""
    shapes = [(1 + i % 7,) for i in range(60)]
    params, optimizer = build(*shapes, backend=backend)
    others = make_params(*shapes)
    built, extend = [], Table.extend
    monkeypatch.setattr(Table, "extend", lambda *args, **kwargs: built.append(1) or extend(*args, **kwargs))
    many = NexusAdamW([{"params": [p]} for p in others], lr=1e-2, inner_lr=0.05, backend=backend)
    assert len(built) == 1
    for group in many.param_groups:
        group.update({key: optimizer.param_groups[0][key] for key in ("lr", "inner_lr", "base_lr", "weight_decay")})
    run(optimizer, params, 9)
    run(many, others, 9)
    assert_same(values(params), values(others))


def test_a_value_written_into_a_group_is_seen(backend):
    """Rows are kept while a group holds the same objects: lists and tensors may change and stay the same object."""
    lr = torch.tensor(1e-2)
    a, optimizer = build((3,), backend=backend, lr=lr)
    b, other = build((3,), backend=backend, lr=float(lr))
    optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    other.param_groups[0]["betas"] = (0.9, 0.99)
    run(optimizer, a, 4)
    run(other, b, 4)
    optimizer.param_groups[0]["betas"][0] = 0.5
    other.param_groups[0]["betas"] = (0.5, 0.99)
    optimizer.param_groups[0]["lr"].fill_(5e-3)
    other.param_groups[0]["lr"] = float(torch.tensor(5e-3))
    run(optimizer, a, 4)
    run(other, b, 4)
    assert_same(values(a), values(b))
    optimizer.param_groups[0]["betas"][1] = 1.0
    with pytest.raises(ValueError, match=r"betas\[1\] of parameter group 0 must be"):
        run(optimizer, a, 1)


def test_first_group_all_frozen(backend):
    """It waits without state, and the others train."""
    frozen, p = make_params((3,), (4,))
    frozen.requires_grad_(False)
    optimizer = NexusAdamW([{"params": [frozen]}, {"params": [p]}], backend=backend)
    run(optimizer, [p], 5)
    assert optimizer.state[p]["step"] == 1
    assert frozen not in optimizer.state
    assert len(optimizer.metrics()["grad_norms"]) == 4


def test_all_frozen(backend):
    (p,) = make_params((3,))
    p.requires_grad_(False)
    optimizer = NexusAdamW([p], backend=backend)
    for _ in range(5):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.cycle_position == 1


def test_default_device(backend):
    """Nothing of ours lands on a default device that the parameters are not on; meta would lose it at once."""
    results = []
    gradients = [make_params((5, 3), (7,), seed=seed) for seed in range(6)]
    for device in ("cpu", "meta"):
        params, late = make_params((5, 3), (7,)), make_params((3,))
        with torch.device(device):
            optimizer = NexusAdamW(params, lr=torch.tensor(1e-2, device="cpu"), inner_lr=0.05, backend=backend)
            for micro_batch in gradients:
                for p, g in zip(params, micro_batch, strict=True):
                    p.grad = g.detach().clone()
                optimizer.step()
            optimizer.add_param_group({"params": late})
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.outer_step()
            assert optimizer.metrics()["grad_norms"]
            assert copy.deepcopy(optimizer).metrics() == optimizer.metrics()
        results.append(values(params))
    assert_same(*results)
