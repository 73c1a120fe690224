"""AdamW, Muon, and Nexus before Muon, on the demo's text: `python -m bench.muon [--seeds 3] [--out FILE]`.

Everything but optimizer, size and length is the demo's: data, K, schedule, clipping, evaluation. Muon steps the
matrices of the blocks, AdamW the rest, with one learning rate (adjust_lr_fn="match_rms_adamw"). Muon's is searched for
on a seed that is not reported, and what walks before Muon takes Muon's. "Unit gradients" is a walk so short that the
model does not see it: the mean of normalized gradients at θ. docs/muon.md has the results. Downloads the demo's text
where it is not there yet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nexus_fused.demo.__main__ import WINDOWS, parse
from nexus_fused.demo.data import Texts, load, write_atomically
from nexus_fused.demo.model import ByteTransformer, Size
from nexus_fused.demo.progress import Progress
from nexus_fused.demo.report import finite, versions
from nexus_fused.demo.train import Result, Settings, train

from .__main__ import processor
from .gpu import output_of
from .study import arms

ARMS = {
    "AdamW": "adamw",
    "Muon": "muon",
    "Muon + unit gradients": "muon+unit",
    "Muon + Nexus, γ = 0.05": "muon+nexus:0.05",
    "Muon + Nexus, γ = 0.2": "muon+nexus:0.2",
}
SIZE = Size(dim=128, layers=3, heads=4, context=128, batch=2, steps=480, lr_grid=())
"""0.62M parameters."""
PAIRS = (
    ("Muon", "AdamW"),
    ("Muon + unit gradients", "Muon"),
    ("Muon + Nexus, γ = 0.05", "Muon"),
    ("Muon + Nexus, γ = 0.2", "Muon"),
    ("Muon + Nexus, γ = 0.05", "Muon + unit gradients"),
    ("Muon + Nexus, γ = 0.2", "Muon + unit gradients"),
)
ADAMW_LR = 2e-3
"""AdamW's best of 1e-3, 2e-3, 4e-3."""
SEARCHED = 100
"""The seed that Muon's is found on."""


def build_arm(settings: Settings, cycle_length: int) -> tuple[ByteTransformer, Any]:
    """The model of a seed and an arm's optimizer."""
    torch.manual_seed(settings.seed)
    model = ByteTransformer(settings.size)
    return model, arms.build(ARMS[settings.arm], model, settings.lr, cycle_length)


def measured(training: Texts, held_out: Texts, settings: Settings) -> Result:
    title = f"{settings.arm:22} lr {settings.lr:g} seed {settings.seed}"
    with Progress(total=settings.steps, desc=title) as bar:
        return train(training, held_out, settings, WINDOWS, build_arm, lambda _: bar.update())


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
    parser.add_argument("--steps", type=int, default=SIZE.steps, help="cycles of a run (%(default)s)")
    parser.add_argument(
        "--start", type=float, default=ADAMW_LR, help="where the search for Muon's begins (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="also write everything there, as JSON, after each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    demo = parse([])
    training, held_out, manifest = load(demo.cache, demo.cap_mb)
    searched: list[Result] = []
    runs: list[Result] = []

    def measure(arm: str, seed: int, into: list[Result], lr: float) -> float:
        settings = Settings(SIZE, arm, seed, lr, 0.0, options.steps)
        into.append(measured(training, held_out, settings))
        bits = into[-1].mean_bits
        return bits if math.isfinite(bits) else math.inf

    result: dict[str, Any] = {
        **{"processor": processor(), **versions(), "threads": 1},
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
