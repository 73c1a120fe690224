"""The command line: `python -m bench.study run` measures, `python -m bench.study report` shows."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nexus_fused.demo import DemoError, cache_folder
from nexus_fused.demo.__main__ import check_device
from nexus_fused.demo.corpora import TRAINING
from nexus_fused.demo.data import load, write_atomically
from nexus_fused.demo.train import BETAS, CLIP, WEIGHT_DECAY
from nexus_fused.demo.workers import cores

from ..__main__ import processor
from ..gpu import output_of
from . import StudyError, arms, plan, pool
from .results import VERSION, Results, read
from .runs import ALIGNED, EVALUATED, MILLION, SIZES, WARM_UP


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what a file does not have yet")
    add = run.add_argument
    add("file", type=Path, help="measurements are added to it, as JSON lines")
    add(
        "--arms",
        nargs="+",
        default=["adamw", "unit", "nexus:0.2"],
        help="adamw, unit, nexus:γ, muon, muon+unit, muon+nexus:γ (%(default)s)",
    )
    add("--sizes", nargs="+", default=["0.1M", "0.2M"], help=f"of {', '.join(SIZES)} (%(default)s)")
    add("--inner-steps", nargs="+", type=int, default=[5], help="K; a cycle is as long at any K (%(default)s)")
    add("--seeds", type=int, default=5, help="runs of each combination (%(default)s)")
    add(
        "--tokens",
        nargs="+",
        type=float,
        default=[0.5, 1, 2, 4],
        help="of pretraining, in millions, each a point of one run (%(default)s)",
    )
    add("--domains", nargs="+", default=[], help="to specialize on from each of these points (none)")
    add(
        "--domain-tokens",
        nargs="+",
        type=float,
        default=[0.05, 0.15, 0.4],
        help="of specialization, in millions (%(default)s)",
    )
    add(
        "--search-tokens",
        type=float,
        default=0.5,
        help="after which learning rates are compared, in millions (%(default)s)",
    )
    add("--search-from", type=float, default=8e-3, help="the learning rate that a search begins at (%(default)s)")
    add("--search-seeds", type=int, default=3, help="runs of each learning rate of a search (%(default)s)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", choices=("float32", "bfloat16"), help="of the forward pass (float32 on a CPU, else bfloat16)")
    add("--workers", type=int, help="runs at a time (as many as cores; 1 on a GPU)")
    add("--commit", help="of the code, recorded in each line, where git cannot say it")
    add("--minutes", type=float, default=1e6, help="stop after so long; the next call goes on (no limit)")
    add("--cap-mb", default=6.0, type=float, help="MB of text read per training domain (%(default)s)")
    add("--cache", default=cache_folder(), type=Path, help="folder of the text (%(default)s)")
    report = commands.add_parser("report", help="print what a file shows, and draw it")
    report.add_argument("file", type=Path)
    report.add_argument("--pictures", type=Path, help="folder for SVG pictures")
    report.add_argument("--json", type=Path, help="write every figure there")
    report.add_argument("--into", type=Path, help="renew the tables of a Markdown page: docs/evidence.md")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise StudyError for what cannot be run, before anything is."""
    for arm in options.arms:
        arms.parse(arm)
    for kind, asked, known in (("size", options.sizes, SIZES), ("domain", options.domains, TRAINING)):
        if unknown := [name for name in asked if name not in known]:
            raise StudyError(f"there is no {kind} {unknown[0]!r}: {', '.join(known)}.")
    positive = "seeds tokens domain_tokens inner_steps search_tokens search_from search_seeds minutes workers cap_mb"
    for name in positive.split():
        given = getattr(options, name)
        if given is not None and not all(0 < x < math.inf for x in (given if isinstance(given, list) else [given])):
            raise StudyError(f"--{name.replace('_', '-')} takes numbers above 0.")
    if options.seeds > plan.FIRST_SEARCHED:
        raise StudyError(f"--seeds: {plan.FIRST_SEARCHED} at most; the seeds after them are for learning rates.")
    if not plan.SMALLEST <= options.search_from <= plan.LARGEST:
        raise StudyError(f"--search-from takes numbers from {plan.SMALLEST:g} to {plan.LARGEST:g}.")
    for size in (SIZES[name] for name in options.sizes):
        for steps in options.inner_steps:
            if steps % len(TRAINING) or size.windows % steps:
                raise StudyError(
                    f"--inner-steps {steps}: a cycle has {size.windows} windows of {len(TRAINING)} domains, so K must "
                    "be a multiple of the domains that divides the windows."
                )
        for name, least in (("tokens", options.tokens), ("search-tokens", [options.search_tokens])):
            if size.cycles(MILLION * min(least)) < 2 * WARM_UP:
                needed = 2 * WARM_UP * size.cycle_tokens / MILLION
                raise StudyError(f"--{name} {min(least):g} is hardly more than the warm-up; take {needed:g} or more.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise StudyError(f"--device {options.device} cannot be used here: cpu and cuda can.")


def settings_of(
    options: argparse.Namespace, dtype: str, how: plan.HowToSearch, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Return what measurements of one file have in common."""
    return {
        "version": VERSION,
        "dtype": dtype,
        "device": torch.device(options.device).type,
        "warm_up_cycles": WARM_UP,
        "decay": plan.DECAY,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "clip": CLIP,
        "windows_evaluated": EVALUATED,
        "cycles_of_alignment": ALIGNED,
        "search": how._asdict(),
        "data": {"sha256": manifest["sha256"], "python": manifest["python"], "cap_mb": manifest["cap_mb"]},
    }


def run(options: argparse.Namespace) -> None:
    """Measure; raises DemoError and OSError."""
    check(options)
    check_device(options.device)
    on_cpu = torch.device(options.device).type == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    training, held_out, manifest = load(options.cache, options.cap_mb)
    if min(map(len, held_out.values())) <= max(SIZES[size].context for size in options.sizes):
        raise StudyError(f"--cap-mb {options.cap_mb:g} leaves a domain without text to evaluate; choose more.")
    seeds = list(range(plan.FIRST_SEARCHED, plan.FIRST_SEARCHED + options.search_seeds))
    how = plan.HowToSearch(seeds, options.search_from, MILLION * options.search_tokens)
    wanted = plan.Wanted(
        options.arms,
        options.sizes,
        options.inner_steps,
        options.seeds,
        [MILLION * tokens for tokens in options.tokens],
        options.domains,
        [MILLION * tokens for tokens in options.domain_tokens],
        how,
    )
    stamp = {
        "commit": options.commit or next(iter(output_of("git", "describe", "--always", "--dirty")), "unknown"),
        "torch": torch.__version__,
        "processor": processor() if on_cpu else torch.cuda.get_device_name(options.device),
    }
    workers, names = options.workers or (cores() if on_cpu else 1), sorted(training)
    with Results(options.file, settings_of(options, dtype, how, manifest)) as results:
        if results.cut_off:
            print(f"The last line of {options.file} was cut off while it was written; it is left out.")
        ahead = sum(map(len, plan.pending(wanted, results.measured, names)))
        print(f"{options.file} has {len(results.measured)} measurements; {ahead} runs are ahead.", flush=True)
        try:
            done = pool.study(
                wanted, results, (training, held_out), options.device, dtype, workers, options.minutes, stamp
            )
        finally:
            print(f"{options.file} has {len(results.measured)} measurements.")
        for run in plan.hopeless(wanted, results.measured, names):
            print(
                f"{run.arm} at {run.size} with K = {run.inner_steps} diverged at every learning rate; it is left out."
            )
        if not done:
            print("The time is over; the same command goes on.")


def report(options: argparse.Namespace) -> None:
    """Show; raises StudyError and OSError."""
    from . import figures, plots
    from .report import insert, text

    settings, measured, _ = read(options.file)
    study = figures.Study(settings, measured)
    laws = figures.Laws(study)
    found = figures.figures(study, laws)
    print(text(found))
    if options.json:
        content = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        write_atomically(options.json, content.encode())
    if options.into:
        insert(found, options.into)
    if options.pictures:
        print("\nWritten:", *plots.draw(found, laws, options.pictures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it; return the exit status: 0, 1 (something to put right), 2 (wrong usage), 130 (Ctrl-C)."""
    options = parse(arguments)
    try:
        {"run": run, "report": report}[options.command](options)
    except DemoError as error:
        print(f"\nThe study stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        print(f"\nThe study stopped: {error.strerror or error}{where}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What was measured is kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
