"""The command line: `python -m nexus_fused.demo`."""

import argparse
import errno
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from . import DemoError, cache_folder

if TYPE_CHECKING:
    from .progress import Progress
    from .train import Result, Settings
    from .workers import Workers

WINDOWS = 128
"""Evaluation windows per domain at the end of a run."""
OF_FOLDERS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""Errors that another folder, or more room in it, puts right."""


def numbers(text: str) -> tuple[float, ...]:
    """Parse "0.002,0.004" into floats above 0, each once."""
    values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    if not all(0 < value < inf for value in values):
        raise argparse.ArgumentTypeError("numbers above 0, please")
    return values


def positive(text: str) -> float:
    """Parse one float above 0."""
    return numbers(text)[0]


def megabytes(text: str) -> float:
    """Parse one float of at least 0."""
    value = float(text)
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError("a number of at least 0, please")
    return value


def count(text: str) -> int:
    """Parse one whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("a whole number above 0, please")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m nexus_fused.demo",
        description="Trains the same small model on five kinds of text with AdamW, with NexusAdamW, and with the "
        "control between them: unit gradients without a walk.",
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
        default=4,
        type=count,
        help="runs per optimizer, each its own start and order (%(default)s)",
    )
    add("--steps", type=count, help="cycles of five micro-batches (by size)")
    add("--lr", type=positive, help="the peak learning rate of all optimizers; skips the grid")
    add("--lr-grid", type=numbers, metavar="LR,LR", help="AdamW's best of these serves all (by size)")
    add(
        "--inner-lr",
        default=0.2,
        type=positive,
        help="γ of Nexus, fixed, not searched for here (%(default)s)",
    )
    add(
        "--threads",
        type=count,
        help="of a run on the CPU (by size: 1 for tiny, else as many as PyTorch takes); all cores are used",
    )
    add("--cap-mb", default=6.0, type=megabytes, help="MB of text read per training domain, 0: all (%(default)s)")
    add("--cache", default=cache_folder(), type=Path, help="folder of the text (%(default)s)")
    add("--out", default=Path("demo_out"), type=Path, help="folder of the results (%(default)s)")
    return parser.parse_args(arguments)


def require_extras() -> None:
    """Raise DemoError when a package that only the demo needs is missing."""
    missing = [name for name in ("matplotlib", "numpy", "tqdm") if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def check_device(device: str) -> None:
    """Raise DemoError when torch cannot use the device."""
    import torch

    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise DemoError(f"--device is cpu or cuda, not {device}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def settings_of(options: argparse.Namespace, arm: str, seed: int, lr: float, nudged: bool = False) -> "Settings":
    """Return the settings of one run."""
    from .model import SIZES
    from .train import Settings

    size = SIZES[options.size]
    steps = options.steps or size.steps
    return Settings(size, arm, seed, lr, options.inner_lr, steps, options.device, options.dtype, nudged)


def search(results: "Sequence[Result]") -> float:
    """Return AdamW's best learning rate of a grid."""
    finished = [result for result in results if isfinite(result.mean_bits)]
    if not finished:
        raise DemoError("AdamW diverged at every learning rate of the grid; try smaller ones with --lr-grid.")
    return min(finished, key=lambda result: result.mean_bits).lr


def perform(jobs: "Sequence[Settings]", workers: "Workers", bar: "Progress") -> "list[Result]":
    """Train with all settings and return the results in the order of the settings."""
    from .train import Result, work

    results: dict[Settings, Result] = {}
    waiting = list(jobs)
    while len(results) < len(jobs):
        while waiting and workers.free:
            settings = waiting.pop(0)
            workers.submit(settings, work, settings, WINDOWS)
        heard = workers.hear()
        if heard is None:
            continue
        settings, content = heard
        if isinstance(content, Result):
            results[settings] = content
            title = f"{settings.arm:5} lr {settings.lr:g} seed {settings.seed}{' nudged' if settings.nudged else ''}"
            bar.write(f"{title:27} {content.mean_bits:.3f} bits per byte, mean over what it trained on", sys.stderr)
        elif content is not None:
            bar.set_postfix_str(f" {settings.arm} seed {settings.seed}: loss {content:.2f}", refresh=False)
            bar.update()
    return [results[settings] for settings in jobs]


def run(options: argparse.Namespace) -> None:
    """Do the whole comparison; raises DemoError and OSError."""
    require_extras()
    from . import report
    from .data import load
    from .model import SIZES
    from .progress import Progress
    from .workers import Workers, cores

    size = SIZES[options.size]
    check_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    threads = options.threads or size.threads
    grid = () if options.lr else options.lr_grid or size.lr_grid
    ahead = len(grid) + 3 * options.seeds + (0 if grid else 1)
    steps = options.steps or size.steps
    count = min(ahead, max(1, cores() // threads)) if threads and options.device == "cpu" else 1
    print(
        "The same small model learns the same five kinds of text with AdamW, with Nexus, and with the control between "
        f"them:\nunit gradients, which are Nexus without its walk. First comes the text, then {ahead} runs of {steps} "
        f"cycles, {count} at a time; Ctrl-C stops them.",
        flush=True,
    )
    training, held_out, manifest = load(options.cache, options.cap_mb)
    if min(map(len, held_out.values())) <= size.context:
        raise DemoError(f"--cap-mb {options.cap_mb:g} leaves a domain without text to evaluate; choose more.")
    with (
        Progress(total=ahead * steps, desc="training") as bar,
        Workers(count, threads, (training, held_out)) as workers,
    ):
        searched = perform([settings_of(options, "AdamW", 0, lr) for lr in grid], workers, bar)
        lr = search(searched) if grid else options.lr
        jobs = [settings_of(options, arm, s, lr) for s in range(options.seeds) for arm in report.ARMS]
        jobs.append(settings_of(options, "Nexus", 0, lr, nudged=True))
        known = [result for result in searched if result.lr == lr]
        runs = known + perform(jobs[len(known) :], workers, bar)
    for result in runs:
        if not all(isfinite(bits) for bits in result.bits.values()):
            where = f"learning rate {lr:g}, inner_lr {options.inner_lr:g}, seed {result.seed}"
            raise DemoError(f"{result.arm} diverged ({where}); try a smaller --lr or --inner-lr.")
    publish(options, lr, manifest, searched, runs, threads)


def publish(
    options: argparse.Namespace,
    lr: float,
    manifest: dict[str, Any],
    grid: "Sequence[Result]",
    runs: "Sequence[Result]",
    threads: int,
) -> None:
    """Print the report and write the JSON file and the picture."""
    from . import plot, report

    rows, means = report.compare(runs), report.overall(runs)
    settings = settings_of(options, "all", 0, lr)
    chosen = "AdamW's best" if grid else "given"
    title = f"{settings.steps} cycles, {options.seeds} seed(s), learning rate {lr:g} ({chosen}), "
    title += f"inner_lr {options.inner_lr:g} (fixed)"
    lines = [fill(report.finding(means), 90), "", report.table(rows, means)]
    lines += [
        '(± is the standard error over seeds; differences are taken seed by seed. "unit" is AdamW on the mean of',
        " normalized gradients, without a walk. Not certain: the 95 % interval holds 0.)",
        "",
        report.rounding_line(runs),
        report.grid_lines(grid, lr),
        f"Nexus' inner_lr {options.inner_lr:g} follows the schedule; it was fixed beforehand, not searched for here.",
        report.alignment_line(runs),
        report.cost_lines(runs, settings.steps),
        report.text_line(manifest, runs),
    ]
    print("\n" + "\n".join(lines))
    recorded = asdict(settings) | {"seeds": options.seeds, "windows": WINDOWS, "lr_given": bool(options.lr)}
    recorded |= {"threads": threads}
    report.write_json(options.out / "result.json", recorded, manifest, grid, runs)
    plot.draw(options.out / "result.png", runs, rows, means, title)
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
        remedy = ""
        if error.errno in OF_FOLDERS:
            remedy = f" Text needs about 200 MB in {options.cache}, results 1 MB in {options.out}; "
            remedy += "make room, or choose other folders with --cache and --out."
        print(f"\nThe demo stopped: {error.strerror or error}{where}.{remedy}", file=sys.stderr)
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
