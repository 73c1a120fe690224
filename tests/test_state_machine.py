"""Any order of calls: hypothesis drives an optimizer and, beside it, the reference through the same history."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from conftest import BACKENDS, assert_same, make_params, set_grads, values
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from nexus_fused import NexusAdamW

pytestmark = [  # it tries all that, too
    pytest.mark.filterwarnings("ignore:no parameter had a gradient"),
    pytest.mark.filterwarnings("ignore:no backward pass has reached"),
    pytest.mark.filterwarnings("ignore:3 cycles in a row had one backward pass"),
]


class Machine(RuleBasedStateMachine):
    """The optimizer under test with flat memory, the reference without: bit for bit equal after every rule."""

    backend = next(name for name in BACKENDS if name != "reference")
    saved = Bundle("saved")

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        inner_steps=st.sampled_from([None, 1, 2, 3, 4]),
        amsgrad=st.booleans(),
    )
    def build(self, dtype, inner_steps, amsgrad):
        self.inner_steps, self.dtype = inner_steps, dtype
        self.params = [make_params((3, 2), (4,), (0,), dtype=dtype) for _ in range(2)]
        options = {"lr": 1e-2, "inner_lr": 0.05, "inner_steps": inner_steps, "amsgrad": amsgrad}
        self.optimizers = [
            NexusAdamW(self.params[0], backend=self.backend, **options),
            NexusAdamW(self.params[1], backend="reference", flatten=False, **options),
        ]
        self.position = 0

    @rule(
        seed=st.integers(0, 5),
        missing=st.sets(st.integers(0, 4)),
        bad=st.sampled_from([None, float("nan"), float("inf"), 0.0]),
    )
    def step(self, seed, missing, bad):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            with optimizer.one_micro_batch() if self.inner_steps is None else contextlib.nullcontext():
                set_grads(params, seed)
                if bad is not None:
                    params[0].grad.fill_(bad)
                for i in missing:
                    if i < len(params):
                        params[i].grad = None
            if self.inner_steps is not None:
                optimizer.step()
                optimizer.zero_grad()
        if self.inner_steps is not None:
            self.position = (self.position + 1) % self.inner_steps
        elif len(missing & set(range(len(self.params[0])))) < len(self.params[0]):
            self.position += 1

    @precondition(lambda self: self.inner_steps is None)
    @rule()
    def end_cycle(self):
        for optimizer in self.optimizers:
            optimizer.step()
        self.position = 0

    @rule()
    def discard_cycle(self):
        for optimizer in self.optimizers:
            optimizer.discard_cycle()
        self.position = 0

    @rule()
    def outer_step(self):
        for optimizer in self.optimizers:
            optimizer.outer_step()
        self.position = 0

    @precondition(lambda self: len(self.params[0]) < 5)
    @rule(inner_lr=st.sampled_from([0.01, 0.2]))
    def add_param_group(self, inner_lr):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            params.append(make_params((5,), dtype=self.dtype, seed=len(params))[0])
            optimizer.add_param_group({"params": [params[-1]], "inner_lr": inner_lr})

    @rule(target=saved)
    def save(self):
        states = [copy.deepcopy((o.state_dict(), values(p))) for p, o in zip(self.params, self.optimizers, strict=True)]
        return len(self.params[0]), self.position, states

    @rule(saved=saved, model_first=st.booleans())
    def load(self, saved, model_first):
        count, position, states = saved
        if count != len(self.params[0]):
            return
        for params, optimizer, (state, weights) in zip(self.params, self.optimizers, states, strict=True):
            if not model_first:
                optimizer.load_state_dict(state)
            with torch.no_grad():
                for p, value in zip(params, weights, strict=True):
                    p.copy_(value)
            if model_first:
                optimizer.load_state_dict(state)
        self.position = position

    @rule()
    def look_at_theta(self):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            before = values(params)
            with optimizer.outer_weights():
                shown = values(params)
                assert optimizer.state_dict()["param_groups"][0]["cycle_position"] == 0
            assert_same(values(params), before)
            optimizer.eval()
            assert_same(values(params), shown)
            optimizer.train()
            assert_same(values(params), before)

    @rule(index=st.integers(0, 4), value=st.sampled_from([0.5, -2.0]))
    def write(self, index, value):
        for params in self.params:
            if index < len(params):
                with torch.no_grad():
                    params[index].fill_(value)

    @rule()
    def copy(self):
        for i in range(2):
            self.params[i], self.optimizers[i] = copy.deepcopy((self.params[i], self.optimizers[i]))

    @rule()
    def schedule(self):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    @invariant()
    def same(self):
        if not hasattr(self, "params"):
            return
        ours, reference = self.optimizers
        assert ours.cycle_position == reference.cycle_position == self.position
        assert_same(values(self.params[0]), values(self.params[1]))
        states = [o.state_dict()["state"] for o in self.optimizers]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            assert states[0][key].keys() == states[1][key].keys()
            assert_same(
                [states[0][key][name] for name in states[0][key]],
                [states[1][key][name] for name in states[0][key]],
            )
        assert all(p.isfinite().all() for p in self.params[0])


class TritonMachine(Machine):
    """The same for the Triton kernels, with fewer histories: the interpreter is slow."""

    backend = "triton"


class CudaMachine(Machine):
    """The same for the CUDA kernels, with fewer histories: a thread there is a fiber here."""

    backend = "cuda"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
if "triton" in BACKENDS:
    TestTritonMachine = TritonMachine.TestCase
    TestTritonMachine.settings = settings(TestMachine.settings, max_examples=20)
if "cuda" in BACKENDS:
    TestCudaMachine = CudaMachine.TestCase
    TestCudaMachine.settings = settings(TestMachine.settings, max_examples=30)
