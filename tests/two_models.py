"""Nexus without any of our code: what the cycle is held to in float64."""

from __future__ import annotations

import math

import torch


class TwoModels:
    """Nexus as its public descriptions spell it: inner SGD on a copy, the displacement handed to torch.optim.AdamW."""

    def __init__(self, params, inner_lr, inner_steps, normalize=True, **adamw):
        self.outer = params
        self.adamw = torch.optim.AdamW(params, foreach=False, **adamw)
        self.inner_lr, self.inner_steps, self.normalize = inner_lr, inner_steps, normalize
        self.start()

    def start(self):
        self.inner = [p.detach().clone() for p in self.outer]
        self.walk_length, self.taken, self.seen = 0.0, 0, [False] * len(self.outer)

    def step(self, grads):
        norm = math.sqrt(sum(g.abs().double().square().sum().item() for g in grads if g is not None))
        if norm > 0 and math.isfinite(norm):
            for w, g in zip(self.inner, grads, strict=True):
                if g is not None:
                    w -= self.inner_lr / norm * g
            self.walk_length += self.inner_lr
        self.seen = [seen or g is not None for seen, g in zip(self.seen, grads, strict=True)]
        self.taken += 1
        if self.taken == self.inner_steps:
            self.finish()

    def finish(self):
        for p, w, seen in zip(self.outer, self.inner, self.seen, strict=True):
            p.grad = (p.detach() - w) / (self.walk_length if self.normalize else 1) if seen else None
        if self.walk_length > 0:
            self.adamw.step()
        self.start()
