"""Trains one model and measures it where it is asked for.

A run is a warm-up and a constant learning rate, so that one run serves every amount of tokens. A measurement is taken
of the run itself after so many tokens, or of a branch that leaves it there and goes on with a learning rate that falls
linearly to 0, on the mixture of all domains or on one of them. All arms see the same windows of text in the same order.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nexus_fused.base import WalkingOptimizer
from nexus_fused.demo.data import Texts
from nexus_fused.demo.model import ByteTransformer, Shape
from nexus_fused.demo.train import CLIP, bits_per_byte, cut, precision

from . import arms

MILLION = 1e6
MIXTURE = "mixture"
"""All training domains in equal shares."""
EVALUATED = 128
"""Windows per domain in an evaluation."""
WARM_UP = 40
"""Cycles."""
ALIGNED = 40
"""Cycles before a measurement whose mean alignment is recorded."""
UNIFORM = 8.0
"""Bits per byte of a model that knows nothing; what is measured above counts as diverged."""


@dataclass(frozen=True)
class Size(Shape):
    """A model, and the windows in a cycle of its runs."""

    windows: int

    @property
    def shape(self) -> list[int]:
        """What defines it, as JSON can hold it: dim, layers, heads, context, windows."""
        return [self.dim, self.layers, self.heads, self.context, self.windows]

    @property
    def cycle_tokens(self) -> int:
        """Tokens in a cycle."""
        return self.windows * self.context

    def cycles(self, tokens: float) -> int:
        """Whole cycles that come nearest to so many tokens, at least 1."""
        return max(1, round(tokens / self.cycle_tokens))


SIZES = {
    "0.1M": Size(dim=64, layers=2, heads=4, context=128, windows=20),
    "0.2M": Size(dim=96, layers=2, heads=4, context=128, windows=20),
    "0.5M": Size(dim=112, layers=3, heads=4, context=128, windows=20),
    "0.8M": Size(dim=128, layers=4, heads=4, context=128, windows=20),
    "30M": Size(dim=512, layers=9, heads=8, context=512, windows=60),
    "100M": Size(dim=768, layers=14, heads=12, context=512, windows=60),
}


class Run(NamedTuple):
    """What a run from random weights depends on; equal ones give equal results on one machine."""

    arm: str
    size: str
    inner_steps: int
    seed: int
    lr: float


class Point(NamedTuple):
    """A measurement: of a run (its first five fields) after `tokens`, or of a branch there (`domain` is not "")."""

    arm: str
    size: str
    inner_steps: int
    seed: int
    lr: float
    tokens: int
    domain: str = ""
    decay_tokens: int = 0

    @property
    def run(self) -> Run:
        """The run that it belongs to."""
        return Run(*self[:5])


@cache
def parameters_of(size: Size) -> int:
    """Return the number of parameters of a model, embeddings included."""
    with torch.device("meta"):
        return sum(p.numel() for p in ByteTransformer(size).parameters())


def parameters(size: str) -> int:
    """Return N, the number of parameters, embeddings included."""
    return parameters_of(SIZES[size])


def micro_batches(
    texts: Texts, names: Sequence[str], size: Size, inner_steps: int, seed: Sequence[int], device: str
) -> Iterator[list[Tensor]]:
    """Yield cycles without end: `inner_steps` micro-batches of one domain each, all domains in equal shares."""
    rng = np.random.default_rng(seed)
    each = size.windows // inner_steps
    of_cycle = np.resize(np.arange(len(names)), inner_steps)
    while True:
        chosen = [texts[names[i]] for i in rng.permutation(of_cycle)]
        starts = [rng.integers(0, len(text) - size.context, each) for text in chosen]
        yield [cut(text, start, size.context, device) for text, start in zip(chosen, starts, strict=True)]


class Trainer:
    """A model under training; `tick` is called after each cycle."""

    def __init__(self, run: Run, device: str, dtype: str, tick: Callable[[], None]) -> None:
        torch.manual_seed(run.seed)
        self.run, self.device, self.dtype, self.tick = run, device, dtype, tick
        self.model = ByteTransformer(SIZES[run.size]).to(device)
        self.optimizer = arms.build(run.arm, self.model, run.lr, run.inner_steps)
        self.cycle = 0
        self.alignments: deque[float] = deque(maxlen=ALIGNED)
        self.diverged = False
        self.seconds = 0.0

    def branch(self) -> Trainer:
        """Return a copy that goes its own way."""
        other = copy.copy(self)
        other.model, other.optimizer = copy.deepcopy((self.model, self.optimizer))
        other.alignments = deque(maxlen=ALIGNED)
        other.seconds = 0.0
        return other

    def train(self, cycles: Iterable[list[Tensor]], rates: Sequence[float]) -> None:
        """Train for a cycle at each of the learning rates; a run that has diverged is over."""
        walks = isinstance(self.optimizer, WalkingOptimizer)
        began = time.perf_counter()
        for rate, batches in zip(rates, cycles, strict=False):
            if self.diverged:
                break
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = []
            for batch in batches:
                with precision(self.device, self.dtype):
                    loss = self.model(batch)
                (loss if walks else loss / len(batches)).backward()
                losses.append(loss.detach())
                if walks:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            if not walks:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                self.alignments.append(self.optimizer.metrics()["alignment"])
            self.cycle += 1
            if self.cycle % 20 == 0:
                self.diverged = not math.isfinite(float(torch.stack(losses).sum()))
            self.tick()
        self.seconds += time.perf_counter() - began

    def measure(self, held_out: Texts, trained_on: Sequence[str]) -> dict[str, Any]:
        """Return what is recorded beside the point."""
        bits = {
            name: round(bits_per_byte(self.model, text, EVALUATED, self.device, self.dtype), 6)
            for name, text in held_out.items()
        }
        weights = hashlib.sha256()
        for p in self.model.parameters():
            weights.update(p.detach().cpu().numpy().tobytes())
        aligned = fmean(self.alignments) if self.alignments else math.nan
        return {
            "diverged": self.diverged or not fmean(bits[name] for name in trained_on) < UNIFORM,
            "bits": {name: value if math.isfinite(value) else None for name, value in bits.items()},
            "alignment": round(aligned, 6) if math.isfinite(aligned) else None,
            "weights": weights.hexdigest()[:16],
            "seconds": round(self.seconds, 2),
        }


def warm_up(begin: int, end: int, peak: float) -> list[float]:
    """Return the learning rates of cycles `begin` to `end` of a run: they rise over WARM_UP cycles, then stay."""
    return [peak * min(1.0, (cycle + 1) / WARM_UP) for cycle in range(begin, end)]


def falling(cycles: int, peak: float) -> list[float]:
    """Return the learning rates of a branch: linear, 0 would be the next."""
    return [peak * (cycles - i) / (cycles + 1) for i in range(cycles)]


def perform(
    run: Run,
    points: Iterable[Point],
    training: Texts,
    held_out: Texts,
    device: str,
    dtype: str,
    tick: Callable[[], None],
) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Train one run as far as its points need, and yield each point with what was measured there."""
    size, names = SIZES[run.size], sorted(training)
    trunk = Trainer(run, device, dtype, tick)
    stream = micro_batches(training, names, size, run.inner_steps, [run.seed], device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model saw")  # nothing of a walk that is there to be invisible
        for point in sorted(points, key=lambda p: p[5:]):
            end = size.cycles(point.tokens)
            if end > trunk.cycle:
                trunk.train(islice(stream, end - trunk.cycle), warm_up(trunk.cycle, end, run.lr))
            if not point.domain:
                yield point, trunk.measure({name: held_out[name] for name in names}, names)
                continue
            mixed = point.domain == MIXTURE
            sources = names if mixed else [point.domain]
            own = [run.seed, end, [MIXTURE, *names].index(point.domain)]
            branch, cycles = trunk.branch(), size.cycles(point.decay_tokens)
            branch.train(micro_batches(training, sources, size, run.inner_steps, own, device), falling(cycles, run.lr))
            evaluated = held_out if mixed else {point.domain: held_out[point.domain]}
            yield point, branch.measure(evaluated, sources)
