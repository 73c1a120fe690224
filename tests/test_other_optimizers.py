"""Nexus in front of other people's optimizers: torch.optim's, and those of libraries where they are installed."""

from __future__ import annotations

import pytest
import torch
from conftest import make_params, run

from nexus_fused import Nexus


class Stubborn(torch.optim.Optimizer):
    """What a library may do: plain descent with options of its own kind in its groups."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)


# Groups of other kinds


@pytest.mark.parametrize("options", [{}, {"lr": None}, {"lr": None, "max_lr": None}], ids=str)
def test_groups_without_a_learning_rate(options):
    """γ is constant. A state of the optimizer's own loads too."""
    params = make_params((5, 3), (7,))
    inner = Stubborn(params, **options)
    plain = inner.state_dict()
    optimizer = Nexus(inner, inner_lr=0.05)
    run(optimizer, params, 2)
    optimizer.outer_step()
    optimizer.load_state_dict(plain)
    run(optimizer, params, 2)
    assert float(optimizer.param_groups[0]["walk_length"]) == pytest.approx(0.1)
    assert inner.param_groups[0].items() >= options.items(), "they are as they were"


class Wrapper(Stubborn):
    def state_dict(self):
        return {"inside": super().state_dict()}


class Consolidates(Stubborn):
    """As torch.distributed's ZeroRedundancyOptimizer."""

    ready = False

    def state_dict(self):
        if not self.ready:
            raise RuntimeError("Optimizer state has not been consolidated on this rank")
        return super().state_dict()


def test_a_state_of_another_form_is_refused():
    inner = Wrapper(make_params((3,)))
    with pytest.raises(ValueError, match=r"optimizer 0 \(Wrapper\) saves a state of a form of its own"):
        Nexus(inner)
    assert "inner_lr" not in inner.param_groups[0]


def test_a_state_that_cannot_be_had_yet():
    inner = Consolidates(make_params((3,)))
    optimizer = Nexus(inner)
    with pytest.raises(RuntimeError, match="consolidated"):
        optimizer.state_dict()
    inner.ready = True
    assert optimizer.state_dict()["param_groups"][0]["inner_steps"] == 4


def test_hidden_maximize_is_refused():
    """The walk would descend, and the optimizer ascend."""
    params = make_params((3,))
    inner = Stubborn(params)
    inner.maximize = True
    with pytest.raises(ValueError, match=r"optimizer 0 \(Stubborn\) has maximize=True, but not in its parameter"):
        Nexus(inner)
    inner.maximize = False
    Nexus(inner)
    inner = Stubborn(params, maximize=True)
    inner.maximize = True
    Nexus(inner)
