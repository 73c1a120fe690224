"""Time in the optimizer within training: `python -m bench.training [--threads 2] [--rounds 25] [--out FILE]`.

Trains a decoder-only transformer of 50M parameters in float32, with K = 4 micro-batches of 64 tokens so that a step is
short. Two copies train on the same tokens, cycle by cycle in turn, and take turns in being first. Time in the optimizer
is what step() and clipping take, and for every parameter the time from its gradient's arrival until it is accumulated,
where AdamW pays for accumulation in place. It leaves out zero_grad(), which frees in K calls what AdamW's accumulation
frees inside its backward passes. A figure is the median over rounds of the ratio within a round, with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nexus_fused import NexusAdamW

from .__main__ import arguments, started, write
from .contenders import NEXUS, OPTIONS, K, check_parity, ratio
from .decoder import Decoder

VOCABULARY, WIDTH, LAYERS, TOKENS = 8192, 640, 8, 64
WARM_UP = 2  # rounds that are not counted


class Training:
    """A model, its optimizer, and one cycle of training at a time. seconds: in the optimizer, of the last cycle;
    `accumulating` of them inside the backward passes.
    """

    def __init__(self, name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        self.name, self.seconds, self.accumulating = name, 0.0, 0.0
        torch.manual_seed(0)
        self.model = Decoder(VOCABULARY, WIDTH, LAYERS, TOKENS)
        self.params = list(self.model.parameters())
        self.optimizer = make(self.params)
        for p in self.params:
            p.register_hook(self._gradient_arrives)
            p.register_post_accumulate_grad_hook(self._is_accumulated)

    def _gradient_arrives(self, gradient: Tensor) -> None:
        self.arrived = time.perf_counter()

    def _is_accumulated(self, param: Tensor) -> None:
        self.accumulating += time.perf_counter() - self.arrived

    def _timed(self, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        self.seconds += time.perf_counter() - start

    def cycle(self, micro_batches: list[Tensor]) -> None:
        """K micro-batches: K steps of Nexus, or K accumulations and one step of AdamW."""
        self.seconds = self.accumulating = 0.0
        for tokens in micro_batches:
            self.model(tokens).backward()
            if isinstance(self.optimizer, NexusAdamW):
                self._timed(self.optimizer.step)
                self.optimizer.zero_grad()
        if not isinstance(self.optimizer, NexusAdamW):
            self._timed(lambda: nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True))
            self._timed(self.optimizer.step)
            self.optimizer.zero_grad()
        self.seconds += self.accumulating


def measure(trainings: list[Training], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns seconds of each training in each round: of the whole cycle, in the
    optimizer, and of these accumulating.
    """
    names = ("cycle", "optimizer", "accumulating")
    seconds: dict[str, dict[str, list[float]]] = {t.name: {name: [] for name in names} for t in trainings}
    generator = torch.Generator().manual_seed(1)
    for i in tqdm(range(rounds + WARM_UP), desc="cycles", leave=False):
        micro_batches = [torch.randint(VOCABULARY, (1, TOKENS), generator=generator) for _ in range(K)]
        for j in range(len(trainings)):
            training = trainings[(i + j) % len(trainings)]
            start = time.perf_counter()
            training.cycle(micro_batches)
            took = (time.perf_counter() - start, training.seconds, training.accumulating)
            if i >= WARM_UP:
                for name, value in zip(names, took, strict=True):
                    seconds[training.name][name].append(value)
    return seconds


def main() -> None:
    options = arguments("python -m bench.training", str(__doc__))
    result = started(options)
    adamw, ours = trainings = [
        Training("AdamW, accumulation, clipping", lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS)),
        Training("nexus_fused", lambda p: NexusAdamW(p, **NEXUS)),
    ]
    check_parity([tuple(p.shape) for p in ours.params], torch.float32)
    seconds = measure(trainings, options.rounds)
    numel = sum(p.numel() for p in adamw.params)
    title = f"training steps of a transformer, {numel / 1e6:.1f}M parameters, K = {K}, 1 x {TOKENS} tokens, float32"
    print(f"\n{title}\n{'milliseconds per cycle':40}{'whole':>9}{'optimizer':>11}{'accumulating':>14}")
    table = []
    for training in trainings:
        row = {name: statistics.median(values) * 1e3 for name, values in seconds[training.name].items()}
        print(f"{training.name:40}{row['cycle']:9.1f}{row['optimizer']:11.2f}{row['accumulating']:14.2f}")
        table.append({"name": training.name, "milliseconds": row})
    result["sections"].append({"title": title, "rows": table})
    for what, shown in (("optimizer", "time in the optimizer"), ("cycle", "whole cycle")):
        figure = result["figures"][f"{shown} / AdamW's"] = ratio(seconds[ours.name][what], seconds[adamw.name][what])
        quartiles = f"({figure['quartile1']:.2f} to {figure['quartile3']:.2f})"
        print(f"  {shown} / AdamW's: {figure['median']:.2f} {quartiles}")
    write(result, options.out)


if __name__ == "__main__":
    main()
