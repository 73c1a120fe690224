"""What is still to be measured: which learning rates first, then which points at each arm's own best one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from . import StudyError
from .runs import MIXTURE, SIZES, Point, Run, parameters

SEARCHED = 100
"""The seed that learning rates are searched on; it is not reported."""
START = 8e-3
"""Where a search begins."""
SMALLEST, LARGEST = 2.0**-20, 8.0
DECAY = 0.2
"""Tokens of a branch on the mixture, of the tokens before it."""

Measured = Mapping[Point, Mapping[str, Any]]


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
    search_tokens: float


def whole(size: str, tokens: float) -> int:
    """Return the tokens of the whole cycles that come nearest."""
    return SIZES[size].cycles(tokens) * SIZES[size].cycle_tokens


def annealed(run: Run, tokens: float) -> Point:
    """Return the branch of a run on the mixture."""
    begin = whole(run.size, tokens)
    return Point(*run, begin, MIXTURE, whole(run.size, DECAY * begin))


def points_of(wanted: Wanted, run: Run) -> Iterator[Point]:
    """Yield all points of one run."""
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


def searched(measured: Measured, run: Run, tokens: float, domains: Sequence[str]) -> dict[float, float]:
    """Return what a search has found: learning rate → mean bits per byte. The run's own rate does not matter."""
    branch = annealed(run, tokens)
    rates = (point.lr for point in measured if point._replace(lr=run.lr) == branch)
    return {lr: mean_bits(measured[branch._replace(lr=lr)], domains) for lr in sorted(rates)}


def next_rates(found: Mapping[float, float], start: float) -> list[float]:
    """Return the learning rates to try next: none once the best one's neighbors, half and double, were worse."""
    if not found:
        return [start]
    best = min(found, key=lambda lr: found[lr])
    if math.isinf(found[best]):
        best = min(found)
        if best / 2 < SMALLEST:
            raise StudyError(f"every learning rate from {best:g} on diverged.")
        return [best / 2]
    return [lr for lr in (best * 2, best / 2) if lr not in found and SMALLEST <= lr <= LARGEST]


def pending(wanted: Wanted, measured: Measured, domains: Sequence[str]) -> dict[Run, list[Point]]:
    """Return the points that can be measured now, by run, in the order in which they should be.

    A search comes before the runs at the rate that it finds; points of these appear once it has ended.
    """
    searches: dict[Run, list[Point]] = {}
    jobs: dict[Run, list[Point]] = {}
    for seed in range(wanted.seeds):
        for size in wanted.sizes:
            for inner_steps in wanted.inner_steps:
                for arm in wanted.arms:
                    start = Run(arm, size, inner_steps, SEARCHED, START)
                    found = searched(measured, start, wanted.search_tokens, domains)
                    rates = next_rates(found, START)
                    for lr in rates:
                        trial = start._replace(lr=lr)
                        searches[trial] = [annealed(trial, wanted.search_tokens)]
                    if not rates:
                        run = Run(arm, size, inner_steps, seed, min(found, key=lambda lr: found[lr]))
                        missing = [point for point in points_of(wanted, run) if point not in measured]
                        if missing:
                            jobs[run] = missing
    return {**searches, **jobs}


def work(run: Run, points: Sequence[Point]) -> float:
    """Return the floating-point operations of a job: 6 N per token."""
    tokens = max(point.tokens for point in points) + sum(point.decay_tokens for point in points)
    return 6.0 * parameters(run.size) * tokens
