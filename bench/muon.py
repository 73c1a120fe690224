"""AdamW, Muon, and Nexus before Muon, on the demo's text and model: `python -m bench.muon [--seeds 3] [--out FILE]`.

Everything but the optimizer is the demo's: data, model, cycles, K, schedule, clipping, evaluation. Muon steps the
matrices of the blocks, AdamW the rest, with one learning rate (adjust_lr_fn="match_rms_adamw"). AdamW's is the demo's;
Muon's is searched for on a seed that is not reported, and what walks before Muon takes Muon's. "Unit gradients" is a
walk so short that the model does not see it: the mean of normalized gradients at θ. docs/muon.md has the results.
Downloads the demo's text where it is not there yet.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nexus_fused import Nexus, split_matrices
from nexus_fused.demo.__main__ import WINDOWS, parse, prepare_device
from nexus_fused.demo.data import Texts, load, write_atomically
from nexus_fused.demo.model import SIZES, ByteTransformer
from nexus_fused.demo.report import finite, versions
from nexus_fused.demo.train import BETAS, WEIGHT_DECAY, Result, Settings, build, train

from .__main__ import processor
from .gpu import output_of

# Of the walk; None: without one.
ARMS: dict[str, float | None] = {
    "AdamW": None,
    "Muon": None,
    "Muon + unit gradients": 1e-12,
    "Muon + Nexus, γ = 0.05": 0.05,
    "Muon + Nexus, γ = 0.2": 0.2,
}
PAIRS = (
    ("Muon", "AdamW"),
    ("Muon + unit gradients", "Muon"),
    ("Muon + Nexus, γ = 0.05", "Muon"),
    ("Muon + Nexus, γ = 0.2", "Muon"),
    ("Muon + Nexus, γ = 0.05", "Muon + unit gradients"),
    ("Muon + Nexus, γ = 0.2", "Muon + unit gradients"),
)
ADAMW_LR = 2e-3
"""AdamW's best of the demo's grid 1e-3, 2e-3, 4e-3."""
SEARCHED = 100
"""The seed that Muon's is found on."""


class Both:
    """Two optimizers as one, as far as the demo's loop needs it."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    def step(self) -> None:
        for o in self.optimizers:
            o.step()

    def zero_grad(self) -> None:
        for o in self.optimizers:
            o.zero_grad()


def build_arm(settings: Settings, cycle_length: int) -> tuple[ByteTransformer, Any]:
    """The demo's model and an arm's optimizer."""
    if settings.arm == "AdamW":
        return build(settings, cycle_length)
    torch.manual_seed(settings.seed)
    model = ByteTransformer(settings.size)
    matrices, rest = split_matrices(model, head=None)  # it is the embedding
    common = {"lr": settings.lr, "weight_decay": WEIGHT_DECAY}
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common)
    adamw = torch.optim.AdamW(rest, betas=BETAS, fused=True, **common)
    if ARMS[settings.arm] is None:
        return model, Both(muon, adamw)
    walk = {"inner_lr": settings.inner_lr, "inner_steps": cycle_length, "displacement_dtype": torch.float32}
    return model, Nexus(muon, adamw, **walk)


def measured(training: Texts, held_out: Texts, settings: Settings) -> Result:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model saw")  # nothing of a walk that is there to be invisible
        return train(training, held_out, settings, WINDOWS, build_arm)


def climb(measure: Callable[[float], float], start: float) -> float:
    """The learning rate with the least loss among `start` times powers of 2: its neighbors were worse."""
    found = {start: measure(start)}
    for factor in (2.0, 0.5):
        best = min(found, key=lambda lr: found[lr])
        if best != start:
            break
        while best == min(found, key=lambda lr: found[lr]):
            found[best * factor] = measure(best * factor)
            best = best * factor if found[best * factor] < found[best] else 0.0
    return min(found, key=lambda lr: found[lr])


def means(run: Result, training: Texts) -> dict[str, float]:
    unseen = [bits for name, bits in run.bits.items() if name not in training]
    return {"trained": run.mean_bits, "unseen": statistics.fmean(unseen)}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "standard_error": error, "by_seed": values}


def figures(runs: list[Result], training: Texts) -> dict[str, dict[str, Any]]:
    """Of each arm, and of each pair of arms seed by seed, over the seeds that have been run."""
    bits = {arm: {run.seed: means(run, training) for run in runs if run.arm == arm} for arm in ARMS}
    made: dict[str, dict[str, Any]] = {}
    for arm, of_arm in bits.items():
        if of_arm:
            made[arm] = {k: summary([of_seed[k] for of_seed in of_arm.values()]) for k in ("trained", "unseen")}
    for arm, other in PAIRS:
        pairs = [(bits[arm][seed], bits[other][seed]) for seed in bits[arm] if seed in bits[other]]
        if pairs:
            made[f"{arm} − {other}"] = {k: summary([a[k] - b[k] for a, b in pairs]) for k in ("trained", "unseen")}
    return made


def show(made: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'bits per byte of held-out text':52}{'trained on':>20}{'unseen':>20}")
    for name, kinds in made.items():
        sign = "+" if " − " in name else ""
        cells = (f"{kind['mean']:{sign}.4f} ± {kind['standard_error']:.4f}" for kind in kinds.values())
        print(f"{name:52}" + "".join(f"{cell:>20}" for cell in cells))


def record(run: Result) -> dict[str, Any]:
    """What is kept of a run: of its alignment, the mean over the last tenth."""
    tail = [value for _, value in run.alignment][-max(1, len(run.alignment) // 10) :]
    return {**asdict(run), "alignment": statistics.fmean(tail) if tail else None}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.muon", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SIZES["tiny"].steps, help="cycles of a run (%(default)s)")
    parser.add_argument(
        "--start", type=float, default=ADAMW_LR, help="where the search for Muon's begins (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="also write everything there, as JSON, after each run")
    options = parser.parse_args()
    prepare_device("cpu", SIZES["tiny"].threads)
    demo = parse([])
    training, held_out, manifest = load(demo.cache, demo.cap_mb)
    searched: list[Result] = []
    runs: list[Result] = []

    def measure(arm: str, seed: int, into: list[Result], lr: float) -> float:
        settings = Settings(SIZES["tiny"], arm, seed, lr, ARMS[arm] or 0.0, options.steps)
        into.append(measured(training, held_out, settings))
        bits = into[-1].mean_bits
        return bits if math.isfinite(bits) else math.inf

    result: dict[str, Any] = {
        **{"processor": processor(), **versions(), "python": platform.python_version()},
        "commit": next(iter(output_of("git", "describe", "--always", "--dirty")), None),
        "settings": {"cycles": options.steps, "inner_steps": len(training), "windows": WINDOWS, "arms": ARMS},
        "data": manifest,
    }
    lr = climb(partial(measure, "Muon", SEARCHED, searched), options.start)
    result |= {"learning_rates": {"AdamW": ADAMW_LR, "Muon": lr}}
    result |= {"search": {"seed": SEARCHED, "runs": [record(run) for run in searched]}}
    for seed in range(options.seeds):
        for arm in ARMS:
            measure(arm, seed, runs, ADAMW_LR if arm == "AdamW" else lr)
            result |= {"figures": figures(runs, training), "runs": [record(run) for run in runs]}
            if options.out:
                write_atomically(options.out, json.dumps(finite(result), indent=1, ensure_ascii=False).encode() + b"\n")
    show(result["figures"])


if __name__ == "__main__":
    main()
