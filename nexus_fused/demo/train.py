"""Trains one model with one optimizer; all optimizers see the same micro-batches in the same order."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from nexus_fused import NexusAdamW
from nexus_fused.base import WalkingOptimizer

from .data import Texts
from .model import ByteTransformer, Size
from .workers import Tell

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
UNIT = 1e-12
"""γ of a walk so short that the model does not see it: D/Γ is the mean of the unit gradients at θ."""
EVALUATIONS = 8
"""Points on the curve of held-out bits per byte, the last one included."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on; runs with equal settings give equal results on one machine."""

    size: Size
    arm: str
    seed: int
    lr: float
    inner_lr: float
    steps: int
    device: str = "cpu"
    dtype: str = "float32"
    nudged: bool = False
    """Whether all weights start one unit in their last place away: what changes then, rounding alone can change."""


@dataclass
class Result:
    """What a run measured. Bits per byte are of held-out text; alignment is the optimizer's own metric."""

    arm: str
    seed: int
    lr: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(cycle, mean bits per byte over the training domains)"""
    bits: dict[str, float] = field(default_factory=dict)
    """Domain → bits per byte after the last cycle."""
    alignment: list[tuple[int, float]] = field(default_factory=list)
    lost_fraction: float = math.nan
    epochs: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """Training alone, without the evaluations."""
    optimizer_seconds: float = 0.0
    tokens: int = 0
    nudged: bool = False

    @property
    def mean_bits(self) -> float:
        """Held-out bits per byte at the end, mean over the training domains."""
        return self.curve[-1][1]


def learning_rate(cycle: int, steps: int, peak: float) -> float:
    """Return the rate of a cycle: a linear warm-up over 5 %, then a cosine down to 10 % of the peak."""
    warmup = max(1, steps // 20)
    if cycle < warmup:
        return peak * (cycle + 1) / warmup
    done = (cycle - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def cut(text: np.ndarray, starts: np.ndarray, context: int, device: str) -> torch.Tensor:
    """Return the windows (len(starts), context + 1) of a text, int64 on `device`."""
    windows = text[starts[:, None] + np.arange(context + 1)]
    return torch.from_numpy(windows.astype(np.int64)).to(device)


def micro_batches(texts: Texts, settings: Settings) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (domain, windows) without end: each cycle holds one micro-batch per domain, in a random order."""
    rng = np.random.default_rng(settings.seed)
    names, size = sorted(texts), settings.size
    while True:
        for i in rng.permutation(len(names)):
            text = texts[names[i]]
            starts = rng.integers(0, len(text) - size.context, size.batch)
            yield names[i], cut(text, starts, size.context, settings.device)


def precision(device: str, dtype: str) -> AbstractContextManager[object]:
    """Return the autocast region of the forward pass; float32 needs none."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


@torch.no_grad()
def bits_per_byte(model: ByteTransformer, text: np.ndarray, windows: int, device: str, dtype: str) -> float:
    """Return the bits per byte over `windows` evenly spaced windows of a text, the same ones every time."""
    starts = np.linspace(0, len(text) - model.context - 1, windows).astype(np.int64)
    total = 0.0
    with precision(device, dtype):
        for part in np.array_split(starts, math.ceil(windows / 32)):
            total += float(model(cut(text, part, model.context, device))) * len(part)
    return total / windows / math.log(2)


class Clock:
    """Sums up the seconds spent in one part of the loop; waits for the device at both ends."""

    def __init__(self, device: str) -> None:
        """Start at 0 seconds."""
        self.wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.wait()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.seconds += time.perf_counter() - self.start


def build(settings: Settings, cycle_length: int) -> tuple[ByteTransformer, torch.optim.Optimizer]:
    """Return the model of this seed, equal for all arms, and the arm's optimizer: AdamW, unit or Nexus."""
    torch.manual_seed(settings.seed)
    model = ByteTransformer(settings.size).to(settings.device)
    if settings.nudged:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, math.inf)))
    parameters, lr = model.parameters(), settings.lr
    if settings.arm == "AdamW":
        return model, torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    nexus = NexusAdamW(
        parameters,
        lr=lr,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        inner_lr=UNIT if settings.arm == "unit" else settings.inner_lr,
        inner_steps=cycle_length,
    )
    return model, nexus


def train(
    training: Texts,
    held_out: Texts,
    settings: Settings,
    windows: int,
    build: Callable[[Settings, int], tuple[ByteTransformer, Any]] = build,
    tick: Callable[[float], Any] = lambda loss: None,
) -> Result:
    """Train for `settings.steps` cycles and return the measurements.

    `windows` is the number of evaluation windows per domain at the end (a quarter of it on the way). `build` makes the
    model and its optimizer; one without a walk gets averaged and clipped gradients. `tick` is called with the training
    loss of each cycle. A run that diverges has NaN in its results and is not an error.
    """
    k = len(training)
    model, optimizer = build(settings, k)
    nexus = isinstance(optimizer, WalkingOptimizer)
    batches = micro_batches(training, settings)
    result = Result(settings.arm, settings.seed, settings.lr, nudged=settings.nudged)
    whole, inside = Clock(settings.device), Clock(settings.device)
    used = dict.fromkeys(training, 0)
    marks = {round(settings.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model saw")  # nothing of a walk that is there to be invisible
        for cycle in range(settings.steps):
            with whole:
                losses = []
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(cycle, settings.steps, settings.lr)
                for position in range(k):
                    name, batch = next(batches)
                    used[name] += batch.numel()
                    with precision(settings.device, settings.dtype):
                        loss = model(batch)
                    (loss if nexus else loss / k).backward()
                    losses.append(loss.detach())
                    if nexus or position == k - 1:
                        with inside:
                            if not nexus:
                                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                            optimizer.step()
                            optimizer.zero_grad()
            if nexus:
                metrics = optimizer.metrics()
                result.alignment.append((cycle + 1, metrics["alignment"]))
                result.lost_fraction = metrics["lost_fraction"]
            tick(float(torch.stack(losses).mean()))
            if cycle + 1 in marks:
                last = cycle + 1 == settings.steps
                few = windows if last else max(1, windows // 4)
                names = held_out if last else training
                bits = {
                    name: bits_per_byte(model, held_out[name], few, settings.device, settings.dtype) for name in names
                }
                result.curve.append((cycle + 1, sum(bits[name] for name in training) / k))
                result.bits = bits
    result.tokens = sum(used.values())
    result.epochs = {name: used[name] / len(training[name]) for name in training}
    result.seconds, result.optimizer_seconds = whole.seconds, inside.seconds
    return result


def work(shared: tuple[Texts, Texts], tell: Tell, settings: Settings, windows: int) -> None:
    """Train in a process of its own; tell the loss of each cycle, and the Result at the end."""
    tell(train(*shared, settings, windows, tick=tell))
