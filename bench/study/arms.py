"""The optimizers that are compared, by name: adamw, unit, nexus:0.05, muon, muon+unit, muon+nexus:0.05.

"unit" is a walk so short that the model does not see it: its D/Γ is the mean of the unit gradients at θ, so that what
Nexus gains over it comes from the walk, and what it gains over AdamW from equal votes.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any

import torch

from nexus_fused import Nexus, NexusAdamW, split_matrices
from nexus_fused.demo.model import ByteTransformer
from nexus_fused.demo.train import BETAS, UNIT, WEIGHT_DECAY

from . import StudyError


class Both:
    """Two optimizers as one, as far as a training loop needs it."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    def step(self) -> None:
        for o in self.optimizers:
            o.step()

    def zero_grad(self) -> None:
        for o in self.optimizers:
            o.zero_grad()


def parse(arm: str) -> tuple[bool, float | None]:
    """Return whether Muon steps the matrices, and γ (None: no walk); raises StudyError for an unknown arm."""
    if arm in ("adamw", "muon"):
        return arm == "muon", None
    if match := re.fullmatch(r"(muon\+)?(?:unit|nexus:([0-9.e-]+))", arm):
        with suppress(ValueError):
            gamma = float(match[2]) if match[2] else UNIT
            if 0 < gamma < math.inf:
                if match[2] and f"{gamma:g}" != match[2]:
                    raise StudyError(f"write {match[1] or ''}nexus:{gamma:g} for {arm!r}, or it counts as another arm.")
                return bool(match[1]), gamma
    raise StudyError(f"there is no arm {arm!r}: adamw, unit, nexus:γ (as nexus:0.05), muon, muon+unit, muon+nexus:γ.")


def title(arm: str) -> str:
    """Return how an arm is called in tables and pictures."""
    muon, gamma = parse(arm)
    if gamma is None:
        return "Muon" if muon else "AdamW"
    return ("Muon, " if muon else "") + ("unit gradients" if arm.endswith("unit") else f"Nexus, γ = {gamma:g}")


def build(arm: str, model: ByteTransformer, lr: float, inner_steps: int) -> Any:
    """Return the optimizer of an arm; one that walks takes `inner_steps` calls of step() in a cycle."""
    muon, gamma = parse(arm)
    walk = {"inner_lr": gamma, "inner_steps": inner_steps}
    common = {"lr": lr, "weight_decay": WEIGHT_DECAY}
    if not muon:
        if gamma is None:
            return torch.optim.AdamW(model.parameters(), betas=BETAS, fused=True, **common)
        return NexusAdamW(model.parameters(), betas=BETAS, **common, **walk)
    matrices, rest = split_matrices(model, head=None)  # it is the embedding
    both = (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common),
        torch.optim.AdamW(rest, betas=BETAS, fused=True, **common),
    )
    return Both(*both) if gamma is None else Nexus(*both, displacement_dtype=torch.float32, **walk)
