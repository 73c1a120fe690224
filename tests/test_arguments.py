"""Arguments in other types than Python's: what torch.optim.AdamW takes has its meaning, or is refused."""

from __future__ import annotations

import io
from collections import OrderedDict, deque, namedtuple
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import assert_same, build, make_params, run, set_grads, values

from nexus_fused import NexusAdamW


class FromAFile(Sequence):
    """As OmegaConf's ListConfig."""

    def __init__(self, *items):
        self.items = items

    def __repr__(self):
        return f"FromAFile{self.items}"

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


Betas = namedtuple("Betas", "first second")  # as a caller may write it

NUMBERS = [kind(0.125) for kind in (np.float16, np.float32, np.float64, np.longdouble, np.array, torch.tensor)]
NUMBERS += [np.array([0.125]), torch.tensor([0.125], dtype=torch.float64), Fraction(1, 8)]
ONES = [kind(1) for kind in (int, np.int8, np.uint16, np.int64, np.array, torch.tensor)]

# What is given, what it means. AdamW refuses some: it may.
TAKEN = [(name, value, 0.125) for name in ("lr", "inner_lr", "eps", "weight_decay") for value in NUMBERS]
TAKEN += [(name, value, 1.0) for name in ("lr", "inner_lr", "eps", "weight_decay") for value in ONES]
TAKEN += [
    ("betas", value, (0.5, 0.75))
    for value in (
        [0.5, 0.75],
        Betas(0.5, 0.75),
        FromAFile(0.5, 0.75),
        deque([0.5, 0.75]),
        np.array([0.5, 0.75]),
        np.array([0.5, 0.75], dtype=np.float32),
        (np.float32(0.5), 0.75),
        (Fraction(1, 2), np.float64(0.75)),
        torch.tensor([0.5, 0.75]),
        (torch.tensor(0.5), torch.tensor([0.75])),
    )
]
TAKEN += [("betas", (0, np.int64(0)), (0.0, 0.0))]
ADAMW_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable")
FLAGS = (*ADAMW_FLAGS, "normalize_displacement", "inner_lr_follows_lr")
TAKEN += [(name, value, False) for name in FLAGS for value in (np.bool_(False), 0, np.array(False))]
TAKEN += [(name, None, False) for name in ADAMW_FLAGS]
TAKEN += [
    (name, value, True)
    for name in (*FLAGS, "fused")
    if name != "differentiable"
    for value in (np.bool_(True), 1, np.array(True))
]
TAKEN += [("fused", np.bool_(False), False), ("fused", 0, False), ("inner_steps", np.int64(3), 3)]

REFUSED = [(name, value) for name in ("lr", "inner_lr", "eps", "weight_decay") for value in (np.bool_(True), True)]
REFUSED += [("lr", value) for value in (Decimal("0.125"), np.array([0.1, 0.2]), np.complex64(1), np.array("0.1"))]
REFUSED += [
    ("betas", value)
    for value in (
        {0: 0.5, 1: 0.75},  # of which AdamW takes the keys
        {0.5, 0.75},
        "ab",
        np.array([0.5, 0.75, 0.9]),
        np.array(0.5),
        FromAFile(0.5),
        (np.bool_(False), 0.5),
        None,
        torch.tensor(0.5),
    )
]
REFUSED += [(name, value) for name in (*FLAGS, "fused") for value in ("no", "", 2, 1.0, [], torch.tensor(True))]


def is_plain(value):
    """Nothing but Python's own types and tensors."""
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return isinstance(value, torch.Tensor) or type(value) in (float, int, bool, str, type(None))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "value", "meaning"), TAKEN, ids=repr)
@pytest.mark.parametrize("where", ["constructor", "group", "edited"])
def test_taken(name, value, meaning, where):
    if name == "inner_steps":  # one for the whole optimizer
        where = "constructor"
    results = []
    for given in (value, meaning):
        params = make_params((5, 3), (7,))
        if where == "constructor":
            optimizer = NexusAdamW(params, **{name: given})
        else:
            group = {name: given} if where == "group" else {}
            follows = where != "edited" or name != "lr"  # or γ would grow with it, of which there is a warning
            optimizer = NexusAdamW([{"params": params, **group}], inner_lr_follows_lr=follows)
            run(optimizer, params, 1)
            if where == "edited":
                optimizer.param_groups[0][name] = given
        run(optimizer, params, 5, 1)
        state = through_a_file(optimizer.state_dict())
        assert all(is_plain(v) for key, v in state["param_groups"][0].items() if key != "params")
        optimizer.load_state_dict(state)
        results.append(values(params))
    assert_same(*results)


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=repr)
def test_refused(name, value):
    params = make_params((3,), (4,))
    before = values(params)
    for options, group in (({name: value}, {}), ({}, {name: value})):
        with pytest.raises(TypeError, match=rf"{name}.* of parameter group {1 if group else 0}"):
            NexusAdamW([{"params": params[:1]}, {"params": params[1:], **group}], **options)
    optimizer = NexusAdamW(params)
    optimizer.param_groups[0][name] = value
    set_grads(params, 0)
    with pytest.raises(TypeError, match=rf"{name}.* of parameter group 0"):
        optimizer.step()
    assert_same(values(params), before)


@pytest.mark.parametrize("betas", [(0.5, torch.tensor(0.75)), (torch.tensor(0.5), 0.75)])
def test_betas_are_of_one_kind(betas):
    """As AdamW demands."""
    for kind in (torch.optim.AdamW, NexusAdamW):
        with pytest.raises(ValueError, match="must be either both floats or both Tensors"):
            kind(make_params((3,)), betas=betas)


def test_what_others_wrote_into_a_group():
    """Schedules of NumPy, and keys of the user's own."""
    params, optimizer = build()
    optimizer.add_param_group({"params": make_params((2,)), "depth": np.int64(3), "lr": np.float32(0.125)})
    assert type(optimizer.param_groups[1]["base_lr"]) is float
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: np.float64(0.5) ** k)
    run(optimizer, params, 2)
    scheduler.step()
    loaded = through_a_file(optimizer.state_dict())["param_groups"]
    assert [group["lr"] for group in loaded] == [0.005, 0.0625]
    assert loaded[1]["depth"] == 3


SHAPES = [
    lambda p, q: (x for x in (p, q)),
    lambda p, q: {"p": p, "q": q}.values(),
    lambda p, q: {"p": p, "q": q}.items(),
    lambda p, q: (p, q),
    lambda p, q: Betas(p, q),
    lambda p, q: deque([p, q]),
    lambda p, q: torch.nn.ParameterList([p, q]),
    lambda p, q: [{"params": (x for x in (p, q))}],
    lambda p, q: [{"params": {"p": p, "q": q}.values()}],
    lambda p, q: [{"params": {"p": p, "q": q}.items()}],
    lambda p, q: [{"params": Betas(p, q)}],
    lambda p, q: ({"params": x} for x in (p, q)),
    lambda p, q: (OrderedDict(params=[p, q]), {"params": []}),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_containers_of_parameters(shape):
    results = []
    for arrange in (shape, lambda p, q: [p, q]):
        params = make_params((5, 3), (7,))
        optimizer = NexusAdamW(arrange(*params))
        theirs = torch.optim.AdamW(arrange(*params))
        assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in theirs.param_groups]
        run(optimizer, params, 5)
        results.append(values(params))
    assert_same(*results)
