"""What fails halfway, for lack of memory for example, leaves nothing half done: the same call again goes on as if it
had not failed."""

from __future__ import annotations

import pickle

import inside
import pytest
import torch
from conftest import BACKENDS, assert_same, build, make_params, run, set_grads, values
from torch import nn

from nexus_fused import NexusAdamW, backends, flat, reference
from nexus_fused import table as tables


class Once:
    """Raises at the call number `at`, from 0, and lets all others pass."""

    def __init__(self, function, at=0):
        self.function, self.left = function, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError("out of memory")
        return self.function(*args, **kwargs)


def outcome(optimizer, params):
    state = optimizer.state_dict()["state"]
    return [*values(params), *(entry[name] for entry in state.values() for name in sorted(entry))]


def run_with_failure(optimizer, params, steps, prepare, failing):
    """Runs `steps`; before the one after `failing` steps `prepare` is called, and it is repeated when it fails."""
    failed = False
    for step in range(steps):
        set_grads(params, step)
        if step == failing:
            prepare()
        try:
            optimizer.step()
        except torch.OutOfMemoryError:
            failed = True
            optimizer.step()
    return failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [0, 1])
def test_no_memory_for_anchors(monkeypatch, backend, dtype, at):
    """The first inner step allocates them, bucket by bucket."""
    results = []
    for fails in (False, True):
        monkeypatch.setattr(flat, "BUCKET_BYTES", 64)
        params, optimizer = build((5, 3), (7,), (40,), dtype=dtype, backend=backend)

        def prepare(fails=fails):
            monkeypatch.setattr(flat.Bucket, "ensure", _method(Once(flat.Bucket.ensure, at if fails else 10**9)))

        assert run_with_failure(optimizer, params, 9, prepare, 0) == fails
        results.append(outcome(optimizer, params))
        monkeypatch.undo()
    assert_same(*results)


def _method(function):
    return lambda self, *args: function(self, *args)


@pytest.mark.parametrize("failing", [4, 6])
def test_no_memory_for_maxima(monkeypatch, backend, failing):
    results = []
    for fails in (False, True):
        params, optimizer = build((5, 3), (7,), backend=backend)

        def prepare(optimizer=optimizer, fails=fails):
            optimizer.param_groups[0]["amsgrad"] = True
            if fails:
                monkeypatch.setattr(flat.Bucket, "ensure", _method(Once(flat.Bucket.ensure)))

        assert run_with_failure(optimizer, params, 12, prepare, failing) == fails
        results.append(outcome(optimizer, params))
        monkeypatch.undo()
    assert_same(*results)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_no_memory_for_the_table(monkeypatch, backend, at):
    """A parameter was moved elsewhere, and the table with its new address cannot be copied to the device."""
    results = []
    for fails in (False, True):
        params, optimizer = build((5, 3), (7,), backend=backend)

        def prepare(params=params, fails=fails):
            params[0].data = params[0].detach().clone()
            if fails:
                monkeypatch.setattr(tables, "upload", Once(tables.upload, at))

        failed = run_with_failure(optimizer, params, 12, prepare, 4)
        assert failed == (
            fails and (at < 2 or backend in ("triton", "cuda"))
        )  # the third copy is for kernels on a device
        results.append(outcome(optimizer, params))
        monkeypatch.undo()
    assert_same(*results)


def test_a_parameter_that_cannot_be_thawed_is_not_forgotten(monkeypatch):
    """Its backend cannot run: the same error at each step, not silence."""
    frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    params = make_params((4,))
    optimizer = NexusAdamW([frozen, *params])
    reason = "no such luck"
    monkeypatch.setattr(backends, "why_not", lambda name, *_, **__: reason if name == "cpu" else None)
    inside.demand_backend(optimizer, "cpu")
    frozen.requires_grad_()
    frozen.grad = torch.ones(3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot run: no such luck"):
            inside.thaw(optimizer)
        assert frozen not in optimizer.state
    reason = None
    before = frozen.detach().clone()
    run(optimizer, [frozen, *params], 4)
    assert not torch.equal(before, frozen)


@pytest.mark.parametrize("when", [0, 2])
def test_a_group_that_cannot_be_added_leaves_nothing(monkeypatch, backend, when):
    """Neither state nor rows nor parameters that wait, also where another dtype of it had been registered."""
    results = []
    for fails in (False, True):
        params, optimizer = build((5, 3), (7,), backend=backend)
        run(optimizer, params, when)
        late = [*make_params((2, 2)), *make_params((3,), dtype=torch.bfloat16)]
        late.append(nn.Parameter(torch.zeros(2), requires_grad=False))
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(flat.Bucket, "ensure", _method(Once(flat.Bucket.ensure, 3)))
                with pytest.raises(torch.OutOfMemoryError):
                    optimizer.add_param_group({"params": late})
            assert len(optimizer.param_groups) == 1
            assert list(optimizer.state) == params
            assert inside.frozen(optimizer) == []
        run(optimizer, params, 3, first_seed=when)
        optimizer.add_param_group({"params": late})
        run(optimizer, [*params, *late], 6, first_seed=9)
        results.append(outcome(optimizer, [*params, *late]))
    assert_same(*results)


# A second device, played by the CPU under another name.


class OnCpu0(nn.Parameter):
    """A parameter that says it is on "cpu:0", which is not "cpu"."""

    @property
    def device(self):
        return torch.device("cpu", 0)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"triton", "cuda"}))
def test_a_device_that_comes_late_joins_the_cycle(backend):
    """Γ, norms and totals of the groups that walked already are not lost, whichever device is asked for them."""
    params, optimizer = build((5, 3), backend=backend)
    set_grads(params, 0)
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    run(optimizer, params, 2, first_seed=1)
    group = optimizer.param_groups[0]
    before = [group[key].clone() for key in ("walk_length", "walk_sq_length", "skipped_inner_steps")]
    norms = torch.stack(group["grad_norms"])
    late = OnCpu0(torch.randn(4))
    optimizer.add_param_group({"params": [late]})
    assert len(inside.cycles(optimizer)) == 2
    for cycle in inside.cycles(optimizer):
        after = [cycle.walk_length[0], cycle.walk_sq_length[0], cycle.skipped_inner_steps]
        assert_same(before, after)
        assert_same([norms], [cycle.grad_norms])
        assert cycle.walk_length[1] == 0
    late.grad = OnCpu0(torch.randn(4), requires_grad=False)
    set_grads(params, 3)
    optimizer.step()
    metrics = optimizer.metrics()
    assert len(metrics["grad_norms"]) == 4
    assert metrics["skipped_inner_steps"] == 1
    assert str(pickle.loads(pickle.dumps(optimizer)).metrics()) == str(metrics)  # NaN differs from itself


def test_no_memory_while_theta_is_shown(monkeypatch, backend, dtype):
    """Of the second parameter: the first one's walk is put back."""
    params, optimizer = build(dtype=dtype, backend=backend)
    run(optimizer, params, 2)
    before = values(params)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "set_weight", Once(reference.set_weight, at=1))
        with pytest.raises(torch.OutOfMemoryError), optimizer.outer_weights():
            pass
    assert_same(values(params), before)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError), optimizer.outer_weights():
        patch.setattr(reference, "walked_weight", Once(reference.walked_weight, at=1))
    assert_same(values(params), before)
    run(optimizer, params, 2)
    assert optimizer.at_boundary


@pytest.mark.parametrize("how", ["a group", "unfrozen", "loaded"])
def test_no_memory_for_what_comes(monkeypatch, backend, how):
    """Its maxima cannot be allocated: it has not come, and may come again."""
    (a,), (b,) = make_params((3,)), make_params((4,))
    b.requires_grad_(how == "a group")
    optimizer = NexusAdamW([a] if how == "a group" else [a, b], backend=backend, amsgrad=True)
    run(optimizer, [a], 4)
    if how == "loaded":
        others = make_params((3,), (4,))
        other = NexusAdamW(others, amsgrad=True)
        run(other, others, 4)
        state = other.state_dict()

    def come():
        if how == "a group":
            optimizer.add_param_group({"params": [b]})
        elif how == "loaded":
            optimizer.load_state_dict(state)
        else:
            b.requires_grad_()
            optimizer.state_dict()

    with monkeypatch.context() as patch:
        patch.setattr(tables.Table, "follow_amsgrad", Once(tables.Table.follow_amsgrad))
        with pytest.raises(torch.OutOfMemoryError):
            come()
    optimizer.state_dict()
    run(optimizer, [a], 4)
    come()
    b.requires_grad_()
    run(optimizer, [a, b], 4)
    assert optimizer.state[b]["max_exp_avg_sq"].any()
