"""The command line: `python -m nexus_fused.demo`."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from . import DemoError

if TYPE_CHECKING:
    from .data import Texts
    from .train import Result, Settings

WINDOWS = 128
"""Evaluation windows per domain at the end of a run."""


def numbers(text: str) -> tuple[float, ...]:
    """Parse "0.002,0.004" into floats above 0."""
    values = tuple(float(part) for part in text.split(","))
    if not all(value > 0 for value in values):
        raise argparse.ArgumentTypeError("numbers above 0, please")
    return values


def positive(text: str) -> float:
    """Parse one float above 0."""
    return numbers(text)[0]


def count(text: str) -> int:
    """Parse one whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a whole number above 0, please")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse ends the program where it is wrong."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(
        prog="python -m nexus_fused.demo",
        description="Trains the same small model on five kinds of text with AdamW and with NexusAdamW.",
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default) or cuda")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the forward pass (%(default)s)",
    )
    add("--size", default="tiny", choices=("tiny", "small", "100m"), help="the model (%(default)s)")
    add(
        "--seeds",
        default=2,
        type=count,
        help="runs per optimizer, each its own start and order (%(default)s)",
    )
    add("--steps", type=count, help="cycles of five micro-batches (by size)")
    add("--lr", type=positive, help="the peak learning rate of both optimizers; skips the grid")
    add("--lr-grid", type=numbers, metavar="LR,LR", help="AdamW's best of these serves both (by size)")
    add(
        "--inner-lr",
        default=0.05,
        type=positive,
        help="Nexus' inner steps, fixed, not searched for (%(default)s)",
    )
    add("--threads", type=count, help="of the CPU (by size: 1 for tiny, else as many as PyTorch takes)")
    add("--cap-mb", default=6.0, type=float, help="MB of text read per training domain, 0: all (%(default)s)")
    add("--cache", default=caches / "nexus_fused", type=Path, help="folder of the text (%(default)s)")
    add("--out", default=Path("demo_out"), type=Path, help="folder of the results (%(default)s)")
    return parser.parse_args(arguments)


def require_extras() -> None:
    """Raise DemoError when a package that only the demo needs is missing."""
    missing = [name for name in ("matplotlib", "numpy", "tqdm") if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def prepare_device(device: str, threads: int) -> None:
    """Use so many threads, 0: as PyTorch would; raise DemoError when torch cannot use the device."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    if threads:
        torch.set_num_threads(threads)


def settings_of(options: argparse.Namespace, arm: str, seed: int, lr: float) -> "Settings":
    """Return the settings of one run."""
    from .model import SIZES
    from .train import Settings

    size = SIZES[options.size]
    steps = options.steps or size.steps
    return Settings(size, arm, seed, lr, options.inner_lr, steps, options.device, options.dtype)


def search(options: argparse.Namespace, training: "Texts", held_out: "Texts") -> "list[Result]":
    """Train AdamW with seed 0 on every learning rate of the grid."""
    from .model import SIZES
    from .train import train

    grid = options.lr_grid or SIZES[options.size].lr_grid
    results = [train(training, held_out, settings_of(options, "AdamW", 0, lr), WINDOWS) for lr in grid]
    if not any(isfinite(result.mean_bits) for result in results):
        raise DemoError("AdamW diverged at every learning rate of the grid; try smaller ones with --lr-grid.")
    return results


def run(options: argparse.Namespace) -> None:
    """Do the whole comparison; raises DemoError and OSError."""
    require_extras()
    from .data import load
    from .model import SIZES
    from .train import train

    size = SIZES[options.size]
    prepare_device(options.device, options.threads or size.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out, manifest = load(options.cache, options.cap_mb)
    if min(map(len, held_out.values())) <= size.context:
        raise DemoError(f"--cap-mb {options.cap_mb:g} leaves a domain without text to evaluate; choose more.")
    runs_ahead = 2 * options.seeds + (0 if options.lr else len(options.lr_grid or size.lr_grid) - 1)
    print(f"{runs_ahead} runs of {options.steps or size.steps} cycles; Ctrl-C stops them.", flush=True)
    grid = [] if options.lr else search(options, training, held_out)
    best = min((r for r in grid if isfinite(r.mean_bits)), key=lambda r: r.mean_bits, default=None)
    lr = best.lr if best else options.lr
    runs = [best] if best else []
    for seed in range(options.seeds):
        arms = ("Nexus",) if best and seed == 0 else ("AdamW", "Nexus")
        runs += [train(training, held_out, settings_of(options, arm, seed, lr), WINDOWS) for arm in arms]
    for result in runs:
        if not all(isfinite(bits) for bits in result.bits.values()):
            where = f"learning rate {lr:g}, inner_lr {options.inner_lr:g}, seed {result.seed}"
            raise DemoError(f"{result.arm} diverged ({where}); try a smaller --lr or --inner-lr.")
    publish(options, lr, manifest, grid, runs)


def publish(
    options: argparse.Namespace,
    lr: float,
    manifest: dict[str, Any],
    grid: "list[Result]",
    runs: "list[Result]",
) -> None:
    """Print the report and write the JSON file and the picture."""
    from . import plot, report

    rows = report.compare(runs)
    settings = settings_of(options, "both", 0, lr)
    chosen = "AdamW's best" if grid else "given"
    title = f"{settings.steps} cycles, {options.seeds} seed(s), learning rate {lr:g} ({chosen}), "
    title += f"inner_lr {options.inner_lr:g} (fixed)"
    lines = [fill(report.finding(rows), 90), "", report.table(rows)]
    lines += ["(± is the standard deviation over seeds; differences are taken seed by seed.)", ""]
    lines += [report.grid_lines(grid, lr)]
    lines += [
        f"Nexus' inner_lr {options.inner_lr:g} follows the schedule; it was fixed beforehand, not searched for here."
    ]
    lines += [report.alignment_line(runs), report.cost_lines(runs, settings.steps)]
    lines += [report.text_line(manifest, runs)]
    print("\n" + "\n".join(lines))
    recorded = asdict(settings) | {"seeds": options.seeds, "windows": WINDOWS, "lr_given": bool(options.lr)}
    report.write_json(options.out / "result.json", recorded, manifest, grid, runs, rows)
    plot.draw(options.out / "result.png", runs, rows, title)
    print(f"\nWritten: {options.out / 'result.json'} and {options.out / 'result.png'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status: 0, 1 (something to put right), 2 (wrong usage), 130 (Ctrl-C)."""
    options = parse(arguments)
    try:
        run(options)
    except DemoError as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        room = f"Text needs about 200 MB in {options.cache}, results 1 MB in {options.out}"
        remedy = f"{room}; make room, or choose other folders with --cache and --out."
        print(f"\nThe demo stopped: {error.strerror or error}{where}. {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Nothing half done will be used; run the demo again to start over.",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
