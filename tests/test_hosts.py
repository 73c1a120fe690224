"""Hosts that do anything to `optimizer.state` and parameters: nothing is lost, nothing dead is updated."""

from __future__ import annotations

import copy
import functools
import io
import linecache
import os
import pickle
import signal
import sys
from pathlib import Path

import inside
import pytest
import torch
from conftest import BACKENDS, assert_same, assert_snapshot, build, make_params, run, set_grads, snapshot, values
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from two_models import TwoModels

import nexus_fused
from nexus_fused import NexusAdamW
from nexus_fused.frameworks import uninterrupted


def _tensors(entry):
    return {key: value for key, value in entry.items() if isinstance(value, torch.Tensor)}


def _assign(entry, optimizer, param):
    entry.update({key: value.clone() for key, value in _tensors(entry).items()})


def _share(entry, optimizer, param):
    for value in _tensors(entry).values():
        value.share_memory_()


def _move(entry, optimizer, param):
    for value in _tensors(entry).values():
        value.data = value.data.clone()


def _replace(entry, optimizer, param):
    optimizer.state[param] = copy.deepcopy(entry)


def _rebuild(entry, optimizer, param):
    optimizer.state = copy.copy(optimizer.state)
    optimizer.state[param] = dict(entry)


def _note(entry, optimizer, param):
    entry["seen"] = 1
    optimizer.state["host"] = {"seen": 2}


HOSTS = [_assign, _share, _move, _replace, _rebuild, _note]


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
@pytest.mark.parametrize("taken", [0, 2, 3])
def test_the_same_values_elsewhere_change_nothing(backend, dtype, host, taken):
    """Assigned, shared, moved, replaced, annotated at any position: bit for bit as if nobody had touched anything."""
    results = []
    for touched in (False, True):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, taken)
        if touched:
            for p in params:
                host(optimizer.state[p], optimizer, p)
        run(optimizer, params, 6, 20)
        state = optimizer.state_dict()["state"]
        results.append([*values(params), *(state[i][key] for i in (0, 1) for key in ("step", "exp_avg", "exp_avg_sq"))])
        assert state[0]["step"] == (taken + 6) // 4
    assert_same(*results)


@pytest.mark.parametrize("when", ["used", "saved", "copied", "pickled"])
@pytest.mark.parametrize("taken", [2, 4])
def test_other_values_are_taken_over(backend, dtype, when, taken):
    """Assigned like written in place, whoever looks first."""
    results = []
    for assigned in (False, True):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, taken)
        entry = optimizer.state[params[0]]
        if assigned:
            entry["exp_avg"] = torch.full_like(entry["exp_avg"], 0.25)
            entry["step"] = 7
            if taken == 2:
                entry["displacement"] = torch.full_like(entry["displacement"], 2**-7)
        else:
            entry["exp_avg"].fill_(0.25)
            entry["step"].fill_(7)
            if taken == 2:
                entry["displacement"].fill_(2**-7)
        if when == "saved":
            assert (optimizer.state_dict()["state"][0]["exp_avg"] == 0.25).all()
        elif when != "used":
            both = params, optimizer
            params, optimizer = copy.deepcopy(both) if when == "copied" else pickle.loads(pickle.dumps(both))
            params = optimizer.param_groups[0]["params"]
        run(optimizer, params, 6, 20)
        state = optimizer.state_dict()["state"]
        assert state[0]["step"] == 7 + (taken + 6) // 4 - taken // 4
        results.append([*values(params), *(state[0][key] for key in ("exp_avg", "exp_avg_sq"))])
    assert_same(*results)


@pytest.mark.parametrize("how", ["tensors", "entries", "a view", "one entry for both", "loaded"])
def test_what_is_assigned_may_lie_in_our_own_memory(backend, how):
    """Tensors of the state are live: to copy may be to swap."""
    (p, q), optimizer = build((3, 3), (3, 3), backend=backend)
    run(optimizer, [p, q], 5)
    ours, theirs = (dict(optimizer.state[x]) for x in (p, q))
    first, second = (entry["exp_avg"].clone() for entry in (ours, theirs))
    state = optimizer.state
    if how == "tensors":
        state[p]["exp_avg"], state[q]["exp_avg"] = theirs["exp_avg"], ours["exp_avg"]
        expected = second, first
    elif how == "entries":
        state[p], state[q] = state[q], state[p]
        expected = second, first
    elif how == "a view":
        state[p]["exp_avg"] = state[p]["exp_avg"].t()
        expected = first.t().clone(), second
    elif how == "one entry for both":
        state[q] = state[p]
        expected = first, first
    else:
        saved = optimizer.state_dict()
        saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
        optimizer.load_state_dict(saved)
        expected = second, first
    assert_same([optimizer.state_dict()["state"][i]["exp_avg"] for i in (0, 1)], expected)
    assert_same([optimizer.state[x]["exp_avg"] for x in (p, q)], expected)
    run(optimizer, [p], 3)
    assert optimizer.state[p]["step"] == 2
    assert state[p] is not state[q]


@pytest.mark.parametrize("taken", [1, 4])
@pytest.mark.parametrize("what", ["a group", "maxima", "a plain dict"])
def test_what_was_assigned_is_looked_at_before_others_come(backend, what, taken):
    (p, q), optimizer = build((3,), (4,), backend=backend, amsgrad=what == "a group")
    run(optimizer, [p, q], taken)
    assigned = torch.full((3,), 0.25)
    entry = optimizer.state[p]
    entry["exp_avg"] = assigned
    if taken == 1:
        entry["displacement"] = torch.full_like(entry["displacement"], 2**-7)
    if what == "maxima":
        optimizer.param_groups[0]["amsgrad"] = True
        set_grads([q], 9)
        p.grad = None
        optimizer.step()
    else:
        if what == "a plain dict":
            optimizer.state = {key: dict(value) for key, value in optimizer.state.items()}
        optimizer.add_param_group({"params": make_params((2,))})
    assert_same([optimizer.state[p]["exp_avg"]], [assigned])
    if taken == 1:
        assert (optimizer.state[p]["displacement"] == 2**-7).all()
    run(optimizer, [q, *optimizer.param_groups[-1]["params"]], 4, 30)


def test_a_displacement_for_one_that_has_not_moved(backend):
    """It counts from then on: without, it would be overwritten."""
    (p, q), optimizer = build((3,), (4,), backend=backend, weight_decay=0)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[q]["displacement"] = torch.full_like(optimizer.state[q]["displacement"], 2**-6)
    before = q.detach().clone()
    with optimizer.outer_weights():
        assert_same([q.detach()], [before + 2**-6])
    optimizer.outer_step()
    assert (optimizer.state[q]["exp_avg"] > 0).all()
    assert optimizer.state[q]["step"] == 1


@pytest.mark.parametrize("through", ["state", "state_dict"])
def test_what_was_looked_at_long_ago_may_change(backend, through):
    """Nothing is looked for before somebody had a look, and everything from then on."""
    results = []
    for moved in (False, True):
        params, optimizer = build(backend=backend)
        assert not inside.state_is_known(optimizer)
        run(optimizer, params, 5)
        kept = optimizer.state[params[0]] if through == "state" else optimizer.state_dict()["state"][0]
        assert inside.state_is_known(optimizer)
        run(optimizer, params, 4, 5)
        if moved:
            kept["exp_avg"].share_memory_()
            kept["exp_avg_sq"].data = kept["exp_avg_sq"].clone()
        run(optimizer, params, 7, 9)
        results.append([*values(params), *(optimizer.state_dict()["state"][0][key] for key in ("step", "exp_avg"))])
    assert_same(*results)


def test_a_load_wins_over_what_was_assigned_before(backend):
    params, optimizer = build(backend=backend)
    run(optimizer, params, 4)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in optimizer.state.values():
        entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
    optimizer.state.pop(params[1])
    optimizer.load_state_dict(state)
    assert_same(
        [optimizer.state[p]["exp_avg"] for p in params], [state["state"][i]["exp_avg"] for i in range(len(params))]
    )
    run(optimizer, params, 4)
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda entry: entry.pop("exp_avg"), "'exp_avg' in optimizer.state of parameter 1 of group 0 .* is None"),
        (lambda entry: entry.update(exp_avg=torch.zeros(2)), r"exp_avg' .* is \(2,\) torch.float32, but the parameter"),
        (lambda entry: entry.update(exp_avg_sq=None), "'exp_avg_sq' .* is None"),
        (lambda entry: entry.update(exp_avg=torch.zeros(7, device="meta")), "whose values cannot be copied"),
        (lambda entry: entry.update(exp_avg=torch.zeros(7, dtype=torch.float64)), "float64, but the parameter"),
        (lambda entry: entry.update(step="one"), "'step' .* must be a number"),
        (lambda entry: entry.update(step=torch.zeros(2)), "'step' .* must be one number"),
        (lambda entry: entry.clear(), "entry of parameter 1 of group 0 .* was removed"),
    ],
)
@pytest.mark.parametrize("call", ["step", "state_dict"])
def test_what_cannot_be_taken_over_is_refused(backend, break_it, said, call):
    params, optimizer = build(backend=backend)
    run(optimizer, params, 3)
    before = snapshot(optimizer)
    kept = dict(optimizer.state[params[1]])
    break_it(optimizer.state[params[1]])
    set_grads(params, 9)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=said):
        getattr(optimizer, call)()
    optimizer.state[params[1]].update(kept)
    assert_snapshot(optimizer, before)


def _interrupted_at(line, call):
    """Runs `call` with Ctrl-C at a line of ours, by number; whether it came."""
    left = [line]
    package = str(Path(nexus_fused.__file__).parent)

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(package):
            return None
        # Python runs handlers when a call has returned or a loop goes round, so none on its way into `finally`.
        restores = "_set_grad_enabled(before)" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        left[0] -= event == "line" and not restores
        if left[0] == 0:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had us ignore it
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, handler)
        assert torch.is_grad_enabled()
    return False


@pytest.mark.parametrize("seen", ["a handler", "a wake-up fd"])
def test_an_interrupt_comes_once(seen):
    """As asyncio counts them: the first stops, the second kills."""
    came, (read, write) = [], os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    handler, wakeup = signal.signal(signal.SIGINT, lambda *args: came.append(args[0])), signal.set_wakeup_fd(write)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not came
        assert came == [signal.SIGINT]
        assert seen == "a handler" or len(os.read(read, 9)) == 1
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(read)
        os.close(write)


def test_an_interrupted_group_was_added_or_was_not():
    for line in range(1, 10_000, 29):
        params, optimizer = build()
        run(optimizer, params, 2)
        (late,) = make_params((2,))
        came = _interrupted_at(line, functools.partial(optimizer.add_param_group, {"params": [late]}))
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [late]})
        optimizer.eval()
        optimizer.train()
        run(optimizer, [*params, late], 2)
        assert optimizer.state[late]["step"] == 1
        if not came:
            break
    assert 100 < line < 9_000


@pytest.mark.parametrize("what", ["inner step", "outer step", "eval", "load"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
def test_an_interrupt_leaves_one_moment(backend, what):
    """Ctrl-C at any line: what was called took place or did not, and the position tells."""
    whole, theirs = build(backend=backend)
    run(theirs, whole, 9)
    saved = copy.deepcopy((theirs.state_dict(), values(whole)))
    run(theirs, whole, 7, 20)
    for line in range(1, 10_000, 41):
        params, optimizer = build(backend=backend)
        taken = 3 if what == "outer step" else 2
        run(optimizer, params, taken)
        if what == "load":
            call = functools.partial(optimizer.load_state_dict, copy.deepcopy(saved[0]))
        else:
            set_grads(params, taken)
            call = optimizer.eval if what == "eval" else optimizer.step
        shown = values(params)
        came = _interrupted_at(line, call)
        if what == "load":
            if optimizer.cycle_position != 1:
                call()
            for p, value in zip(params, saved[1], strict=True):
                p.data.copy_(value)
        elif what == "eval":
            optimizer.train()
            assert_same(values(params), shown)
            run(optimizer, params, 9 - taken, taken)
        else:
            if optimizer.cycle_position == taken:
                assert came
                call()
            assert optimizer.cycle_position == (taken + 1) % 4
            run(optimizer, params, 9 - taken - 1, taken + 1)
        run(optimizer, params, 7, 20)
        assert_same(values(params), values(whole))
        assert_same(*([o.state_dict()["state"][0]["exp_avg"]] for o in (optimizer, theirs)))
        if not came:
            break
    assert 1 < line < 9_000


class Hosts(RuleBasedStateMachine):
    """One optimizer that hosts handle as they like, and the oracle: two models in float64, handled in place.

    Rounding: displacements are differences of weights around 1, 1e-16 each, divided by a walk of 0.2 or more; AdamW
    divides by √v once more.
    """

    @initialize(flatten=st.booleans(), amsgrad=st.booleans())
    def build(self, flatten, amsgrad):
        self.params = make_params((3, 2), (4,), dtype=torch.float64)
        options = {"lr": 1e-2, "amsgrad": amsgrad}
        self.optimizer = NexusAdamW(self.params, inner_lr=0.05, inner_steps=3, flatten=flatten, **options)
        self.theirs = make_params((3, 2), (4,), dtype=torch.float64)
        self.oracle = TwoModels(self.theirs, 0.05, 3, **options)

    @rule(seed=st.integers(0, 5), missing=st.booleans())
    def step(self, seed, missing):
        set_grads(self.params, seed)
        if missing:
            self.params[0].grad = None
        self.oracle.step([p.grad for p in self.params])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.compare()

    @rule(seed=st.integers(0, 5), line=st.integers(1, 1500))
    def interrupted_step(self, seed, line):
        set_grads(self.params, seed)
        self.oracle.step([p.grad for p in self.params])
        before = self.optimizer.cycle_position
        _interrupted_at(line, self.optimizer.step)
        if self.optimizer.cycle_position == before:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.compare()

    @rule(host=st.sampled_from(HOSTS), index=st.integers(0, 1))
    def handle(self, host, index):
        param = self.params[index]
        host(self.optimizer.state[param], self.optimizer, param)

    @precondition(lambda self: self.oracle.taken == 0 and self.oracle.adamw.state)
    @rule(key=st.sampled_from(["exp_avg", "exp_avg_sq"]), index=st.integers(0, 1), value=st.floats(0.01, 1))
    def assign(self, key, index, value):
        theirs = self.oracle.adamw.state.get(self.theirs[index])
        if theirs:
            theirs[key].fill_(value)
            entry = self.optimizer.state[self.params[index]]
            entry[key] = torch.full(entry[key].shape, value, dtype=torch.float64)

    @rule(index=st.integers(0, 1), value=st.floats(-2, 2), move=st.booleans())
    def write(self, index, value, move):
        """w is the state, and θ moves along."""
        p, q, w = self.params[index], self.theirs[index], self.oracle.inner[index]
        with torch.no_grad():
            q += value - w
            w.fill_(value)
            if move:
                p.data = torch.full_like(p, value)
            else:
                p.fill_(value)

    @rule(how=st.sampled_from(["copied", "pickled", "loaded", "loaded into another"]))
    def carry(self, how):
        state = {**self.optimizer.state_dict()}
        if how in ("copied", "pickled"):
            both = self.params, self.optimizer
            both = copy.deepcopy(both) if how == "copied" else pickle.loads(pickle.dumps(both))
            self.params, self.optimizer = both[1].param_groups[0]["params"], both[1]
            return
        file = io.BytesIO()
        torch.save({**state, "state": {k: v for k, v in state["state"].items() if isinstance(k, int)}}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for entry in state["state"].values():
            entry.pop("seen", None)
        if how == "loaded into another":
            self.params = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
            group = self.optimizer.param_groups[0]
            self.optimizer = NexusAdamW(self.params, lr=1e-2, inner_lr=0.05, inner_steps=3, amsgrad=group["amsgrad"])
        self.optimizer.load_state_dict(state)

    def compare(self):
        taken = self.oracle.taken
        assert self.optimizer.cycle_position == taken
        shown = [w if taken else q.detach() for w, q in zip(self.oracle.inner, self.theirs, strict=True)]
        for p, w in zip(self.params, shown, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-11)
        for p, q in zip(self.params, self.theirs, strict=True):
            theirs = self.oracle.adamw.state.get(q)
            if theirs:
                entry = self.optimizer.state[p]
                assert entry["step"] == theirs["step"]
                torch.testing.assert_close(entry["exp_avg"], theirs["exp_avg"], rtol=1e-10, atol=1e-11)


Hosts.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHosts = Hosts.TestCase
