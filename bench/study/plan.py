"""What is still to be measured: which learning rates first, then which points at each arm's own best one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from .runs import MIXTURE, SIZES, Point, Run, parameters

FIRST_SEARCHED = 100
"""The first of the seeds that learning rates are searched on; they are not reported."""
SMALLEST, LARGEST = 2.0**-20, 8.0
DECAY = 0.2
"""Tokens of a branch on the mixture, as a share of the tokens before it."""

Measured = Mapping[Point, Mapping[str, Any]]


class HowToSearch(NamedTuple):
    """How learning rates are searched for: on which seeds, beginning where, compared after how many tokens."""

    seeds: Sequence[int]
    start: float
    tokens: float


@dataclass(frozen=True)
class Wanted:
    """What is asked for: every combination. Tokens are numbers; `domain_tokens` are for each of `domains`."""

    arms: Sequence[str]
    sizes: Sequence[str]
    inner_steps: Sequence[int]
    seeds: int
    tokens: Sequence[float]
    domains: Sequence[str]
    domain_tokens: Sequence[float]
    search: HowToSearch


def whole(size: str, tokens: float) -> int:
    """Return the tokens of the whole cycles that come nearest."""
    return SIZES[size].cycles(tokens) * SIZES[size].cycle_tokens


def annealed(run: Run, tokens: float) -> Point:
    """Return the branch of a run on the mixture."""
    begin = whole(run.size, tokens)
    return Point(*run, begin, MIXTURE, whole(run.size, DECAY * begin))


def points_of(wanted: Wanted, run: Run) -> list[Point]:
    """Return all points of one run, each once: amounts of tokens that come to the same cycles are one."""
    return list(dict.fromkeys(_points_of(wanted, run)))


def _points_of(wanted: Wanted, run: Run) -> Iterator[Point]:
    for tokens in wanted.tokens:
        begin = whole(run.size, tokens)
        yield Point(*run, begin)
        yield annealed(run, tokens)
        for domain in wanted.domains:
            for decay in wanted.domain_tokens:
                yield Point(*run, begin, domain, whole(run.size, decay))


def mean_bits(measured: Mapping[str, Any], domains: Sequence[str]) -> float:
    """Return the mean bits per byte over domains, infinite for a run that diverged."""
    if measured["diverged"]:
        return math.inf
    return fmean(measured["bits"][name] for name in domains)


def trials(run: Run, lr: float, how: HowToSearch) -> list[Point]:
    """Return what is measured of a learning rate in the search for an arm's; seed and rate of `run` do not matter."""
    return [annealed(run._replace(seed=seed, lr=lr), how.tokens) for seed in how.seeds]


@dataclass(frozen=True)
class Search:
    """What the search for an arm's learning rate has come to: bits per byte by rate, and what is still to be measured.

    `best` is None until the search has ended, and where the arm diverged at every rate.
    """

    bits: dict[float, float]
    missing: list[Point]
    best: float | None = None


def search(measured: Measured, run: Run, how: HowToSearch, domains: Sequence[str]) -> Search:
    """Step from where a search begins to the better neighbor, half or double, until both are worse.

    Bits per byte are means over the seeds of a search, infinite where one diverged. What a search comes to depends on
    the measurements alone, not on the order in which they were made.
    """
    bits: dict[float, float] = {}
    best = how.start
    while True:
        near = [lr for lr in (best / 2, best, best * 2) if SMALLEST <= lr <= LARGEST]
        missing = [point for lr in near for point in trials(run, lr, how) if point not in measured]
        if missing:
            return Search(bits, missing)
        for lr in near:
            bits[lr] = fmean(mean_bits(measured[point], domains) for point in trials(run, lr, how))
        better = min(near, key=lambda lr: (bits[lr], lr != best))
        if math.isinf(bits[better]):
            better = near[0]
            if better == best:
                return Search(dict(sorted(bits.items())), [])
        if better == best:
            return Search(dict(sorted(bits.items())), [], best)
        best = better


Jobs = dict[Run, list[Point]]
"""What is to be measured of each run."""


def searched(wanted: Wanted) -> list[Run]:
    """Return a run of each arm, size and K: what a search is for."""
    every = product(wanted.sizes, wanted.inner_steps, wanted.arms)
    return [Run(arm, size, inner_steps, 0, wanted.search.start) for size, inner_steps, arm in every]


def hopeless(wanted: Wanted, measured: Measured, domains: Sequence[str]) -> list[Run]:
    """Return those that diverged at every learning rate."""
    ended = [(run, search(measured, run, wanted.search, domains)) for run in searched(wanted)]
    return [run for run, found in ended if found.best is None and not found.missing]


def pending(wanted: Wanted, measured: Measured, domains: Sequence[str]) -> tuple[Jobs, Jobs]:
    """Return what can be measured now, in the order in which it should be, and the runs whose rate is searched for."""
    searches: Jobs = {}
    jobs: Jobs = {}
    later: Jobs = {}
    ended = [(run, search(measured, run, wanted.search, domains)) for run in searched(wanted)]
    for seed in range(wanted.seeds):
        for of_arm, found in ended:
            run = of_arm._replace(seed=seed)
            searches |= {point.run: [point] for point in found.missing}
            if found.best is None:
                if found.missing:
                    later[run] = points_of(wanted, run)
                continue
            run = run._replace(lr=found.best)
            missing = [point for point in points_of(wanted, run) if point not in measured]
            if missing:
                jobs[run] = missing
    return {**searches, **jobs}, later


def work(jobs: Jobs) -> float:
    """Return the floating-point operations of jobs: 6 N per token."""
    return sum(
        6.0 * parameters(run.size) * (max(p.tokens for p in points) + sum(p.decay_tokens for p in points))
        for run, points in jobs.items()
    )
