"""Runs the jobs of a study in parallel processes, and writes what they measure as it comes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch

from nexus_fused.demo.data import Texts
from nexus_fused.demo.progress import Progress

from . import StudyError
from .plan import Wanted, pending, work
from .results import Results
from .runs import SIZES, Point, Run, Stopped, parameters, perform

TICKS = 10
"""Cycles between two messages of progress."""


class Worker:
    """What a worker process holds; `the` is the one of this process."""

    the: Worker

    def __init__(self, texts: tuple[Texts, Texts], device: str, dtype: str, messages: Any, stop: Any) -> None:
        self.training, self.held_out = texts
        self.device, self.dtype, self.messages, self.stop = device, dtype, messages, stop

    def perform(self, run: Run, points: list[Point]) -> None:
        """Measure all points of a run; ends early, without an error, where the study has been stopped."""
        cycles, of_cycle = 0, 6.0 * parameters(run.size) * SIZES[run.size].cycle_tokens

        def tick() -> None:
            nonlocal cycles
            cycles += 1
            if cycles % TICKS == 0:
                self.messages.put(("work", TICKS * of_cycle))
            if self.stop.is_set():
                raise Stopped

        try:
            for point, measured in perform(
                run, points, self.training, self.held_out, self.device, self.dtype, tick
            ):  # fmt: skip
                self.messages.put(("point", (point, measured)))
        except Stopped:
            pass
        self.messages.put(("end", run))


def begin(*arguments: Any) -> None:
    """Prepare a worker process: one thread, what repeats bit for bit; Ctrl-C is for the process that gave the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Worker.the = Worker(*arguments)
    if torch.device(Worker.the.device).type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def do(run: Run, points: list[Point]) -> None:
    """Perform a job in this worker process."""
    Worker.the.perform(run, points)


def study(
    wanted: Wanted,
    results: Results,
    texts: tuple[Texts, Texts],
    device: str,
    dtype: str,
    workers: int,
    minutes: float,
    stamp: dict[str, str],
) -> bool:
    """Measure what is wanted and missing; return False where the time was over before.

    `stamp` goes into each line. Raises StudyError, and KeyboardInterrupt once the workers have ended; what had been
    measured until then is in `results`.
    """
    domains = sorted(texts[0])
    context = multiprocessing.get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    deadline = time.monotonic() + 60 * minutes
    running: dict[Run, Future[None]] = {}
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=begin, initargs=(texts, device, dtype, messages, stop)
    )
    ahead = partial(pending, wanted, results.measured, domains)
    jobs = ahead()
    bar = Progress(total=sum(work(*job) for job in jobs.items()), desc="study", unit_scale=True, unit="FLOP")
    with bar, executor:
        try:
            while jobs and not stop.is_set():
                for run in [run for run in jobs if run not in running][: workers - len(running)]:
                    running[run] = executor.submit(do, run, jobs[run])
                kind, content = message(messages, running)
                if kind == "point":
                    point, measured = content
                    results.add(point, {**measured, **stamp})
                elif kind == "work":
                    bar.update(content)
                elif kind == "end":
                    running.pop(content)
                    jobs = ahead()
                    bar.total = max(bar.n, bar.n + sum(work(*job) for job in jobs.items() if job[0] not in running))
                    bar.set_postfix_str(f" {len(jobs)} runs ahead", refresh=False)
                if time.monotonic() > deadline:
                    stop.set()
        except BaseException:
            stop.set()
            raise
        finally:
            if stop.is_set():
                executor.shutdown(wait=False, cancel_futures=True)
                rescue(messages, running, results, stamp)
    return not stop.is_set()


def message(messages: Any, running: dict[Run, Future[None]]) -> tuple[str, Any]:
    """Return the next message, ("", None) after a second without one; raises StudyError where a worker has died."""
    try:
        kind, content = messages.get(timeout=1.0)
        return kind, content
    except queue.Empty:
        for run, future in running.items():
            if future.done() and (error := future.exception()):
                died = isinstance(error, BrokenProcessPool)
                why = "a worker process died (out of memory?)" if died else f"{type(error).__name__}: {error}"
                raise StudyError(f"{why}, in the run {run}. What was measured is kept.") from error
        return "", None


def rescue(messages: Any, running: dict[Run, Future[None]], results: Results, stamp: dict[str, str]) -> None:
    """Write what workers measured while they were told to stop; each of them ends within a cycle or an evaluation."""
    given_up = time.monotonic() + 60
    while running and time.monotonic() < given_up:
        try:
            kind, content = messages.get(timeout=1.0)
        except queue.Empty:
            for run in [run for run, future in running.items() if future.done()]:
                running.pop(run)
            continue
        if kind == "point":
            results.add(content[0], {**content[1], **stamp})
        elif kind == "end":
            running.pop(content)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
