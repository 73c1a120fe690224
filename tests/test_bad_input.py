"""Bad input: an error that names the group and says what to do; weights, state and position stay as they were."""

from __future__ import annotations

import copy

import inside
import pytest
import torch
from conftest import (
    DTYPES,
    assert_same,
    assert_snapshot,
    build,
    make_params,
    run,
    set_grads,
    snapshot,
    values,
)
from torch import nn

from nexus_fused import NexusAdamW, backends

NAN = float("nan")

HYPERPARAMETERS = [
    (name, value, TypeError)
    for name in ("lr", "inner_lr", "eps", "weight_decay")
    for value in (True, "0.1", None, 1j, torch.tensor(True))
] + [
    (name, value, ValueError)
    for name in ("lr", "inner_lr", "eps", "weight_decay")
    for value in (NAN, -1.0, float("inf"), torch.tensor([0.1, 0.2]), torch.tensor(NAN))
]
HYPERPARAMETERS += [
    ("inner_lr", 0.0, ValueError),
    ("inner_lr", torch.tensor(0.0), ValueError),
    ("betas", (0.9,), TypeError),
    ("betas", 0.9, TypeError),
    ("betas", (0.9, True), TypeError),
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", (-0.1, 0.9), ValueError),
    ("inner_steps", 0, ValueError),
    ("inner_steps", -3, ValueError),
    ("inner_steps", 2.0, TypeError),
    ("inner_steps", True, TypeError),
    ("inner_steps", NAN, TypeError),
    ("inner_steps", "4", TypeError),
    ("amsgrad", "no", TypeError),
    ("maximize", 1.0, TypeError),
    ("normalize_displacement", None, TypeError),
    ("inner_lr_follows_lr", 0.5, TypeError),
    ("replicated", 1.0, TypeError),
    ("differentiable", True, ValueError),
    ("fused", "yes", TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), HYPERPARAMETERS, ids=str)
def test_hyperparameters(name, value, error):
    params = make_params((3,), (4,))
    pointers, before = [p.data_ptr() for p in params], values(params)
    with pytest.raises(error, match=name.replace("betas", r"betas|0\.9")):
        NexusAdamW(params, **{name: value})
    if name != "inner_steps":
        with pytest.raises(error, match=r"group 1"):
            NexusAdamW([{"params": params[:1]}, {"params": params[1:], name: value}])
        optimizer = NexusAdamW(params[:1])
        with pytest.raises(error, match=r"group 1"):
            optimizer.add_param_group({"params": params[1:], name: value})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": params[1:]})
        before_edit = snapshot(optimizer)
        original = optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        set_grads(params, 0)
        with pytest.raises(error, match=r"group 1"):
            optimizer.step()
        optimizer.param_groups[1][name] = original
        assert_snapshot(optimizer, before_edit)
    else:
        assert [p.data_ptr() for p in params] == pointers
    assert_same(values(params), before)


class TestParameters:
    def test_empty(self):
        with pytest.raises(ValueError, match="empty parameter list"):
            NexusAdamW([])

    def test_one_tensor_instead_of_a_list(self):
        with pytest.raises(TypeError, match="iterable"):
            NexusAdamW(nn.Parameter(torch.zeros(3)))

    @pytest.mark.parametrize(
        ("make", "error", "match"),
        [
            (lambda p: p * 2, ValueError, "non-leaf"),
            (lambda p: "weight", TypeError, "must be a tensor"),
            (lambda p: nn.Parameter(torch.zeros(3, dtype=torch.float8_e4m3fn)), TypeError, "float8"),
            (lambda p: nn.Parameter(torch.zeros(1).expand(3)), ValueError, "expanded"),
            (lambda p: nn.Parameter(torch.zeros(3, device="meta")), ValueError, "meta"),
            (lambda p: nn.Parameter(torch.eye(3).to_sparse()), ValueError, "sparse"),
        ],
    )
    def test_unusable(self, make, error, match):
        good = make_params((3,), (4,))
        bad = make(nn.Parameter(torch.ones(3)))
        with pytest.raises(error, match=f"parameter 1 of group 1.*{match}|{match}.*parameter 1 of group 1"):
            NexusAdamW([{"params": good[:1]}, {"params": [good[1], bad]}])

    def test_frozen_ones_may_be_anything(self):
        """Quantized, expanded, on meta: what AdamW accepts, since they are never updated."""
        frozen = [
            nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False),
            nn.Parameter(torch.zeros(1).expand(3), requires_grad=False),
            nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False),
        ]
        (p,) = make_params((3,))
        optimizer = NexusAdamW([*frozen, p])
        run(optimizer, [p], 4)
        optimizer.load_state_dict(optimizer.state_dict())
        frozen[1].requires_grad_(True)
        frozen[1].grad = torch.ones(3)
        with pytest.raises(ValueError, match="parameter 1 of group 0 is an expanded tensor"):
            optimizer.step()

    @pytest.mark.parametrize("edit", ["exchange", "remove", "state"])
    def test_edited_behind_our_back(self, edit):
        p, q = make_params((3,), (3,))
        optimizer = NexusAdamW([{"params": [p]}, {"params": [q]}])
        run(optimizer, [p, q], 1)
        if edit == "exchange":
            optimizer.param_groups[1]["params"][0] = nn.Parameter(torch.zeros(3))
        elif edit == "remove":
            optimizer.param_groups.pop()
        else:
            optimizer.state.clear()
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(RuntimeError, match=r"group 1 were exchanged|was removed from optimizer.state"):
                call()

    def test_in_two_groups(self):
        (p,) = make_params((3,))
        with pytest.raises(ValueError, match="more than one parameter group"):
            NexusAdamW([{"params": [p]}, {"params": [p]}])

    def test_twice_in_one_group(self):
        (p,), (q,) = make_params((3,)), make_params((3,))
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = NexusAdamW([p, p])
        other = NexusAdamW([q])
        run(optimizer, [p], 4)
        run(other, [q], 4)
        assert_same([p.detach()], [q.detach()])
        assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 1

    def test_a_set_has_no_order(self):
        with pytest.raises(TypeError, match="set"):
            NexusAdamW([{"params": set(make_params((3,)))}])

    def test_own_inner_steps_of_a_group(self):
        params = make_params((3,), (4,))
        with pytest.raises(ValueError, match="group 1 is 5, but all groups share that of the optimizer"):
            NexusAdamW([{"params": params[:1]}, {"params": params[1:], "inner_steps": 5}])


class TestBackends:
    def test_unknown(self):
        with pytest.raises(ValueError, match=r"unknown backend 'opencl'.*cpu"):
            NexusAdamW(make_params((3,)), backend="opencl")

    @pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
    def test_missing(self, monkeypatch, name):
        monkeypatch.setattr(backends, "why_not", lambda wanted, *_, **__: "install it" if wanted == name else None)
        runs = "reference" if name == "cpu" else "cpu"
        with pytest.raises(
            RuntimeError, match=f"backend='{name}' cannot run: install it. On cpu, backend='{runs}' would"
        ):
            NexusAdamW(make_params((3,)), backend=name)

    @pytest.mark.parametrize(("backend", "fused"), [("reference", True), ("cpu", False)])
    def test_contradiction(self, backend, fused):
        with pytest.raises(ValueError, match="contradicts"):
            NexusAdamW(make_params((3,)), backend=backend, fused=fused)

    def test_fused_keyword(self):
        fused, plain = NexusAdamW(make_params((3,)), fused=True), NexusAdamW(make_params((3,)), fused=False)
        assert [inside.backends_of(o) for o in (fused, plain)] == [["cpu"], ["reference"]]


class TestGradients:
    @pytest.mark.parametrize(
        ("spoil", "match"),
        [
            (lambda p: p.grad.resize_(2), r"shape \(2,\)"),
            (lambda p: setattr(p.grad, "data", torch.zeros(3, 1, dtype=p.dtype)), r"shape \(3, 1\)"),
        ],
    )
    @pytest.mark.parametrize("taken", [0, 2, 3])
    def test_another_shape(self, backend, spoil, match, taken):
        params, optimizer = build((5,), (3,), backend=backend)
        run(optimizer, params, 4 + taken)
        set_grads(params, 0)
        before = snapshot(optimizer)
        spoil(params[1])
        with pytest.raises(RuntimeError, match=rf"gradient of parameter 1 of group 0.*{match}.*set p.grad to None"):
            optimizer.step()
        assert_snapshot(optimizer, before)
        assert optimizer.cycle_position == taken

    @pytest.mark.parametrize("other", [torch.int32, torch.bool, torch.complex64], ids=str)
    def test_another_kind_of_number(self, backend, dtype, other):
        """Another floating dtype is read as it is; these are not."""
        params, optimizer = build((5,), (3,), dtype=dtype, backend=backend)
        set_grads(params, 0)
        before = snapshot(optimizer)
        params[1].grad.data = torch.ones(3, dtype=other)
        with pytest.raises(RuntimeError, match=f"gradient of parameter 1 of group 0.*{other}"):
            optimizer.step()
        assert_snapshot(optimizer, before)

    def test_real_gradient_of_a_complex_parameter(self, backend):
        (z,) = make_params((3,), dtype=torch.complex64)
        optimizer = NexusAdamW([z], backend=backend)
        if not hasattr(z, "grad_dtype"):
            pytest.skip("this torch refuses such a gradient by itself")
        z.grad_dtype = None
        z.grad = torch.ones(3)
        with pytest.raises(
            RuntimeError, match=r"gradient of parameter 0 of group 0 .*torch.float32 on cpu, its parameter"
        ):
            optimizer.step()

    def test_another_device(self, backend):
        class Elsewhere(nn.Parameter):
            @property
            def grad(self):
                return torch.empty(3, device="meta")

        (good,) = make_params((5,))
        optimizer = NexusAdamW([good, Elsewhere(torch.ones(3))], backend=backend)
        set_grads([good], 0)
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"gradient of parameter 1 of group 0.*meta"):
            optimizer.step()
        assert_snapshot(optimizer, before)

    def test_sparse(self, backend):
        embedding = nn.Embedding(5, 3, sparse=True)
        optimizer = NexusAdamW(embedding.parameters(), backend=backend)
        embedding(torch.tensor([1])).sum().backward()
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"gradient of parameter 0 of group 0.*sparse=False"):
            optimizer.step()
        assert_snapshot(optimizer, before)


def truncated(key):
    def change(state):
        del state["state"][1][key]

    return change


def set_key(where, key, value):
    def change(state):
        (state["param_groups"][0] if where == "group" else state["state"][1])[key] = value

    return change


def drop_displacements(state):
    for entry in state["state"].values():
        entry.pop("displacement")


def older_form(state):
    entry = state["state"][1]
    entry["anchor"] = entry.pop("displacement", entry["exp_avg"])


CHECKPOINTS = [
    (lambda s: s.pop("state"), "'state' and 'param_groups'"),
    (lambda s: s["param_groups"].append(s["param_groups"][0]), "number of parameter groups"),
    (lambda s: s["param_groups"][0]["params"].append(7), "size of optimizer's group"),
    (truncated("exp_avg"), "parameter 1 of group 0 lacks exp_avg.*truncated"),
    (truncated("step"), "parameter 1 of group 0 lacks step"),
    (
        set_key("entry", "momentum_buffer", torch.zeros(7)),
        "parameter 1 of group 0 has unknown momentum_buffer",
    ),
    (set_key("entry", "exp_avg", torch.zeros(8)), r"'exp_avg' of parameter 1 of group 0 is \(8,\)"),
    (
        set_key("entry", "remainder", torch.zeros(7, dtype=torch.float16)),
        "parameter 1 of group 0 .*remainder|'remainder'",
    ),
    (set_key("entry", "remainder", torch.zeros(8)), "parameter 1 of group 0 .*remainder|'remainder'"),
    (set_key("entry", "displacement", torch.zeros(8)), r"'displacement' of parameter 1 of group 0 is \(8,\)"),
    (set_key("entry", "displacement", torch.zeros(7, dtype=torch.float16)), "'displacement' of parameter 1.*float16"),
    (set_key("entry", "master", torch.zeros(7)), "parameter 1 of group 0 is of an older form.*'remainder'"),
    (set_key("entry", "walk", torch.zeros(7)), "parameter 1 of group 0 is of an older form"),
    (older_form, "parameter 1 of group 0 is of an older form.*'displacement'"),
    (
        set_key("entry", "exp_avg", torch.zeros(7, dtype=torch.float64)),
        "'exp_avg' of parameter 1 of group 0 is .*float64",
    ),
    (set_key("entry", "exp_avg_sq", None), "'exp_avg_sq' of parameter 1 of group 0 is None"),
    (set_key("entry", "step", torch.zeros(2)), "'step' of parameter 1 of group 0"),
    (set_key("entry", "step", "four"), "'step' of parameter 1 of group 0"),
    (set_key("entry", "step", torch.zeros((), device="meta")), "'step' of parameter 1 of group 0"),
    (set_key("entry", "exp_avg", torch.zeros(7, device="meta")), "'exp_avg' of parameter 1 of group 0.* on meta"),
    (set_key("entry", "exp_avg", torch.zeros(7).to_sparse()), "'exp_avg' of parameter 1 of group 0.*sparse"),
    (lambda s: s["state"].update({1: [1, 2]}), "parameter 1 of group 0 must be a dict"),
    (lambda s: s.update(state=None), "must be a dict and a list, but are NoneType and list"),
    (lambda s: s.update(param_groups=None), "must be a dict and a list, but are dict and NoneType"),
    (lambda s: s.update(param_groups=[3]), "group 0 of the loaded state dict must be a dict"),
    (lambda s: s["param_groups"][0].pop("params"), "group 0 of the loaded state dict must be a dict with a list"),
    (set_key("group", "skipped_inner_steps", None), "skipped_inner_steps of group 0 must be a number"),
    (set_key("group", "skipped_outer_steps", torch.zeros(3)), "skipped_outer_steps of group 0 must be a number"),
    (set_key("group", "cycle_position", [1]), r"cycle_position must be a whole number from 0 to \d+, but is \[1\]"),
    (set_key("group", "lr", NAN), "lr of parameter group 0"),
    (set_key("group", "lr", "1"), "lr of parameter group 0"),
    (set_key("group", "cycle_position", 4), "cycle_position must be a whole number from 0 to 3, but is 4"),
    (set_key("group", "cycle_position", -1), "from 0 to 3, but is -1"),
    (set_key("group", "cycle_position", "1"), "from 0 to 3, but is '1'"),
]
MID_CYCLE = [
    (drop_displacements, r"position 2.*parameter 0 of group 0 has no 'displacement'.*materialize_displacements\(\)"),
    (lambda s: s["state"].pop(1), r"parameter 1 of group 0 has no.*materialize_displacements\(\)"),
    (set_key("entry", "anchor", torch.zeros(7)), "parameter 1 of group 0 has an 'anchor'.*displacement_group"),
    (set_key("group", "inner_steps", 5), "inner_steps=5, this optimizer has 4"),
    (lambda s: s["param_groups"][0].pop("walk_length"), "lacks walk_length"),
    (lambda s: s["param_groups"][0].pop("touched"), "lacks touched"),
    (lambda s: s["param_groups"][0]["grad_norms"].pop(), "cycle data of group 0"),
    (set_key("group", "touched", [True] * 7), "cycle data of group 0"),
    (set_key("group", "touched", [7]), "cycle data of group 0"),
    (set_key("group", "touched", None), "cycle data of group 0"),
    (set_key("group", "grad_norms", None), "cycle data of group 0"),
    (set_key("group", "walk_length", "long"), "cycle data of group 0"),
]


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("taken", "change", "match"),
        [(0, *case) for case in CHECKPOINTS] + [(2, *case) for case in CHECKPOINTS + MID_CYCLE],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rejected(self, backend, taken, change, match, dtype):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, taken)
        state = copy.deepcopy(optimizer.state_dict())
        change(state)
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, 3)
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match=match):
            optimizer.load_state_dict(state)
        assert_snapshot(optimizer, before)
        run(optimizer, params, 1)
        assert optimizer.at_boundary

    def test_groups_at_different_positions(self, backend):
        params = make_params((3,), (4,))
        optimizer = NexusAdamW([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
        run(optimizer, params, 2)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][1]["cycle_position"] = 1
        with pytest.raises(ValueError, match="different positions"):
            optimizer.load_state_dict(state)

    def test_other_inner_steps_at_a_boundary(self, backend):
        params, optimizer = build(backend=backend, inner_steps=6)
        state = optimizer.state_dict()
        params, optimizer = build(backend=backend, inner_steps=2)
        with pytest.warns(UserWarning, match="inner_steps=6, this optimizer has 2, which it keeps"):
            optimizer.load_state_dict(state)
        run(optimizer, params, 2)
        assert optimizer.at_boundary

    def test_another_dtype_in_mid_cycle(self, backend):
        params, optimizer = build(dtype=torch.bfloat16, backend=backend)
        run(optimizer, params, 1)
        _, other = build(dtype=torch.float32, backend=backend)
        with pytest.raises(
            ValueError, match=r"'remainder' of parameter 0 of group 0 is .*torch.bfloat16, but the parameter"
        ):
            other.load_state_dict(optimizer.state_dict())


def test_every_dtype_is_covered():
    assert set(DTYPES) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def test_capture_into_a_graph_is_refused(monkeypatch):
    """A graph would replay addresses and hyperparameters that are no longer true."""
    params, optimizer = build()
    run(optimizer, params, 1)
    before = snapshot(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    set_grads(params, 1)
    for call in (optimizer.step, optimizer.outer_step):
        with pytest.raises(RuntimeError, match="parameters lie on cpu: only an optimizer of one CUDA device"):
            call()
    assert_snapshot(optimizer, before)
