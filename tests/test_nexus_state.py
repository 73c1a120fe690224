"""Nexus: states saved, loaded, copied and changed by others; what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import DTYPES, assert_same, make_params, run, set_grads, values
from inside import segments
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from wrapped import OPTIONS, SHAPES, build, saved, split

from nexus_fused import Nexus, NexusAdamW, backends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_resume(dtype, at, copied):
    """Bit for bit, from a boundary and from mid-cycle."""
    params, _, optimizer = build(dtype=dtype)
    run(optimizer, params, at)
    if copied == "state_dict":
        others, _, other = build(dtype=dtype)
        state = saved(optimizer)
        with torch.no_grad():
            for p, q in zip(others, params, strict=True):
                p.copy_(q)
        other.load_state_dict(state)
    else:
        other = copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        others = other.param_groups[0]["params"]
        assert other.metrics() == optimizer.metrics()
    run(optimizer, params, 5, first_seed=at)
    run(other, others, 5, first_seed=at)
    assert_same(values(params), values(others))
    assert str(optimizer.state_dict()) == str(other.state_dict())


def test_state_dict_is_theirs_in_order_with_ours():
    params, (sgd, _), optimizer = split()
    run(optimizer, params, 5)
    state = optimizer.state_dict()
    assert list(state["state"][0]) == ["momentum_buffer", "displacement"]
    assert list(state["state"][3]) == ["step", "exp_avg", "exp_avg_sq", "displacement"]
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    assert state["param_groups"][1]["weight_decay"] == 0.1
    assert [group["nexus_optimizer"] for group in state["param_groups"]] == [0, 1]
    assert list(sgd.state[params[0]]) == ["momentum_buffer"], "ours stay out of it where nobody looks"
    assert list(optimizer.state[params[0]]) == ["momentum_buffer", "displacement"]
    run(optimizer, params, 3, first_seed=5)
    assert list(optimizer.state[params[0]]) == ["momentum_buffer"]


def test_who_looks_at_the_state_may_change_it():
    """In the first cycle too, whose entries are the optimizer's to make."""
    params, inner, optimizer = build()
    others, _, other = build()
    run(optimizer, params, 2)
    run(other, others, 2)
    for p in params:
        optimizer.state[p]["displacement"] = optimizer.state[p]["displacement"].clone()
    run(optimizer, params, 2, first_seed=2)
    run(other, others, 2, first_seed=2)
    assert_same(values(params), values(others))
    assert inner.state[params[0]]["step"] == 1
    assert len(optimizer.state) == len(params)


def test_entries_that_others_replace():
    """Their content is adopted, in the first cycle and later; nothing of ours stays there."""
    params, inner, optimizer = build()
    others, _, other = build()
    for taken in (0, 4):
        run(optimizer, params, 2, first_seed=taken)
        run(other, others, 2, first_seed=taken)
        for p, entry in optimizer.state.items():
            optimizer.state[p] = {key: value.clone() for key, value in entry.items()}
        run(optimizer, params, 2, first_seed=taken + 2)
        run(other, others, 2, first_seed=taken + 2)
        assert_same(values(params), values(others))
        assert list(inner.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]
    run(optimizer, params, 2, first_seed=8)
    for p, entry in optimizer.state.items():
        optimizer.state[p] = {**entry, "displacement": torch.zeros_like(entry["displacement"])}
    assert not any(entry["displacement"].any() for entry in optimizer.state_dict()["state"].values())


def test_state_of_one_that_has_none():
    """As torch.optim's: an entry is made; the walk is no reason for one."""
    params, _, optimizer = build()
    assert not optimizer.state
    assert optimizer.state.get(params[0]) is None
    assert optimizer.state[params[0]] == {}
    with pytest.raises(AttributeError, match="behind the walk"):
        optimizer.state = {}


def test_what_an_optimizer_saves_by_itself_is_its_own():
    params, inner, optimizer = build()
    run(optimizer, params, 2)
    assert optimizer.state[params[0]].keys() == {"displacement"}
    alone = torch.optim.AdamW(make_params(*SHAPES), **OPTIONS)
    state = inner.state_dict()
    assert state["state"] == {}
    assert set(state["param_groups"][0]) == set(alone.state_dict()["param_groups"][0])
    alone.load_state_dict(state)
    run(alone, alone.param_groups[0]["params"], 1)


def test_a_copy_leaves_the_original_alone():
    params, _, optimizer = build()
    run(optimizer, params, 2)
    state = optimizer.state
    other = copy.deepcopy(optimizer)
    assert state[params[0]].keys() == {"displacement"}
    assert other.optimizers[0].state == {}
    state[params[0]]["displacement"] = torch.zeros_like(state[params[0]]["displacement"])
    assert not optimizer.state_dict()["state"][0]["displacement"].any(), "what its holder writes is still noticed"


def test_what_optimizers_save_beside(tmp_path):
    """Of each its own, also under one name."""

    class Tagged(torch.optim.SGD):
        tag = "none"

        def state_dict(self):
            return {**super().state_dict(), "tag": self.tag}

        def load_state_dict(self, state_dict):
            self.tag = state_dict["tag"]
            super().load_state_dict(state_dict)

    params = make_params((3,), (4,))
    inner = Tagged(params[:1], lr=0.1), Tagged(params[1:], lr=0.1)
    optimizer = Nexus(*inner)
    inner[0].tag, inner[1].tag = "A", "B"
    inner[0].state["loose"] = torch.ones(2)
    state = saved(optimizer)
    inner[0].tag = inner[1].tag = "C"
    inner[0].state.clear()
    optimizer.load_state_dict(state)
    assert (inner[0].tag, inner[1].tag) == ("A", "B")
    assert inner[0].state["loose"].tolist() == [1, 1]
    assert "loose" not in inner[1].state


def test_adamw_and_nexus_adamw_load_it():
    """The key that says whose group it is does not make others' groups ours."""
    params, _, optimizer = build()
    run(optimizer, params, 4)
    others = make_params(*SHAPES)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    fused = NexusAdamW(others, **OPTIONS, inner_lr=0.05)
    fused.load_state_dict(optimizer.state_dict())
    assert "nexus_optimizer" not in fused.param_groups[0]
    run(optimizer, params, 8, first_seed=4)
    run(fused, others, 8, first_seed=4)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="nexus_optimizer"):
        NexusAdamW([{"params": make_params((2,)), "nexus_optimizer": 0}])
    params, _, optimizer = build()
    optimizer.param_groups[0]["optimizer"] = "theirs"
    run(optimizer, params, 4)
    assert optimizer.param_groups[0]["optimizer"] == "theirs"


def test_it_is_freed_with_its_memory():
    """Without a garbage collection; and its hooks are gone from the optimizer."""
    params, inner, optimizer = build()
    run(optimizer, params, 2)
    D = weakref.ref(segments(optimizer)[0].bucket.buffers["displacement"])
    gc.disable()
    try:
        del optimizer
        assert D() is None
    finally:
        gc.enable()
    assert not inner._optimizer_step_post_hooks
    assert not inner._optimizer_state_dict_post_hooks


def test_a_plain_state_loads():
    """One of the optimizer alone, and at a boundary into it alone."""
    params, inner, optimizer = build()
    run(optimizer, params, 4)
    others = make_params(*SHAPES)
    alone = torch.optim.AdamW(others, **OPTIONS)
    alone.load_state_dict(optimizer.state_dict())
    assert alone.state[others[0]]["step"] == 1
    optimizer.load_state_dict(alone.state_dict())
    params, inner, optimizer = build()
    plain = torch.optim.AdamW(make_params(*SHAPES), **OPTIONS)
    run(plain, plain.param_groups[0]["params"], 3)
    optimizer.load_state_dict(plain.state_dict())
    assert inner.state[params[0]]["step"] == 3
    assert optimizer.param_groups[0]["inner_lr"] == 0.05


def test_an_optimizer_loads_its_own_at_a_boundary():
    """The walk's options that the load drops are put back."""
    params, inner, optimizer = build(inner_lr=0.07)
    optimizer.param_groups[0]["inner_lr"] = 0.03
    state = torch.optim.AdamW(make_params(*SHAPES), **{**OPTIONS, "lr": 0.02}).state_dict()
    inner.load_state_dict(state)
    assert "inner_lr" not in inner.param_groups[0]
    assert optimizer.param_groups[0]["inner_lr"] == 0.03
    assert optimizer.param_groups[0]["lr"] == 0.02
    run(optimizer, params, 4)


def test_a_second_nexus_that_cannot_be_built(monkeypatch):
    """Leaves the first as it was."""
    params, inner, optimizer = build()
    run(optimizer, params, 5)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "why_not", lambda name, *_: None if name == "reference" else "not here")
        with pytest.raises(RuntimeError, match="not here"):
            Nexus(inner, backend="cpu")
    run(optimizer, params, 3, first_seed=5)


def test_a_state_with_other_inner_steps_loads_into_an_optimizer_alone():
    params, inner, optimizer = build()
    run(optimizer, params, 4)
    _, _, other = build(inner_steps=8)
    inner.load_state_dict(other.state_dict())
    run(optimizer, params, 4)


def test_a_second_nexus_around_the_same():
    params, inner, optimizer = build(inner_lr=0.05)
    run(optimizer, params, 4)
    again = Nexus(inner, inner_lr=0.2, inner_steps=2)
    assert again.param_groups[0]["inner_lr"] == 0.2
    run(again, params, 2)
    assert inner.state[params[0]]["step"] == 2


class TestDistributedCheckpoint:
    """What torch.distributed.checkpoint does to have something to load into."""

    def parts(self, taken, kind=torch.optim.AdamW, materialized=False):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        optimizer = Nexus(
            kind(model.parameters(), lr=0.01, momentum=0.9) if kind is torch.optim.SGD else kind(model.parameters())
        )
        if materialized:
            optimizer.materialize_displacements()
        run(optimizer, list(model.parameters()), taken)
        return model, optimizer

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    @pytest.mark.parametrize("at", [4, 6])
    def test_a_fresh_process_loads(self, kind, at):
        model, optimizer = self.parts(at, kind)
        state = copy.deepcopy(dcp.get_state_dict(model, optimizer))
        fresh, other = self.parts(0, kind, materialized=at == 6)
        _, own = dcp.get_state_dict(fresh, other)
        assert other.cycle_position == 0
        assert set(own["state"]) == set(state[1]["state"])
        for name, entry in state[1]["state"].items():
            assert set(own["state"][name]) == set(entry)
        dcp.set_state_dict(fresh, other, model_state_dict=state[0], optim_state_dict=state[1])
        assert other.cycle_position == at % 4
        run(optimizer, list(model.parameters()), 5, first_seed=at)
        run(other, list(fresh.parameters()), 5, first_seed=at)
        assert_same(values(model.parameters()), values(fresh.parameters()))

    def test_an_optimizer_without_state(self):
        """Its state is empty at each save, also in mid-cycle."""
        model, _ = self.parts(0)
        optimizer = Nexus(torch.optim.SGD(model.parameters(), lr=0.1))
        for taken in (0, 1, 2, 3, 0):
            before = values(model.parameters())
            dcp.get_optimizer_state_dict(model, optimizer)
            assert optimizer.cycle_position == taken
            assert_same(values(model.parameters()), before)
            run(optimizer, list(model.parameters()), 1, first_seed=taken)

    def test_one_of_them_has_state_from_construction(self):
        def make():
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
            adagrad = torch.optim.Adagrad(model[1].parameters())
            return model, Nexus(torch.optim.AdamW(model[0].parameters()), adagrad)

        model, optimizer = make()
        run(optimizer, list(model.parameters()), 4)
        state = copy.deepcopy(dcp.get_state_dict(model, optimizer))
        fresh, other = make()
        dcp.set_state_dict(fresh, other, model_state_dict=state[0], optim_state_dict=state[1])
        assert other.optimizers[0].state[fresh[0].weight]["step"] == 1
        run(optimizer, list(model.parameters()), 5, first_seed=4)
        run(other, list(fresh.parameters()), 5, first_seed=4)
        assert_same(values(model.parameters()), values(fresh.parameters()))

    def test_a_warm_up_from_zero_is_no_initialization(self):
        params, _, optimizer = build()
        optimizer.param_groups[0]["lr"] = 0.0
        run(optimizer, params, 1)
        assert optimizer.cycle_position == 1

    def test_weights_stay(self):
        params, inner, optimizer = build()
        before = values(params)
        set_grads(params, 0)
        gradients = [p.grad for p in params]
        optimizer.materialize_displacements()
        assert_same(values(params), before)
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
        assert inner.param_groups[0]["lr"] == OPTIONS["lr"]
        assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "displacement"}


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda p: (), ValueError, "Nexus needs an optimizer"),
        (lambda p: ([torch.optim.SGD(p)],), TypeError, r"optimizer 0 \(list\).*Nexus\(\*optimizers"),
        (lambda p: (torch.optim.SGD(p), "SGD"), TypeError, r"optimizer 1 \(str\) is no torch.optim.Optimizer"),
        (lambda p: (torch.optim.SGD(p),) * 2, ValueError, None),
        (lambda p: (NexusAdamW(p),), TypeError, "walks by itself"),
        (lambda p: (torch.optim.LBFGS(p),), ValueError, r"optimizer 0 \(LBFGS\).*closure"),
        (lambda p: (torch.optim.SparseAdam(p),), ValueError, "sparse"),
        (lambda p: (torch.optim.SGD(p[:2]), torch.optim.AdamW(p[1:])), ValueError, "parameter 0 of group 1 appears"),
        (lambda p: (torch.optim.AdamW(p, differentiable=True),), ValueError, "differentiable=True of parameter group"),
    ],
)  # fmt: skip
def test_optimizers_that_cannot_follow(make, error, said):
    params = make_params((4,), (3,), (2,))
    optimizers = make(params)
    if said is None:
        optimizers, said = (optimizers[0], optimizers[0]), "given twice"
    before = [dict(group) for o in optimizers if isinstance(o, torch.optim.Optimizer) for group in o.param_groups]
    with pytest.raises(error, match=said):
        Nexus(*optimizers)
    after = [group for o in optimizers if isinstance(o, torch.optim.Optimizer) for group in o.param_groups]
    assert [list(group) for group in after] == [list(group) for group in before], "nothing was put into the groups"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"inner_lr": 0}, ValueError, "inner_lr"),
        ({"inner_steps": 0}, ValueError, "inner_steps"),
        ({"inner_lr": "1"}, TypeError, "inner_lr"),
        ({"displacement_dtype": torch.float16}, ValueError, "displacement_dtype"),
        ({"backend": "cude"}, ValueError, "unknown backend"),
        ({"normalize_displacement": 3}, TypeError, "normalize_displacement"),
    ],
)
def test_bad_options(options, error, said):
    params = make_params((4,))
    inner = torch.optim.SGD(params)
    with pytest.raises(error, match=said):
        Nexus(inner, **options)
    assert "inner_steps" not in inner.param_groups[0]


def test_a_backend_that_cannot_run(monkeypatch):
    """Found when the parameters get their tables: the optimizer's groups are as they were."""
    monkeypatch.setattr(backends, "why_not", lambda name, *_: None if name == "reference" else "not here")
    inner = torch.optim.SGD(make_params((4,)))
    before = list(inner.param_groups[0])
    with pytest.raises(RuntimeError, match="not here"):
        Nexus(inner, backend="cpu")
    assert list(inner.param_groups[0]) == before


def test_sparse_gradients():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Nexus(torch.optim.SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.cycle_position == 0


class TestMidCycle:
    """What only a boundary allows; nothing is modified, and a checkpoint goes on."""

    def check(self, params, optimizer, said, call=None):
        before, state = values(params), copy.deepcopy(optimizer.cycle_position)
        set_grads(params, 9)
        for method in [call] if call else [optimizer.step, optimizer.outer_step, optimizer.state_dict]:
            with pytest.raises((RuntimeError, ValueError), match=said):
                method()
        assert_same(values(params), before)
        assert optimizer.cycle_position == state

    def test_stepped(self):
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 6)
        state, weights = saved(optimizer), values(params)
        set_grads(params, 6)
        sgd.step()
        self.check(params, optimizer, r"optimizer 0 \(SGD\) was stepped in mid-cycle, after 2 of 4 .* checkpoint")
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for p, weight in zip(params, weights, strict=True):
                p.copy_(weight)
        run(optimizer, params, 2, first_seed=6)

    def test_stepped_at_a_boundary(self):
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 4)
        set_grads(params, 6)
        sgd.step()
        run(optimizer, params, 4)

    def test_loaded(self):
        params, (_, adamw), optimizer = split()
        run(optimizer, params, 5)
        adamw.load_state_dict(adamw.state_dict())
        self.check(params, optimizer, r"optimizer 1 \(AdamW\) was loaded in mid-cycle")

    def test_extended(self):
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 5)
        sgd.add_param_group({"params": make_params((3,), seed=3)})
        self.check(params, optimizer, "exchanged, added or removed in mid-cycle")
        del sgd.param_groups[1]  # and all is well again
        run(optimizer, params, 3, first_seed=5)

    def test_exchanged(self):
        params, (sgd, _), optimizer = split()
        run(optimizer, params, 5)
        sgd.param_groups[0]["params"].append(make_params((3,), seed=3)[0])
        self.check(params, optimizer, "exchanged, added or removed in mid-cycle")

    def test_a_state_of_another_number_of_optimizers(self):
        params, _, optimizer = split()
        run(optimizer, params, 5)
        state = saved(optimizer)
        both = Nexus(torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1))
        with pytest.raises(
            ValueError, match=r"is of 2 optimizer\(s\) with 2 parameter groups, this Nexus has 1 with 2"
        ):
            both.load_state_dict(state)
        run(both, params, 1)

    def test_a_state_that_an_optimizer_refuses(self):
        """What was loaded before it is as it was."""

        class Refuses(torch.optim.SGD):
            def load_state_dict(self, state_dict):
                raise ValueError("not this one")

        params = make_params(*SHAPES)
        inner = torch.optim.AdamW(params[:2], **OPTIONS), Refuses(params[2:], lr=0.1, momentum=0.9)
        optimizer = Nexus(*inner, inner_lr=0.05)
        run(optimizer, params, 4)
        state = saved(optimizer)
        run(optimizer, params, 5, first_seed=4)
        with pytest.raises(ValueError, match="not this one"):
            optimizer.load_state_dict(state)
        assert optimizer.cycle_position == 1
        assert inner[0].state[params[0]]["step"] == 2
        run(optimizer, params, 3)

    @pytest.mark.parametrize("change", ["displacement", "touched", "position"])
    def test_damaged(self, change):
        params, _, optimizer = split()
        run(optimizer, params, 5)
        state = saved(optimizer)
        if change == "displacement":
            del state["state"][1]["displacement"]
        elif change == "touched":
            del state["param_groups"][0]["touched"]
        else:
            state["param_groups"][1]["cycle_position"] = 2
        self.check(
            params, optimizer, "displacement|touched|different positions", lambda: optimizer.load_state_dict(state)
        )
