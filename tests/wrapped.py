"""Optimizers behind the walk: parameters, and Nexus around them."""

from __future__ import annotations

import io

import torch
from conftest import make_params

from nexus_fused import Nexus

SHAPES = (5, 3), (7,), (0,), (33, 40)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def build(*, dtype=torch.float32, kind=torch.optim.AdamW, optimizer=None, **walk):
    """Parameters, the optimizer behind the walk, and the walk."""
    params = make_params(*SHAPES, dtype=dtype)
    inner = kind(params, **(OPTIONS if optimizer is None else optimizer))
    return params, inner, Nexus(inner, **{"inner_lr": 0.05, "inner_steps": 4, **walk})


def split(**walk):
    """The same parameters in two optimizers."""
    params = make_params(*SHAPES)
    inner = torch.optim.SGD(params[:2], lr=0.1, momentum=0.9), torch.optim.AdamW(params[2:], **OPTIONS)
    return params, inner, Nexus(*inner, **{"inner_lr": 0.05, "inner_steps": 4, **walk})


def saved(optimizer):
    """Through a file, as others would load it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
