"""Runs the jobs of a study in parallel processes, and writes what they measure as it comes."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from nexus_fused.demo.data import Texts
from nexus_fused.demo.progress import Progress
from nexus_fused.demo.workers import Tell, Workers

from .plan import Jobs, Wanted, pending, work
from .results import Results
from .runs import SIZES, Point, Run, parameters, perform

TICKS = 10
"""Cycles between two messages of progress."""


def do(shared: tuple[Texts, Texts, str, str], tell: Tell, run: Run, points: list[Point]) -> None:
    """In a worker process: tell each point with what was measured there, and the operations done, a number."""
    training, held_out, device, dtype = shared
    if torch.device(device).type != "cpu":  # where not every operation repeats bit for bit
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # with warn_only attention's backward pass stays as it is
        torch.utils.deterministic.fill_uninitialized_memory = False
    cycles, of_cycle = 0, 6.0 * parameters(run.size) * SIZES[run.size].cycle_tokens

    def tick() -> None:
        nonlocal cycles
        cycles += 1
        if cycles % TICKS == 0:
            tell(TICKS * of_cycle)

    for measured in perform(run, points, training, held_out, device, dtype, tick):
        tell(measured)


def study(
    wanted: Wanted,
    results: Results,
    texts: tuple[Texts, Texts],
    device: str,
    dtype: str,
    count: int,
    minutes: float,
    stamp: dict[str, str],
) -> bool:
    """Measure what is wanted and missing, `count` runs at a time; return False where the time was over before.

    `stamp` goes into each line. What was measured is in `results` whatever this raises: StudyError, DemoError, OSError,
    KeyboardInterrupt.
    """
    domains = sorted(texts[0])
    deadline = time.monotonic() + 60 * minutes
    jobs, later = pending(wanted, results.measured, domains)
    if not jobs:
        return True
    begun: Jobs = {}
    bar = Progress(total=work(jobs) + work(later), desc="study", unit_scale=True)

    def note(content: Any) -> None:
        if isinstance(content, float):
            bar.update(content)
        elif content is not None:
            point, measured = content
            results.add(point, {**measured, **stamp, "shape": SIZES[point.size].shape})

    with bar, Workers(min(count, len(jobs) + len(later)), 1, (*texts, device, dtype)) as workers:
        try:
            while jobs and time.monotonic() < deadline:
                for run in [run for run in jobs if run not in workers.running][: workers.free]:
                    begun[run] = jobs[run]
                    workers.submit(run, do, run, jobs[run])
                heard = workers.hear()
                if heard is None:
                    continue
                note(heard[1])
                if heard[1] is None:
                    jobs, later = pending(wanted, results.measured, domains)
                    bar.total = work({**jobs, **begun}) + work(later)
                    bar.set_postfix_str(f" {len(jobs) + len(later)} runs ahead", refresh=False)
        finally:
            for _, content in workers.stop():
                note(content)
    jobs, later = pending(wanted, results.measured, domains)
    return not jobs and not later
