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
