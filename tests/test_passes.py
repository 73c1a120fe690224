"""inner_steps=None: each backward pass is an inner step, taken at its end, and step() is the outer step."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings

import inside
import pytest
import torch
from conftest import assert_same, assert_theta, values
from torch import nn
from torch.utils.checkpoint import checkpoint
from two_models import TwoModels

from nexus_fused import Nexus, NexusAdamW

OPTIONS = {"lr": 1e-2, "inner_lr": 0.05}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(i, dtype=torch.float32):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).to(dtype)


def loss_of(model, i):
    dtype = next(model.parameters()).dtype
    return (model(batch(i, dtype)).float() if dtype.itemsize < 4 else model(batch(i, dtype))).square().mean()


def train(model, optimizer, cycles=(4, 4, 4), first=0, scale=1.0):
    """A loop that accumulates: one step() after several backward passes."""
    for passes in cycles:
        optimizer.zero_grad()
        for _ in range(passes):
            (loss_of(model, first) * scale).backward()
            first += 1
        optimizer.step()
    return values(model.parameters())


def train_with_number(model, optimizer, cycles=(4, 4, 4)):
    """The same cycles with a number of inner steps: step() after each backward pass, outer_step() after short ones."""
    first = 0
    for passes in cycles:
        for _ in range(passes):
            loss_of(model, first).backward()
            optimizer.step()
            optimizer.zero_grad()
            first += 1
        optimizer.outer_step()
    return values(model.parameters())


@pytest.fixture
def trained():
    """Weights of the plain loop."""
    model = small_model()
    return train(model, NexusAdamW(model.parameters(), **OPTIONS, inner_steps=None))


def open_optimizer(model, **options):
    return NexusAdamW(model.parameters(), **{**OPTIONS, "inner_steps": None, **options})


# What is computed


@pytest.mark.interpreted
def test_the_cycle_of_two_models(backend):
    model = small_model(torch.float64)
    copied = copy.deepcopy(model)
    judge = TwoModels(list(copied.parameters()), OPTIONS["inner_lr"], 99, lr=OPTIONS["lr"], weight_decay=1e-2)
    cycles, first = (4, 1, 3, 6), 0
    for passes in cycles:
        for _ in range(passes):
            walking = small_model(torch.float64)
            with torch.no_grad():
                for p, w in zip(walking.parameters(), judge.inner, strict=True):
                    p.copy_(w)
            judge.step(torch.autograd.grad(loss_of(walking, first), list(walking.parameters())))
            first += 1
        judge.finish()
    weights = train(model, open_optimizer(model, backend=backend), cycles)
    torch.testing.assert_close(weights, values(copied.parameters()), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["NexusAdamW", "Nexus"])
def test_the_cycles_of_a_number_of_inner_steps(kind, dtype):
    """With D in float32 to rounding: the last inner step is rounded into D and w here, and fused with AdamW there."""
    cycles, ends = (4, 2, 4, 4), []
    for steps in (None, 4):
        model = small_model(dtype)
        if kind == "Nexus":
            adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
            optimizer = Nexus(adamw, inner_lr=0.05, inner_steps=steps, displacement_dtype=torch.float32)
        else:
            optimizer = open_optimizer(model, inner_steps=steps, displacement_dtype=torch.float32)
        ends.append((train if steps is None else train_with_number)(model, optimizer, cycles))
        assert optimizer.at_boundary
        ends[-1].append(torch.tensor(optimizer.metrics()["grad_norms"]))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2**-7)
    torch.testing.assert_close(*ends, rtol=tolerance, atol=tolerance / 10)


def test_what_a_loop_does_with_gradients_changes_nothing(trained):
    """Scaled losses, clipping, zeroing in any way and noise: an inner step is taken before."""
    for how in ("scaled", "clipped", "zeroed in place", "by the model", "noise"):
        model = small_model()
        optimizer = open_optimizer(model)
        step = optimizer.step

        def clipped(how=how, model=model, optimizer=optimizer, step=step):
            if how == "clipped":
                assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == 0
            if how == "noise":
                for p in model.parameters():
                    p.grad = torch.randn_like(p) if p.grad is not None else None
            step()
            if how == "zeroed in place":
                optimizer.zero_grad(set_to_none=False)
            if how == "by the model":
                model.zero_grad()

        optimizer.step = clipped
        assert_same(train(model, optimizer, scale=0.25 if how == "scaled" else 1.0), trained)


def test_gradients_are_gone_but_for_one_of_zero():
    model = small_model()
    optimizer = open_optimizer(model)
    loss_of(model, 0).backward()
    assert [p.grad is None for p in model.parameters()] == [True] * 5 + [False]
    assert model[4].bias.grad.tolist() == [0]
    assert (optimizer.cycle_position, optimizer.at_boundary, optimizer.inner_steps) == (1, False, None)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.at_boundary


def test_a_step_without_backward_passes_does_nothing(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    before = values(model.parameters())
    optimizer.step()
    optimizer.outer_step()
    optimizer.discard_cycle()
    assert_same(values(model.parameters()), before)
    assert all(entry["step"] == 0 for entry in optimizer.state.values())
    assert optimizer.metrics()["skipped_outer_steps"] == 0
    assert_same(train(model, optimizer), trained)


def test_gamma_is_that_of_the_pass_and_lr_that_of_the_step():
    model, other = small_model(), small_model()
    optimizer, number = open_optimizer(model), open_optimizer(other, inner_steps=2, displacement_dtype=torch.float32)
    for lr, i in ((1e-2, 0), (5e-3, 1)):
        optimizer.param_groups[0]["lr"] = number.param_groups[0]["lr"] = lr
        loss_of(model, i).backward()
        loss_of(other, i).backward()
        number.step()
        number.zero_grad()
    optimizer.step()
    torch.testing.assert_close(values(model.parameters()), values(other.parameters()), rtol=1e-3, atol=1e-5)


# Where a pass ends


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the inner one
@pytest.mark.parametrize("hook", ["compiled", "Python's"])
@pytest.mark.parametrize("how", ["reentrant", "nested", "all of it", "not reentrant"])
def test_checkpoints(how, hook, trained, monkeypatch):
    if hook == "Python's":
        monkeypatch.setattr("nexus_fused.passes._hook_of", inside.python_hook)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            first, second, end = self.inner[:2], self.inner[2:4], self.inner[4:]
            x.requires_grad_(True)
            if how == "nested":

                def both(x):
                    return checkpoint(second, checkpoint(first, x, use_reentrant=True), use_reentrant=True)

                return end(checkpoint(both, x, use_reentrant=True))
            if how == "all of it":  # nothing of the outer pass reaches a parameter
                return checkpoint(self.inner, x, use_reentrant=True)
            reentrant = how == "reentrant"
            return end(checkpoint(second, checkpoint(first, x, use_reentrant=reentrant), use_reentrant=reentrant))

    model = Checkpointed()
    assert_same(train(model, open_optimizer(model)), trained)


def test_autograd_grad_is_no_pass(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    hooked = []
    for i in range(3):
        optimizer.zero_grad()
        for k in range(4):
            torch.autograd.grad(loss_of(model, 99), list(model.parameters()))
            loss_of(model, 4 * i + k).backward()
            shown = model[4].bias.grad
            torch.autograd.grad(loss_of(model, 98), list(model.parameters()))
            hooked.append(model[4].bias.grad is shown)
        assert optimizer.cycle_position == 4
        optimizer.step()
    assert all(hooked)
    assert_same(values(model.parameters()), trained)


def test_gradient_penalty():
    """A graph of gradients: one pass, of the whole loss."""
    ends = []
    for steps in (None, 4):
        model = small_model(torch.float64)
        optimizer = open_optimizer(model, inner_steps=steps)
        for i in range(4):
            x = batch(i, torch.float64).requires_grad_(True)
            out = model(x).square().mean()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            (out + slope.square().sum()).backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
        if steps is None:
            optimizer.step()
        ends.append(values(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["NexusAdamW", "Nexus"])
def test_passes_that_reach_some_parameters(kind):
    """Two heads in turn: the other one's parameters are not moved in that inner step, and those that no pass of the
    cycle reached are not stepped, though one of them shows a gradient of 0."""
    ends = []
    for steps in (None, 4):
        model, unused = small_model(torch.float64), nn.Parameter(torch.ones((), dtype=torch.float64))
        params = [*model.parameters(), unused]
        if kind == "Nexus":
            optimizer = Nexus(torch.optim.AdamW(params, lr=1e-2), inner_lr=0.05, inner_steps=steps)
        else:
            optimizer = NexusAdamW(params, **OPTIONS, inner_steps=steps)
        for i in range(8):
            x = batch(i, torch.float64)
            (model[4:] if i % 2 else model)(x[:, :5] if i % 2 else x).square().mean().backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            elif i % 4 == 3:
                optimizer.step()
        assert unused == 1
        ends.append(values(params))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_and_those_that_are_thawed():
    """Also where a pass reaches nothing but what was frozen when the optimizer was built."""
    ends = []
    for steps in (None, 2):
        model = small_model(torch.float64)
        head = list(model[4].parameters())
        for p in head:
            p.requires_grad_(False)
        optimizer = open_optimizer(model, inner_steps=steps)
        assert all(not p.requires_grad for p in head)
        for i in range(6):
            if i == 2:
                for p in model.parameters():
                    p.requires_grad_(any(p is q for q in head))
            loss_of(model, i).backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            elif i % 2:
                optimizer.step()
        ends.append(values(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_parameters_that_are_not_there_yet_or_never_train():
    with torch.inference_mode():
        inferred = nn.Parameter(torch.ones(3), requires_grad=False)
    numbers = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = NexusAdamW([*model.parameters(), inferred, numbers], **OPTIONS, inner_steps=None)
    for i in range(3):
        model(batch(i)).square().mean().backward()
    assert optimizer.cycle_position == 3
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in model.parameters())


def test_a_group_added_in_mid_cycle():
    ends = []
    for steps in (None, 4):
        model, late = small_model(torch.float64), nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = open_optimizer(model, inner_steps=steps)
        for i in range(8):
            if i == 2:
                optimizer.add_param_group({"params": [late], "lr": 1e-3})
            (loss_of(model, i) + (late - i).square().sum()).backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            elif i % 4 == 3:
                optimizer.step()
        ends.append([*values(model.parameters()), late.detach()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_several_losses():
    """Their sum is one pass; one after the other on the same weights they need the context, which adds them up."""
    ends = []
    for how in ("sum", "context"):
        model = small_model()
        optimizer = open_optimizer(model)
        for i in range(4):
            if how == "sum":
                (loss_of(model, i) + loss_of(model, i + 50)).backward()
            else:
                a, b = loss_of(model, i), loss_of(model, i + 50)
                with optimizer.one_micro_batch():
                    a.backward()
                    assert all(p.grad is not None for p in model.parameters())
                    b.backward()
            assert optimizer.cycle_position == i + 1
        optimizer.step()
        ends.append(values(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:gradients were zeroed")
@pytest.mark.parametrize("how", ["retain_graph", "two forwards"])
def test_a_pass_over_older_weights_is_autograds_own_error(how):
    model = small_model()
    optimizer = open_optimizer(model)
    first = loss_of(model, 0)
    second = first if how == "retain_graph" else loss_of(model, 1)
    first.backward(retain_graph=how == "retain_graph")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
    model.zero_grad()
    optimizer.step()  # of the first pass
    assert optimizer.at_boundary


def test_closures(trained):
    """As Lightning runs forward and backward passes."""
    model = small_model()
    optimizer = open_optimizer(model)
    for i in range(3):
        optimizer.zero_grad()
        for k in range(3):
            loss_of(model, 4 * i + k).backward()

        def closure(i=i):
            loss = loss_of(model, 4 * i + 3)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        assert optimizer.at_boundary
    assert_same(values(model.parameters()), trained)


@pytest.mark.filterwarnings("ignore")  # Dynamo has its own
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["model", "pass"])
def test_compiled(what, compiler):
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model = small_model(torch.float64)
        optimizer = open_optimizer(model)

        def run_pass(i, model=model):
            loss_of(model, i).backward()

        if compiled and what == "model":
            model = torch.compile(model, backend=compiler)
        if compiled and what == "pass":
            run_pass = torch.compile(run_pass, backend=compiler)
        for i in range(8):
            (loss_of(model, i).backward() if what == "model" else run_pass(i))
            assert optimizer.cycle_position == i % 4 + 1
            if i % 4 == 3:
                optimizer.step()
        ends.append(values(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd_is_refused():
    """It hides where a pass ends: never accumulation in place of inner steps."""
    torch._dynamo.reset()
    model = small_model()
    before = values(model.parameters())
    optimizer = open_optimizer(model)

    def train_step():
        torch.compile(lambda: loss_of(model, 0).backward(), backend="eager")()
        optimizer.step()

    with torch._dynamo.config.patch(compiled_autograd=True), pytest.raises(RuntimeError) as raised:
        train_step()
    assert "compiled autograd" in str(raised.value)
    assert_same(values(model.parameters()), before)
    optimizer.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True), optimizer.one_micro_batch():
        torch.compile(lambda: loss_of(model, 0).backward(), backend="eager")()
    assert optimizer.cycle_position == 1
    torch._dynamo.reset()


def test_passes_in_threads(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    for i in range(12):
        thread = threading.Thread(target=lambda i=i: loss_of(model, i).backward())
        thread.start()
        thread.join()
        if i % 4 == 3:
            optimizer.step()
    assert_same(values(model.parameters()), trained)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("in the middle")


@pytest.mark.parametrize("then", ["zero_grad", "zeros", "the model's", "step", "another pass"])
@pytest.mark.parametrize("how", ["plain", "behind a checkpoint"])
def test_an_error_in_the_middle_of_a_pass(trained, how, then):
    """Nothing is merged, nothing is lost in silence; also where traceback and graph live on."""
    model = small_model()
    optimizer = open_optimizer(model)
    before = values(model.parameters())
    if how == "plain":
        loss = model[2:](_Fails.apply(model[:2](batch(9)))).square().mean()
    else:  # the inner pass ends, the outer one fails
        first = model[:2](batch(9))
        fails = _Fails.apply(first).mean()
        loss = checkpoint(model[2:], first, use_reentrant=True).square().mean() + fails
    with pytest.raises(ValueError, match="in the middle") as kept:
        loss.backward()
    assert optimizer.at_boundary
    assert model[4].weight.grad is not None
    if then == "step":
        with pytest.raises(RuntimeError, match=r"parameter 2 of group 0 .* no inner step has taken.*zero_grad\(\)"):
            optimizer.step()
        assert_same(values(model.parameters()), before)
    if then == "another pass":
        for _ in range(2):
            with pytest.raises(RuntimeError, match="its gradients are still there: this pass has added its own"):
                loss_of(model, 8).backward()
        assert_same(values(model.parameters()), before)
    if then == "the model's":
        model.zero_grad()
    else:
        optimizer.zero_grad(set_to_none=then != "zeros")
    assert_same(train(model, optimizer), trained)
    assert kept is not None
    assert loss is not None


def test_a_refused_pass_is_not_merged_with_the_next(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"a backward pass after eval\(\)"):
        loss_of(model, 9).backward()
    optimizer.train()
    with pytest.raises(RuntimeError, match="its gradients are still there"):
        loss_of(model, 0).backward()
    optimizer.zero_grad()
    assert_same(train(model, optimizer), trained)


def test_autocast_around_the_loop():
    """It keeps copies of weights in low precision, which have moved."""
    losses = []
    for around in (False, True):
        model = small_model()
        optimizer = open_optimizer(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for i in range(8):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model, i)
                loss.backward()
                losses.append(loss.item())
                if i % 4 == 3:
                    optimizer.step()
    assert losses[:8] == losses[8:]


def test_an_error_of_ours_leaves_everything_as_it_was(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    before = values(model.parameters())
    optimizer.param_groups[0]["inner_lr"] = -1
    with pytest.raises(ValueError, match="inner_lr of parameter group 0") as kept:
        loss_of(model, 0).backward()
    assert_same(values(model.parameters()), before)
    optimizer.param_groups[0]["inner_lr"] = 0.05
    optimizer.zero_grad()
    assert_same(train(model, optimizer), trained)
    assert kept is not None


# torch.amp.GradScaler


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("kind", ["NexusAdamW", "Nexus"])
def test_grad_scaler(kind, unscales):
    """An overflow in one micro-batch: its inner step is skipped, the others and the outer step are taken, and the
    scaler backs off."""
    ends = []
    for scaled in (True, False):
        model = small_model()
        if kind == "Nexus":
            optimizer = Nexus(torch.optim.AdamW(model.parameters(), lr=1e-2), inner_lr=0.05, inner_steps=None)
        else:
            optimizer = open_optimizer(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        scales = []
        for cycle in range(3):
            optimizer.zero_grad()
            for k in range(4):
                overflows = cycle == 1 and k == 1
                if overflows and not scaled:
                    continue
                loss = loss_of(model, 4 * cycle + k) / 4
                scaler.scale(loss * torch.inf if overflows else loss).backward()
                shown = model[4].bias.grad
                assert shown.isinf().all() if cycle == 1 and k >= 1 and scaled else not shown.any()
            if unscales:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            if scaled and not unscales:
                norms = optimizer.metrics()["grad_norms"]
        if scaled:
            assert scales == [8, 4, 4]
            assert optimizer.metrics()["skipped_inner_steps"] == 1
        elif not unscales:
            torch.testing.assert_close(norms, optimizer.metrics()["grad_norms"], rtol=1e-5, atol=0)
        assert optimizer.metrics()["skipped_outer_steps"] == 0
        ends.append(values(model.parameters()))
    assert_same(*ends)


@pytest.mark.parametrize("last", ["thrown away", "discarded", "a group"])
def test_grad_scaler_finds_a_gradient_whatever_came_last(last):
    model = small_model()
    optimizer, scaler = open_optimizer(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflows in (True, False):
        loss = scaler.scale(loss_of(model, 0))
        (loss * torch.inf if overflows else loss).backward()
    if last == "thrown away":
        with optimizer.one_micro_batch():
            scaler.scale(loss_of(model, 1)).backward()
            optimizer.zero_grad()
    elif last == "discarded":
        optimizer.discard_cycle()
    else:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (8 if last == "discarded" else 4)


# Gradients that are no micro-batch


def test_gradients_that_were_thrown_away(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    for how in (True, False):
        with optimizer.one_micro_batch():
            loss_of(model, 99).backward()
            optimizer.zero_grad(set_to_none=how)
    with optimizer.one_micro_batch(), optimizer.one_micro_batch():
        pass
    assert optimizer.at_boundary
    assert all(p.grad is None for p in model.parameters())
    assert_same(train(model, optimizer), trained)


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_comes_after_zeroing_counts(trained, by_hand):
    """A pass, or gradients set by hand, as projections of several tasks' gradients are."""
    model = small_model()
    optimizer = open_optimizer(model)
    for i in range(12):
        with optimizer.one_micro_batch():
            loss_of(model, i if by_hand else 99).backward()
            kept = [p.grad.clone() for p in model.parameters()]
            optimizer.zero_grad(set_to_none=i % 2 == 0)
            if by_hand:
                for p, gradient in zip(model.parameters(), kept, strict=True):
                    p.grad = gradient
            else:
                loss_of(model, i).backward()
        if i % 4 == 3:
            optimizer.step()
    assert_same(values(model.parameters()), trained)


def test_an_error_inside_one_micro_batch(trained):
    model = small_model()
    optimizer = open_optimizer(model)

    def fail():
        with optimizer.one_micro_batch():
            loss_of(model, 99).backward()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert optimizer.at_boundary
    optimizer.zero_grad()
    with optimizer.one_micro_batch(), pytest.raises(RuntimeError, match=r"step\(\) inside one_micro_batch\(\)"):
        optimizer.step()
    assert_same(train(model, optimizer), trained)


def test_gradients_set_by_hand(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    for i in range(12):
        gradients = torch.autograd.grad(loss_of(model, i), list(model.parameters()))
        with optimizer.one_micro_batch():
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
        if i % 4 == 3:
            optimizer.step()
    assert_same(values(model.parameters()), trained)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*one_micro_batch\(\)"):
        optimizer.step()


@pytest.mark.parametrize("what", ["discard", "a group"])
def test_what_waits_in_the_block_stays(what):
    model = small_model()
    optimizer = open_optimizer(model)
    loss_of(model, 0).backward()
    with optimizer.one_micro_batch():
        loss_of(model, 1).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        if what == "discard":
            optimizer.discard_cycle()
        else:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        assert_same([p.grad for p in model.parameters()], gradients)
    assert optimizer.cycle_position == (1 if what == "discard" else 2)


def test_one_micro_batch_needs_an_open_number():
    model = small_model()
    optimizer = open_optimizer(model, inner_steps=4)
    with (
        pytest.raises(RuntimeError, match=r"inner_steps=4 gradients add up until step\(\)"),
        optimizer.one_micro_batch(),
    ):
        pass


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_discarded_cycles(steps, dtype):
    """The parameters hold θ again, and nothing else has changed."""
    model = small_model(dtype)
    optimizer = open_optimizer(model, inner_steps=steps)
    (train if steps is None else train_with_number)(model, optimizer, (4,))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    theta = values(model.parameters())
    for i in range(4):
        loss_of(model, 50 + i).backward()
        if steps:
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(theta[0], model[0].weight)
    optimizer.discard_cycle()
    assert optimizer.at_boundary
    if dtype == torch.bfloat16:
        torch.testing.assert_close(values(model.parameters()), theta, rtol=2**-7, atol=0)
    else:
        assert_theta(values(model.parameters()), theta, longest=0.2)
    after = optimizer.state_dict()["state"]
    for key, entry in state.items():
        assert entry.keys() == after[key].keys()
        assert_same([entry["exp_avg"], entry["step"]], [after[key]["exp_avg"], after[key]["step"]])
    assert len(optimizer.metrics()["grad_norms"]) == 4


# Warnings: one each


def _warned(caught):
    return [str(w.message) for w in caught if "inner_steps" in str(w.message) or "displacement_dtype" in str(w.message)]


def test_zeroing_in_mid_cycle_warns_once():
    model = small_model()
    optimizer = open_optimizer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, (2, 2))
        with optimizer.one_micro_batch():
            loss_of(model, 0).backward()
            optimizer.zero_grad()
        assert not caught
        for _ in range(3):
            loss_of(model, 0).backward()
            optimizer.zero_grad()
    (said,) = _warned(caught)
    assert "after 1 backward pass(es) without a step()" in said
    assert "discard_cycle()" in said


def test_a_generators_pass_through_its_discriminator():
    """Is zeroed by the module, which no optimizer sees, and has walked."""
    judge, maker = small_model(), nn.Linear(2, 6)
    of_judge, of_maker = open_optimizer(judge), open_optimizer(maker, inner_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3):
            judge.zero_grad()
            loss_of(judge, i).backward()
            judge(maker(batch(i)[:, :2]).detach()).mean().backward()
            of_judge.step()
            maker.zero_grad()
            judge(maker(batch(i)[:, :2])).mean().backward()
            of_maker.step()
    assert ["such as a generator's through its discriminator" in said for said in _warned(caught)] == [True]


def test_cycles_of_one_pass_warn_once():
    model = small_model()
    optimizer = open_optimizer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, (1, 1, 2, 1, 1))
        assert not caught
        train(model, optimizer, (1, 1, 1, 1))
    assert ["3 cycles in a row had one backward pass" in said for said in _warned(caught)] == [True]


@pytest.mark.parametrize("chosen", [None, torch.bfloat16, torch.float32])
def test_long_cycles(chosen):
    """More room for norms is made, and bfloat16 displacements warn once."""
    model = small_model()
    optimizer = open_optimizer(model, displacement_dtype=chosen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, (3, 70, 32, 33))
        assert len(optimizer.metrics()["grad_norms"]) == 33
    assert ["displacement_dtype=torch.float32" in said for said in _warned(caught)] == [True] * (chosen is None)
    for i in range(40):
        loss_of(model, i).backward()
    assert len(optimizer.metrics()["grad_norms"]) == 33
    assert len(optimizer.param_groups[0]["grad_norms"]) == 32  # torch.distributed.checkpoint wants as many always
    optimizer.step()
    assert len(optimizer.metrics()["grad_norms"]) == 40
    assert len(optimizer.state_dict()["param_groups"][0]["grad_norms"]) == 32


def test_parameters_that_no_pass_reaches_warn_once():
    model, other = small_model(), small_model()
    optimizer = open_optimizer(other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, (1,) * 5)
    assert ["no backward pass has reached" in str(w.message) for w in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, optimizer, (2, 0, 0, 0, 0, 2))


def test_another_optimizer_of_the_same_parameters(trained):
    """The last one built has them, as where a cell of a notebook runs again; the other one says so."""
    model = small_model()
    first = open_optimizer(model)
    loss_of(model, 0).backward()
    first.discard_cycle()
    fresh = small_model()
    with torch.no_grad():
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            p.copy_(q)
    second = open_optimizer(model)
    assert_same(train(model, second), trained)
    assert second.at_boundary
    assert first.at_boundary
    with pytest.raises(RuntimeError, match=r"another optimizer with inner_steps=None .* these parameters"):
        first.step()


def test_gradients_that_a_hook_takes_away():
    model = small_model()
    optimizer = open_optimizer(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match="gradients are gone at its end"):
        loss_of(model, 0).backward()
    assert optimizer.at_boundary


def test_no_hook_outlives_its_optimizer():
    model = small_model()
    optimizer = open_optimizer(model)
    train(model, optimizer)
    assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    (loss_of(model, 0) * torch.inf).backward()
    assert model[4].bias.grad.isinf()
    del optimizer
    gc.collect()
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_memory_is_that_of_a_number():
    """And gradients are gone but for the smallest."""
    found = []
    for steps in (None, 4):
        model = small_model()
        optimizer = open_optimizer(model, inner_steps=steps)
        for i in range(2):
            loss_of(model, i).backward()
            if steps:
                optimizer.step()
        storages = [t.untyped_storage() for entry in optimizer.state_dict()["state"].values() for t in entry.values()]
        found.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert gradients == (4 if steps is None else 4 * sum(p.numel() for p in model.parameters()))
    assert found[0] == found[1]


# State


@pytest.mark.parametrize("how", ["state_dict", "copied", "pickled"])
@pytest.mark.parametrize("taken", [0, 2, 35])
def test_resumed(how, taken):
    """In mid-cycle too, bit for bit."""
    model = small_model()
    optimizer = open_optimizer(model, displacement_dtype=torch.bfloat16)
    train(model, optimizer)
    for i in range(taken):
        loss_of(model, 20 + i).backward()
    if how == "state_dict":
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        other = small_model()
        resumed = open_optimizer(other, displacement_dtype=torch.bfloat16)
        weights, state = torch.load(file, weights_only=True)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
    else:
        carry = copy.deepcopy if how == "copied" else (lambda pair: pickle.loads(pickle.dumps(pair)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other, resumed = carry((model, optimizer))
    assert resumed.cycle_position == taken
    ends = []
    for m, o in ((model, optimizer), (other, resumed)):
        for i in range(2):
            loss_of(m, 70 + i).backward()
        o.step()
        ends.append([*train(m, o, (3,)), torch.tensor(o.metrics()["grad_norms"])])
    assert_same(*ends)


def test_states_of_a_number_of_inner_steps():
    """The constructor's wins at a boundary; a cycle in progress needs its own."""
    model = small_model()
    number = open_optimizer(model, inner_steps=4)
    train_with_number(model, number, (4,))
    other = small_model()
    optimizer = open_optimizer(other)
    with pytest.warns(UserWarning, match="inner_steps=4, this optimizer has None, which it keeps"):
        optimizer.load_state_dict(number.state_dict())
    assert optimizer.inner_steps is None
    assert optimizer.param_groups[0]["inner_steps"] is None
    loss_of(other, 0).backward()
    with pytest.raises(ValueError, match="in progress"):
        number.load_state_dict(optimizer.state_dict())


def test_theta_in_mid_cycle(trained):
    model = small_model()
    optimizer = open_optimizer(model)
    for i in range(12):
        loss_of(model, i).backward()
        with optimizer.outer_weights(), torch.no_grad():
            model(batch(50))
        if i % 4 == 1:
            with (
                pytest.raises(RuntimeError, match=r"a backward pass inside outer_weights\(\)"),
                optimizer.outer_weights(),
            ):
                loss_of(model, 0).backward()
            optimizer.zero_grad()
            with optimizer.outer_weights(), optimizer.one_micro_batch():
                loss_of(model, 0).backward()
                optimizer.zero_grad()
        if i % 4 == 3:
            optimizer.step()
    assert_same(values(model.parameters()), trained)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", True])
def test_bad_numbers(bad):
    with pytest.raises((TypeError, ValueError), match="inner_steps must be"):
        NexusAdamW([nn.Parameter(torch.ones(1))], inner_steps=bad)
