"""Saving and loading: exact resume, AdamW both ways, precision, deepcopy, pickle, distributed checkpoints' code."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re

import inside
import pytest
import torch
from conftest import assert_same, assert_theta, build, by_bits, exact, make_params, run, set_grads, values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nexus_fused import NexusAdamW


def reload(state):
    """Through a file, with the safe loader."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(params, optimizer):
    state = optimizer.state_dict()
    return [*values(params), *[v.clone() for entry in state["state"].values() for v in entry.values()]]


@pytest.mark.parametrize("taken", range(1, 9))
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_resume_after_any_micro_batch(backend, dtype, taken, order):
    params, optimizer = build((5, 3), (7,), (2,), dtype=dtype, backend=backend, amsgrad=True)

    def steps(params, optimizer, first, last):
        for seed in range(first, last):
            set_grads(params, seed)
            if seed % 4 < 2:
                params[1].grad = None  # joins late
            if 4 <= seed < 8:
                params[2].grad = None  # misses the second cycle
            optimizer.step()
            optimizer.zero_grad()

    steps(params, optimizer, 0, taken)
    saved, weights = reload(optimizer.state_dict()), reload(values(params))
    steps(params, optimizer, taken, 12)

    others, resumed = build((5, 3), (7,), (2,), dtype=dtype, backend=backend, amsgrad=True)
    run(resumed, others, 2)  # a past of its own
    if order == "optimizer first":
        resumed.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(others, weights, strict=True):
            p.copy_(value)
    if order == "model first":
        resumed.load_state_dict(saved)
    assert resumed.cycle_position == taken % 4
    steps(others, resumed, taken, 12)
    assert_same(everything(params, optimizer), everything(others, resumed))
    assert optimizer.metrics() == resumed.metrics()


def test_state_exists_from_construction_and_is_inert(backend, dtype):
    params, optimizer = build(dtype=dtype, backend=backend, amsgrad=True)
    keys = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} | ({"remainder"} if dtype.itemsize == 2 else set())
    for p in params:
        state = optimizer.state[p]
        assert set(state) == keys
        assert state["step"] == 0
        assert state["step"].dtype == torch.float32
        assert state["exp_avg"].shape == p.shape
        assert not state["exp_avg"].any()
        assert state["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_keys_in_mid_cycle(backend, dtype):
    params, optimizer = build(dtype=dtype, backend=backend)
    groups = set(optimizer.state_dict()["param_groups"][0])
    set_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    state = optimizer.state_dict()
    keys = {"exp_avg", "exp_avg_sq", "step", "displacement"} | ({"remainder"} if dtype.itemsize == 2 else set())
    assert set(state["state"][0]) == set(state["state"][1]) == keys
    assert state["state"][0]["displacement"].dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert state["state"][0]["displacement"].any()
    assert not state["state"][1]["displacement"].any()  # has not moved
    assert set(state["param_groups"][0]) == groups
    run(optimizer, params, 3)
    assert set(state["state"][0]) == keys  # what was handed out stays
    assert "displacement" not in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize(
    ("steps", "given", "kept"),
    [
        (2, None, torch.bfloat16),
        (32, None, torch.bfloat16),
        (33, None, torch.float32),
        (4, torch.float32, torch.float32),
        (99, torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_a_displacement_is_kept_in(backend, steps, given, kept):
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        params, optimizer = build((5,), dtype=dtype, backend=backend, inner_steps=steps, displacement_dtype=given)
        run(optimizer, params, 1)
        shown = optimizer.state[params[0]]["displacement"]
        if dtype.is_complex:  # there are no complex numbers of bfloat16
            assert shown.shape == ((5, 2) if kept == torch.bfloat16 else (5,))
            assert shown.dtype == (torch.complex64 if kept == torch.float32 else kept)
        else:
            assert (shown.shape, shown.dtype) == ((5,), torch.float64 if dtype == torch.float64 else kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32], ids=str)
def test_displacements_of_the_other_dtype_are_loaded(backend, dtype, kept):
    """float32 is rounded to bfloat16, the reverse is widened."""
    other = torch.float32 if kept == torch.bfloat16 else torch.bfloat16
    params, optimizer = build(dtype=dtype, backend=backend, displacement_dtype=other)
    run(optimizer, params, 2)
    copies, loaded = build(dtype=dtype, backend=backend, displacement_dtype=kept)
    loaded.load_state_dict(reload(optimizer.state_dict()))
    for p, q in zip(params, copies, strict=True):
        given, taken = (o.state[t]["displacement"] for o, t in ((optimizer, p), (loaded, q)))
        given, taken = (torch.view_as_real(t) if t.is_complex() else t for t in (given, taken))
        assert taken.dtype == kept
        assert_same([taken], [given.to(kept)])


class TestAdamW:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_its_state_loads(self, backend, dtype, amsgrad):
        params = make_params((5, 3), (7,), dtype=dtype)
        adamw = torch.optim.AdamW(params, lr=3e-3, betas=(0.8, 0.9), amsgrad=amsgrad)
        run(adamw, params, 3)
        optimizer = NexusAdamW(params, lr=1e-2, inner_lr=0.07, backend=backend)
        optimizer.load_state_dict(reload(adamw.state_dict()))
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["inner_lr"], group["amsgrad"]) == (
            3e-3,
            (0.8, 0.9),
            0.07,
            amsgrad,
        )
        assert group["base_lr"] == 1e-2
        for p in params:
            assert optimizer.state[p]["step"] == 3
            assert_same([optimizer.state[p]["exp_avg"].to(dtype)], [adamw.state[p]["exp_avg"]])
        run(optimizer, params, 4)
        assert optimizer.state[params[0]]["step"] == 4

    def test_ours_loads_into_it(self, backend):
        params, optimizer = build(backend=backend)
        run(optimizer, params, 4)
        adamw = torch.optim.AdamW(params)
        adamw.load_state_dict(reload(optimizer.state_dict()))
        assert_same([adamw.state[p]["exp_avg_sq"] for p in params], [optimizer.state[p]["exp_avg_sq"] for p in params])
        run(adamw, params, 1)
        assert adamw.state[params[0]]["step"] == 2

    def test_schedulers_peak_becomes_base_lr(self, backend):
        params = make_params((3,))
        adamw = torch.optim.AdamW(params, lr=1e-3)
        torch.optim.lr_scheduler.OneCycleLR(adamw, max_lr=0.5, total_steps=10)
        optimizer = NexusAdamW(params, backend=backend)
        optimizer.load_state_dict(adamw.state_dict())
        assert optimizer.param_groups[0]["base_lr"] == 0.5


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_loading_never_narrows(self, backend, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, 4)
        others, loaded = build(dtype=dtype, backend=backend)
        loaded.load_state_dict(reload(optimizer.state_dict()))
        for p, q in zip(params, others, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                assert loaded.state[q][key].dtype == torch.float32
                assert_same([loaded.state[q][key]], [optimizer.state[p][key]])
            bits = [o.state[t]["remainder"].view(torch.int16) for o, t in ((optimizer, p), (loaded, q))]
            assert bits[0].any()
            assert_same(bits[:1], bits[1:])

    def test_a_missing_remainder_is_zero_at_a_boundary(self, backend):
        params, optimizer = build(dtype=torch.bfloat16, backend=backend)
        run(optimizer, params, 4)
        state = optimizer.state_dict()
        for entry in state["state"].values():
            del entry["remainder"]
        optimizer.load_state_dict(state)
        assert_same([exact(optimizer, p) for p in params], [p.detach().float() for p in params])
        run(optimizer, params, 1)
        state = optimizer.state_dict()
        del state["state"][0]["remainder"]
        with pytest.raises(ValueError, match="parameter 0 of group 0 has no 'remainder'"):
            optimizer.load_state_dict(state)

    def test_missing_entry_is_zero_state(self, backend, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, 4)
        state = optimizer.state_dict()
        del state["state"][0]
        optimizer.load_state_dict(state)
        assert optimizer.state[params[0]]["step"] == 0
        assert not optimizer.state[params[0]]["exp_avg"].any()
        assert optimizer.state[params[1]]["step"] == 1


class TestOuterWeights:
    @pytest.mark.parametrize("taken", range(5))
    def test_theta_is_shown_and_the_walk_comes_back(self, backend, dtype, taken):
        params, optimizer = build((5, 3), (7,), (2,), dtype=dtype, backend=backend)
        run(optimizer, params, 4)
        theta = [exact(optimizer, p) for p in params]
        run(optimizer, params[:2], taken, 4)
        if taken == 4:
            theta = [exact(optimizer, p) for p in params]
        walk, state = values(params), copy.deepcopy(optimizer.state_dict())
        with optimizer.outer_weights():
            shown = [exact(optimizer, p) for p in params]
            assert_theta(shown, theta, longest=0.15)
            if taken in (0, 4):
                assert_same(shown, theta)
            else:
                assert not any(map(torch.equal, values(params[:2]), walk[:2]))
            inside = reload(optimizer.state_dict())
            with pytest.raises(RuntimeError, match="outer_weights"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="outer_weights"):
                optimizer.load_state_dict(inside)
        assert_same(values(params), walk)
        torch.testing.assert_close(by_bits(optimizer.state_dict()), by_bits(state), rtol=0, atol=0)
        assert inside["param_groups"][0]["cycle_position"] == 0
        assert "displacement" not in inside["state"][0]

    def test_model_and_optimizer_saved_inside_belong_together(self, backend, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, 4)
        others, other = build(dtype=dtype, backend=backend)
        run(optimizer, params, 2, 50)
        with optimizer.outer_weights():
            saved, weights = reload(optimizer.state_dict()), reload(values(params))
        with torch.no_grad():
            for p, value in zip(others, weights, strict=True):
                p.copy_(value)
        other.load_state_dict(saved)
        third, at_boundary = build(dtype=dtype, backend=backend)
        run(at_boundary, third, 4)
        run(at_boundary, third, 4, 60)
        run(other, others, 4, 60)
        assert_same(values(third), values(others))

    def test_an_error_inside_puts_the_walk_back(self, backend):
        params, optimizer = build(backend=backend)
        run(optimizer, params, 2)
        walk = values(params)
        with pytest.raises(ZeroDivisionError), optimizer.outer_weights():
            raise ZeroDivisionError
        assert_same(values(params), walk)
        run(optimizer, params, 2)
        assert optimizer.at_boundary


class TestEvalAndTrain:
    """The same in two calls, for trainers that make them."""

    @pytest.mark.parametrize("taken", range(5))
    def test_theta_is_shown_and_the_walk_comes_back(self, backend, dtype, taken):
        (params, optimizer), (others, plain) = (build((5, 3), (7,), (2,), dtype=dtype, backend=backend) for _ in "ab")
        for one, its in ((optimizer, params), (plain, others)):
            run(one, its, 4)
            run(one, its[:2], taken, 4)
        with plain.outer_weights():
            theta, at_boundary = values(others), reload(plain.state_dict())
        optimizer.train()
        for _ in range(2):
            optimizer.eval()
            assert_same(values(params), theta)
        with pytest.warns(UserWarning, match=f"leaves out {taken} micro") if taken % 4 else contextlib.nullcontext():
            state = reload(optimizer.state_dict())
        torch.testing.assert_close(by_bits(state), by_bits(at_boundary), rtol=0, atol=0)
        for _ in range(2):
            optimizer.train()
            assert_same(values(params), values(others))
        run(optimizer, params, 7, 20)
        run(plain, others, 7, 20)
        assert_same(everything(params, optimizer), everything(others, plain))

    @pytest.mark.parametrize("taken", [0, 2])
    def test_what_would_move_or_lose_the_walk_is_refused(self, taken):
        params, optimizer = build()
        run(optimizer, params, taken)
        state = reload(optimizer.state_dict())
        set_grads(params, 9)
        optimizer.eval()
        theta = values(params)
        refused = {
            "step()": optimizer.step,
            "outer_step()": optimizer.outer_step,
            "add_param_group()": lambda: optimizer.add_param_group({"params": make_params((2,))}),
            "materialize_displacements()": optimizer.materialize_displacements,
        }
        if taken:
            refused["load_state_dict()"] = lambda: optimizer.load_state_dict(state)
            refused["copying or pickling the optimizer"] = lambda: copy.deepcopy(optimizer)
        for what, call in refused.items():
            with pytest.raises(RuntimeError, match=re.escape(f"{what} after eval()") + r".* call train\(\)"):
                call()
        assert_same(values(params), theta)
        optimizer.train()
        optimizer.step()
        assert optimizer.cycle_position == taken + 1

    def test_at_a_boundary_nothing_is_lost_by_a_load_or_a_copy(self):
        """Accelerate loads the optimizer's own state when it prepares it, maybe after an evaluation."""
        (params, optimizer), (others, other) = build(), build()
        run(other, others, 2)
        optimizer.eval()
        copied = copy.deepcopy(optimizer)
        run(copied, copied.param_groups[0]["params"], 1)  # a copy is in train()
        optimizer.load_state_dict(reload(other.state_dict()))
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                p.copy_(q)
        assert "displacement" in optimizer.state[params[0]]
        optimizer.train()
        run(optimizer, params, 5, 2)
        run(other, others, 5, 2)
        assert_same(everything(params, optimizer), everything(others, other))

    def test_at_a_boundary_the_model_may_have_been_converted(self):
        """The Hugging Face Trainer converts it before it calls eval(), when training is over (bf16_full_eval)."""
        params, optimizer = build()
        run(optimizer, params, 4)
        for p in params:
            p.data = p.data.bfloat16()
        optimizer.eval()

    def test_it_warns_once_and_only_of_what_is_left_out(self):
        params, optimizer = build()
        run(optimizer, params, 3)
        optimizer.eval()
        with optimizer.outer_weights():
            optimizer.state_dict()
        with pytest.warns(UserWarning, match=r"leaves out 3 micro-batch.*save before eval\(\)") as seen:
            optimizer.state_dict()
        assert seen[0].filename == __file__
        optimizer.state_dict()

    def test_with_outer_weights(self):
        """Whoever came first says how long θ stays."""
        params, optimizer = build()
        run(optimizer, params, 2)
        walk = values(params)
        with optimizer.outer_weights():
            theta = values(params)
            optimizer.eval()
            optimizer.train()
            with optimizer.outer_weights():
                assert_same(values(params), theta)
            assert_same(values(params), theta)
            with pytest.raises(RuntimeError, match=r"inside outer_weights\(\).* leave the with block"):
                optimizer.step()
        assert_same(values(params), walk)
        optimizer.eval()
        with optimizer.outer_weights():
            assert_same(values(params), theta)
        assert_same(values(params), theta)
        with pytest.raises(RuntimeError, match=r"after eval\(\)"):
            optimizer.step()
        optimizer.train()
        assert_same(values(params), walk)

    def test_unfrozen_after_eval_at_a_boundary(self):
        """A distributed checkpoint needs the state of each parameter that trains."""
        params, optimizer = build()
        late = make_params((3,))[0].requires_grad_(False)
        optimizer.add_param_group({"params": [late]})
        optimizer.eval()
        late.requires_grad_(True)
        assert 2 in optimizer.state_dict()["state"]
        optimizer.train()
        run(optimizer, [*params, late], 4)
        assert optimizer.state[late]["step"] == 1


@pytest.mark.parametrize("taken", [0, 2, 4])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alone(backend, dtype, taken, how):
    params, optimizer = build(dtype=dtype, backend=backend)
    run(optimizer, params, taken)
    others, copied = how((params, optimizer))
    assert copied.param_groups[0]["params"][0] is others[0]
    run(optimizer, params, 6, 20)
    run(copied, others, 6, 20)
    assert_same(everything(params, optimizer), everything(others, copied))
    assert params[0].data_ptr() != others[0].data_ptr()


class TestDistributedCheckpointCode:
    """torch.distributed.checkpoint.state_dict in one process: the code that trainers run."""

    @pytest.mark.parametrize("flatten", [False, True])
    @pytest.mark.parametrize("taken", [0, 3, 5])
    def test_round_trip(self, backend, dtype, flatten, taken):
        def make():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).to(dtype)
            model[2].weight.requires_grad_(False)
            groups = [
                {"params": model[0].parameters()},
                {"params": [*model[1].parameters(), *model[2].parameters()]},
            ]
            return model, NexusAdamW(groups, backend=backend)

        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model, optimizer = make()
        params = [p for p in model.parameters() if p.requires_grad]
        run(optimizer, params[:-1], taken)
        steps = [int(optimizer.state[p]["step"]) for p in params]
        state = reload(get_optimizer_state_dict(model, optimizer, options=options))
        assert [int(optimizer.state[p]["step"]) for p in params] == steps  # no artificial step was counted
        other_model, other = make()
        if taken % 4:
            other.materialize_displacements()
        set_optimizer_state_dict(other_model, other, state, options=options)
        other_model.load_state_dict(model.state_dict())
        others = [p for p in other_model.parameters() if p.requires_grad]
        run(optimizer, params, 6, 30)
        run(other, others, 6, 30)
        assert_same(everything(params, optimizer), everything(others, other))

    def test_materialized_displacements_are_dropped_at_a_boundary(self, backend, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        boundary = reload(optimizer.state_dict())
        optimizer.materialize_displacements()
        assert not any(optimizer.state[p]["displacement"].any() for p in params)
        optimizer.load_state_dict(boundary)
        assert not any("displacement" in optimizer.state[p] for p in params)


class TestOwnStateLoadsBack:
    """Whatever happened before, an optimizer accepts its own state."""

    def test_unfrozen_in_mid_cycle(self, backend, dtype):
        a, b = make_params((3,), (4,), dtype=dtype)
        b.requires_grad_(False)
        optimizer = NexusAdamW([a, b], backend=backend)
        run(optimizer, [a], 2)
        b.requires_grad_(True)
        optimizer.load_state_dict(reload(optimizer.state_dict()))
        run(optimizer, [a, b], 2)
        assert optimizer.state[b]["step"] == 1

    def test_amsgrad_switched_on_before_a_step(self, backend):
        params, optimizer = build(backend=backend)
        run(optimizer, params, 4)
        optimizer.param_groups[0]["amsgrad"] = True
        optimizer.load_state_dict(reload(optimizer.state_dict()))
        run(optimizer, params, 4)

    def test_it_is_a_moment_not_a_view_of_the_cycle(self, backend):
        """What was handed out in mid-cycle keeps its walk length while training goes on."""
        params, optimizer = build(backend=backend)
        run(optimizer, params, 2)
        group = optimizer.state_dict()["param_groups"][0]
        run(optimizer, params, 1)
        assert float(group["walk_length"]) == pytest.approx(0.1)

    def test_metrics_travel_with_a_copy(self, backend):
        params, optimizer = build(backend=backend)
        run(optimizer, params, 5)
        assert copy.deepcopy(optimizer).metrics() == optimizer.metrics()

    def test_post_hook_with_another_structure(self, backend):
        params, optimizer = build(backend=backend)
        run(optimizer, params, 1)
        optimizer.register_state_dict_post_hook(lambda _, state: {"optim": state})
        assert set(optimizer.state_dict()) == {"optim"}


def test_resume_after_a_late_unfreeze_is_bit_for_bit(backend):
    """The norm is summed in the groups' order, whenever a parameter got its state."""
    params = make_params((50,), (37,), (29,), dtype=torch.float64)
    params[0].requires_grad_(False)
    optimizer = NexusAdamW(params, lr=1e-2, inner_lr=0.05, backend=backend)
    run(optimizer, params[1:], 2)
    params[0].requires_grad_(True)
    run(optimizer, params, 3, 2)
    assert [s.index for s in inside.only_table(optimizer).segments] == [0, 1, 2]
    others, other = build((50,), (37,), (29,), dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(reload(optimizer.state_dict()))
    run(optimizer, params, 40, 5)
    run(other, others, 40, 5)
    assert_same(values(params), values(others))


def test_outer_weights_leaves_materialized_displacements(backend):
    params, optimizer = build(backend=backend)
    optimizer.materialize_displacements()
    with optimizer.outer_weights():
        assert "displacement" not in optimizer.state_dict()["state"][0]
    assert "displacement" in optimizer.state[params[0]]


def test_maxima_that_came_with_another_group_are_in_the_state(backend):
    """amsgrad is switched on and a group added before the next step."""
    params, optimizer = build(backend=backend)
    run(optimizer, params, 4)
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.add_param_group({"params": make_params((3,))})
    run(optimizer, params, 4)
    assert all(optimizer.state[p]["max_exp_avg_sq"].any() for p in params)
    optimizer.load_state_dict(reload(optimizer.state_dict()))


@pytest.mark.parametrize("how", ["unfrozen", "a group"])
def test_parameters_that_come_to_materialized_displacements_have_them(backend, how):
    (a,), (b,) = make_params((3,)), make_params((4,))
    b.requires_grad_(how == "a group")
    optimizer = NexusAdamW([a] if how == "a group" else [a, b], backend=backend)
    optimizer.materialize_displacements()
    if how == "a group":
        optimizer.add_param_group({"params": [b]})
    b.requires_grad_()
    run(optimizer, [a, b], 1)
    assert optimizer.state[b]["displacement"].any()
    optimizer.load_state_dict(reload(optimizer.state_dict()))


def test_groups_put_behind_the_known_ones_are_added(backend):
    """Lightning's BaseFinetuning, on its way to resume, assigns the groups of the checkpoint."""
    a, b, c = make_params((3,), (4,), (5,))
    whole = NexusAdamW([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=1e-2, inner_lr=0.05, backend=backend)
    run(whole, [a, b], 6)
    a2, b2, c2 = make_params((3,), (4,), (5,))
    optimizer = NexusAdamW([a2], lr=1e-2, inner_lr=0.05, backend=backend)
    groups = [{**group, "params": [p]} for group, p in zip(whole.param_groups, (a2, b2), strict=True)]
    optimizer.param_groups = groups
    optimizer.load_state_dict(copy.deepcopy(whole.state_dict()))
    for p, q in ((a, a2), (b, b2)):
        q.data.copy_(p.data)
    run(whole, [a, b], 6, 20)
    run(optimizer, [a2, b2], 6, 20)
    assert_same(values([a, b]), values([a2, b2]))
    good, bad = {"params": [c2], "lr": 0.25}, {"params": [c], "lr": -1.0}
    groups = optimizer.param_groups  # as wrappers of frameworks hold it
    groups += [good, bad]
    with optimizer.outer_weights():
        pass
    for _ in range(2):
        with pytest.raises(ValueError, match="lr of parameter group 3 must be >= 0"):
            optimizer.step()
    assert optimizer.param_groups[2] is good
    assert optimizer.param_groups[3] is bad
    bad["lr"] = 1.0
    run(optimizer, [a2, b2, c2, c], 4, 40)
    assert good["inner_lr"] == bad["inner_lr"] == 0.05
    assert [optimizer.state[p]["step"] for p in (a2, c2, c)] == [4, 1, 1]
    assert optimizer.param_groups is groups
    later, last = make_params((2,), (2,))
    groups.append({"params": [later]})
    optimizer.add_param_group({"params": [last]})
    run(optimizer, [later, last], 4)
    assert optimizer.state[later]["step"] == optimizer.state[last]["step"] == 1


@pytest.mark.parametrize("empty", [False, True])
def test_bookkeeping_does_not_grow_with_groups_times_inner_steps(backend, empty):
    """Two views in each group, and once what belongs to the optimizer; all in one copy of what goes on changing."""
    params = make_params(*[(3,)] * 5)
    optimizer = NexusAdamW([{"params": []}] * empty + [{"params": p} for p in params], backend=backend, inner_steps=8)
    run(optimizer, params, 3)
    state = optimizer.state_dict()
    first = int(empty)
    tensors = []
    for index, group in enumerate(state["param_groups"]):
        assert ("grad_norms" in group) == ("skipped_inner_steps" in group) == (index == first)
        tensors += [group["walk_length"], group["walk_sq_length"], *group.get("grad_norms", [])]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    before = [t.clone() for t in tensors]
    run(optimizer, params, 2)
    assert_same(tensors, before)
    others = make_params(*[(3,)] * 5)
    other = NexusAdamW([{"params": []}] * empty + [{"params": p} for p in others], backend=backend, inner_steps=8)
    other.load_state_dict(reload(state))
    assert_same(other.param_groups[first]["grad_norms"], state["param_groups"][first]["grad_norms"])
    assert [float(g["walk_length"]) for g in other.param_groups[first:]] == pytest.approx([0.03] * 5)


class TestLazyParameters:
    """Those of nn.LazyLinear wait, as frozen ones do, until a forward pass or a load gives them a shape."""

    def make(self, lazy, **options):
        torch.manual_seed(1)
        first, second = (nn.LazyLinear(4), nn.LazyLinear(1)) if lazy else (nn.Linear(6, 4), nn.Linear(4, 1))
        model = nn.Sequential(first, nn.Linear(4, 4), second)
        optimizer = NexusAdamW(model[:2].parameters(), **options)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
        return model, optimizer

    def train(self, model, optimizer, steps):
        for seed in range(steps):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(seed)
            model(torch.randn(3, 6, generator=generator)).square().sum().backward()
            optimizer.step()
        return values(model.parameters())

    @pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
    def test_train_like_any_other(self, backend, how):
        lazy = self.make(True, backend=backend)
        optimizer = lazy[1]
        assert "Parameter Group 1" in repr(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.materialize_displacements()
        optimizer.step()  # without any gradient
        with optimizer.outer_weights():
            pass
        optimizer.outer_step()
        assert [bool(optimizer.state.get(p)) for g in optimizer.param_groups for p in g["params"]] == [
            *[False] * 2, *[True] * 2, *[False] * 2,
        ]  # fmt: skip
        if how == "deepcopy":
            lazy = copy.deepcopy(lazy)
        elif how == "pickle":
            lazy = pickle.loads(pickle.dumps(lazy))
        lazy[0](torch.zeros(1, 6))  # shapes come
        plain = self.make(False, backend=backend)
        plain[0].load_state_dict(lazy[0].state_dict())
        assert_same(self.train(*lazy, 9), self.train(*plain, 9))

    def test_a_state_is_loaded_after_the_weights(self, backend):
        model, optimizer = self.make(True, backend=backend)
        self.train(model, optimizer, 6)
        other_model, other = self.make(True, backend=backend)
        with pytest.raises(ValueError, match=r"parameter 0 of group 0, which is not initialized yet: load the model's"):
            other.load_state_dict(optimizer.state_dict())
        other_model.load_state_dict(model.state_dict())
        other.load_state_dict(optimizer.state_dict())
        assert_same(self.train(other_model, other, 3), self.train(model, optimizer, 3))

    def test_ranks_compare_them(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model, optimizer = self.make(True, displacement_group=torch.distributed.group.WORLD)
            optimizer.check_ranks()
            self.train(model, optimizer, 5)
            optimizer.check_ranks()
        finally:
            torch.distributed.destroy_process_group()
