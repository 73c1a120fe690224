"""Warnings of mistakes that raise no error: each comes once, and nothing usual brings one."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from conftest import build, make_params, run, set_grads
from torch import nn
from torch.optim import lr_scheduler

from nexus_fused import NexusAdamW

K = 4


def said(work):
    """Texts of the warnings of ours, each as often as it came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return [text for text in texts if "lr_scheduler.step()" not in text]


class TestNoGradients:
    def test_step_before_backward(self, backend):
        model = nn.Linear(3, 2)
        optimizer = NexusAdamW(model.parameters(), backend=backend)

        def train(steps):
            for _ in range(steps):
                optimizer.zero_grad()
                loss = model(torch.ones(2, 3)).sum()
                optimizer.step()
                loss.backward()

        assert not said(lambda: train(K - 1))
        (text,) = said(lambda: train(3 * K))
        assert "no parameter had a gradient in any of the 4 step() calls" in text
        assert "call loss.backward() before step()" in text

    def test_one_gradient_is_enough(self, backend):
        params, optimizer = build(backend=backend)

        def train():
            for _ in range(3):
                optimizer.step()
            run(optimizer, params[1:], 1)
            for _ in range(12):
                optimizer.step()

        assert not said(train)

    def test_frozen_models_have_none(self):
        params = make_params((3,))
        optimizer = NexusAdamW([params[0].requires_grad_(False)])
        assert not said(lambda: [optimizer.step() for _ in range(3 * K)])


ORDINARY = {
    "constant": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1.0),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda k: min(k / 30, 1)),
    "long warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 10000),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=60),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "steps": lambda o: lr_scheduler.StepLR(o, 8, gamma=0.1),
    "constant warm-up": lambda o: lr_scheduler.ConstantLR(o, 0.01, total_iters=20),
    "triangles": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 5e-3, step_size_up=6, cycle_momentum=False),
    "warm-up and cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 1e-4, total_iters=12), lr_scheduler.CosineAnnealingLR(o, 30)], [12]
    ),
    "trapezoid": lambda o: lr_scheduler.LambdaLR(o, lambda k: max(min(k / 9, 1, (48 - k) / 20), 0)),
    "Noam": lambda o: lr_scheduler.LambdaLR(o, lambda k: min((k + 1) ** -0.5 * 3, (k + 1) * 9**-1.5 * 3)),
    "off at times": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.0 if k % 16 < 8 else k / 1000),
}


class TestSchedules:
    def said_over(self, schedule, lr=1e-3, cycles=12, every=1, **options):
        params, optimizer = build(lr=lr, **options)
        scheduler = schedule(optimizer)

        def train():
            for k in range(cycles * K):
                run(optimizer, params, 1, k)
                if (k + 1) % every == 0:
                    scheduler.step()

        return said(train)

    def test_raised_by_hand(self):
        params, optimizer = build(lr=1e-8)
        run(optimizer, params, 1)
        optimizer.param_groups[0]["lr"] = 1e-3
        (text,) = said(lambda: run(optimizer, params, 9))
        assert "parameter group 0 is 0.001, 100000 times the 1e-08 that it was added with" in text
        assert "set group['base_lr'] to the peak of the schedule" in text
        optimizer.param_groups[0]["base_lr"] = 1e-3
        optimizer = copy.deepcopy(optimizer)
        assert not said(lambda: run(optimizer, optimizer.param_groups[0]["params"], 9))

    @pytest.mark.parametrize("decay", [lambda k: max(1 - k / 50, 0), lambda k: 0.5 ** (k // 9), lambda k: 1 / (k + 1)])
    @pytest.mark.parametrize("warm_up", [0, 9])
    def test_absolute_rates(self, decay, warm_up):
        def rate(k):
            return 3e-4 * min(1, (k + 1) / (warm_up + 1)) * decay(max(k - warm_up, 0))

        def schedule(optimizer):
            return lr_scheduler.LambdaLR(optimizer, rate)

        (text,) = self.said_over(schedule, lr=1.0)
        assert "parameter group 0 rose to 0.0003 and now falls, but the group was added with 1" in text
        assert "set group['base_lr'] to the peak of the schedule" in text
        assert not self.said_over(schedule, lr=1.0, inner_lr_follows_lr=False)

    @pytest.mark.parametrize("name", ORDINARY)
    @pytest.mark.parametrize("every", [1, 7])
    def test_ordinary(self, name, every):
        assert not self.said_over(ORDINARY[name], every=every)

    def test_a_resumed_decay(self):
        """What came before a load is not known."""
        params, optimizer = build(lr=1.0)
        run(optimizer, params, 2 * K)
        for how in ("load", "copy"):
            again = copy.deepcopy(optimizer)
            if how == "load":
                again = NexusAdamW(make_params((5, 3), (7,)), lr=1.0)
                again.load_state_dict(optimizer.state_dict())

            def decay(again=again):
                for k in range(3 * K):
                    again.param_groups[0]["lr"] = 0.01 * math.exp(-k)
                    run(again, again.param_groups[0]["params"], 1, k)

            assert not said(decay)


class TestPile:
    """zero_grad() that is missing."""

    def model(self, backend, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return model, NexusAdamW(model.parameters(), backend=backend, **options)

    def said_of(self, model, optimizer, clear, passes=1, after=lambda: None, steps=3 * K):
        def train():
            for _ in range(steps):
                for _ in range(passes):
                    model(torch.randn(5, 3)).square().mean().backward()
                after()
                optimizer.step()
                clear()

        return [text for text in said(train) if "Your loop accumulates" not in text]

    @pytest.mark.parametrize("steps", [1, 2, K])
    @pytest.mark.parametrize("passes", [1, 3])
    def test_missing(self, backend, steps, passes):
        model, optimizer = self.model(backend, inner_steps=steps)
        assert not self.said_of(model, optimizer, lambda: None, passes, steps=max(steps, 2))
        (text,) = self.said_of(model, optimizer, lambda: None, passes)
        assert "gradients pile up" in text
        assert "call zero_grad() after each step()" in text
        assert not any(p._backward_hooks for p in model.parameters())

    @pytest.mark.parametrize("passes", [1, 3])
    def test_there(self, backend, passes):
        ways = {
            "none": lambda m, o: o.zero_grad(),
            "zeros": lambda m, o: o.zero_grad(set_to_none=False),
            "model": lambda m, o: m.zero_grad(),
            "model's zeros": lambda m, o: m.zero_grad(set_to_none=False),
            "by hand": lambda m, o: [p.grad.zero_() for p in m.parameters()],
            "detached": lambda m, o: [p.grad.detach().zero_() for p in m.parameters()],
            "dropped": lambda m, o: [setattr(p, "grad", None) for p in m.parameters()],
        }
        for name, way in ways.items():
            model, optimizer = self.model(backend)
            assert not self.said_of(model, optimizer, lambda w=way, m=model, o=optimizer: w(m, o), passes), name
            assert not any(p._backward_hooks for p in model.parameters())

    def test_gradients_written_by_hand(self):
        params, optimizer = build()
        set_grads(params, 0)

        def train():
            for _ in range(3 * K):
                for p in params:
                    p.grad.copy_(torch.randn_like(p))
                optimizer.step()

        assert not said(train)
        model, optimizer = self.model(None)
        overwrite = [lambda: [p.grad.copy_(torch.randn_like(p)) for p in model.parameters()]]
        assert not self.said_of(model, optimizer, lambda: None, after=overwrite[0])

    def test_those_of_another_models_loss(self):
        """A generator's backward pass adds to the discriminator's, which clears them before its own."""
        for set_to_none in (True, False):
            judge, optimizer = self.model(None)
            maker = nn.Linear(2, 3)
            other = NexusAdamW(maker.parameters())

            def train(judge=judge, optimizer=optimizer, maker=maker, other=other, none=set_to_none):
                for _ in range(3 * K):
                    optimizer.zero_grad(none)
                    judge(maker(torch.randn(5, 2)).detach()).mean().backward()
                    optimizer.step()
                    other.zero_grad(none)
                    judge(maker(torch.randn(5, 2))).mean().backward()
                    other.step()

            assert not said(train)

    def test_gradients_that_are_views_of_buckets(self):
        """DistributedDataParallel writes into them itself: no false alarm."""
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model, _ = self.model(None)
            parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            for set_to_none in (True, False):
                optimizer = NexusAdamW(model.parameters())
                assert not self.said_of(parallel, optimizer, lambda o=optimizer, n=set_to_none: o.zero_grad(n))
        finally:
            torch.distributed.destroy_process_group()


def test_a_gradient_zeroed_through_data_is_no_pile():
    """`.data` counts its writes for itself."""
    model = nn.Linear(3, 1)
    optimizer = NexusAdamW(model.parameters(), inner_steps=2)

    def train():
        for _ in range(8):
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            for p in model.parameters():
                p.grad.data.zero_()

    assert not said(train)


def test_saving_a_tensor_says_nothing_of_our_hook():
    p = torch.ones(3, requires_grad=True)
    optimizer = NexusAdamW([p])
    p.sum().backward()
    optimizer.step()
    assert not said(lambda: torch.save({"p": p}, io.BytesIO()))
    assert not said(lambda: pickle.dumps(optimizer))
