"""Turns measurements into figures: means over seeds, differences seed by seed, laws and splits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from nexus_fused.demo.progress import Progress
from nexus_fused.demo.report import certain, finite, spread
from nexus_fused.demo.train import UNIT

from . import StudyError
from .arms import parse, title
from .law import FORMS, Form, best_split, fit, relative_error
from .plan import HowToSearch, Search, search
from .runs import MILLION, MIXTURE, Point, parameters

Measured = Mapping[Point, Mapping[str, Any]]
RESAMPLED = 100
"""Fits of a bootstrap."""
CLAIMED = 5
"""Seeds behind a difference that is claimed, and behind an interval of a bootstrap."""


def domains_of(measured: Measured) -> tuple[list[str], list[str]]:
    """Return the domains trained on, and the unseen ones."""
    trained = next((m["bits"] for p, m in measured.items() if not p.domain), {})
    every = next((m["bits"] for p, m in measured.items() if p.domain == MIXTURE), {})
    return sorted(trained), [name for name in every if name not in trained]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds, its standard error (None of one seed) and the values."""
    found = spread(values)
    error = None if math.isnan(found.error) else round(found.error, 5)
    return {"mean": round(found.mean, 5) + 0.0, "standard_error": error, "by_seed": [round(v, 5) for v in values]}


def order(p: Point) -> tuple[Any, ...]:
    """Return what points are sorted by: sizes ascend, and AdamW, unit gradients, Nexus by γ, the same with Muon."""
    muon, walk = parse(p.arm)
    return parameters(p.size), p.inner_steps, p.tokens, p.domain, p.decay_tokens, muon, walk or 0.0, p.seed, p.lr


class Study:
    """The measurements of a file, those of each arm at the learning rate that its search found."""

    def __init__(self, settings: Mapping[str, Any], measured: Measured) -> None:
        self.trained, self.unseen = domains_of(measured)
        if not self.trained:
            raise StudyError("the file has no finished run yet: call `run` until it has.")
        how = HowToSearch(**settings["search"])
        self.searches: dict[tuple[str, str, int], Search] = {}
        for p in sorted(measured, key=order):
            if p[:3] not in self.searches:
                self.searches[p[:3]] = search(measured, p.run, how, self.trained)
        self.settings, self.every = settings, measured
        reported = {p: m for p, m in measured.items() if p.seed not in how.seeds and p.lr == self.searches[p[:3]].best}
        self.diverged = [p for p in sorted(reported, key=order) if reported[p]["diverged"]]
        self.measured = {p: m for p, m in reported.items() if not m["diverged"]}

    def left_out(self) -> list[str]:
        """Say which measurements are not shown, and why."""
        seeds = self.settings["search"]["seeds"]
        waiting = Counter(p[:3] for p in self.every if p.seed not in seeds and self.searches[p[:3]].best is None)
        said = []
        for (arm, size, k), found in self.searches.items():
            where = f"{title(arm)} at {size} with K = {k}"
            if found.best is None and not found.missing:
                said.append(f"{where} diverged at every learning rate.")
            elif number := waiting[arm, size, k]:
                said.append(f"{number} measurements of {where} are left out until its search has ended.")
        return said

    def groups(self, kind: Callable[[Point], bool]) -> dict[tuple[Any, ...], dict[str, dict[int, Point]]]:
        """Return the points of a kind: everything but arm, rate and seed → arm → seed → point, all in order."""
        found: dict[tuple[Any, ...], dict[str, dict[int, Point]]] = {}
        for p in sorted(filter(kind, self.measured), key=order):
            key = (p.size, p.inner_steps, p.tokens, p.domain, p.decay_tokens)
            found.setdefault(key, {}).setdefault(p.arm, {})[p.seed] = p
        return found

    def bits(self, point: Point, names: Iterable[str]) -> float:
        """Return the mean bits per byte over domains."""
        return fmean(self.measured[point]["bits"][name] for name in names)


def pairs(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Return which arms are compared: all with AdamW and those that walk with unit gradients, before Muon likewise."""
    arms = list(arms)
    found = []
    for arm in arms:
        muon, walk = parse(arm)
        before, plain = ("muon+", "muon") if muon else ("", "adamw")
        others = [] if walk is None else [plain] if walk == UNIT else [f"{before}unit", plain]
        others += ["adamw"] if arm == "muon" else []
        found += [(arm, other) for other in others if other in arms]
    return found


def row_of(key: tuple[Any, ...]) -> dict[str, Any]:
    """Return what a group of points has in common, as figures."""
    size, inner_steps, tokens, domain, decay = key
    row = {"size": size, "parameters": parameters(size), "inner_steps": inner_steps, "tokens": tokens}
    return {**row, "domain": domain, "decay_tokens": decay}


def difference(values: Sequence[float]) -> dict[str, Any]:
    """Return what is known of a difference: its summary, and whether the 95 % interval leaves 0 out."""
    return {**summary(values), "certain": certain(values)}


def differences(study: Study) -> list[dict[str, Any]]:
    """Return the differences between arms after the decay, over the seeds that both have."""
    rows = []
    for key, arms in study.groups(lambda p: p.domain == MIXTURE).items():
        for arm, other in pairs(arms):
            seeds = sorted(arms[arm].keys() & arms[other].keys())
            if seeds:
                row: dict[str, Any] = {**row_of(key), "arm": arm, "other": other, "seeds": len(seeds)}
                for kind, names in (("trained", study.trained), ("unseen", study.unseen)):
                    row[kind] = difference(
                        [study.bits(arms[arm][s], names) - study.bits(arms[other][s], names) for s in seeds]
                    )
                rows.append(row)
    return rows


def specialized(study: Study) -> list[dict[str, Any]]:
    """Return the differences between arms after specialization: means over the same D′ for all arms of a place.

    These are the D′ that make most of what was measured comparable: their number times that of the seeds that have all.
    """
    found: dict[tuple[Any, ...], dict[tuple[str, str], dict[int, dict[int, float]]]] = {}
    for (*key, decay), arms in study.groups(lambda p: p.domain not in ("", MIXTURE)).items():
        for arm, other in pairs(arms):
            by_seed = found.setdefault(tuple(key), {}).setdefault((arm, other), {})
            for s in sorted(arms[arm].keys() & arms[other].keys()):
                bits = (study.bits(arms[a][s], [key[3]]) for a in (arm, other))
                by_seed.setdefault(s, {})[decay] = next(bits) - next(bits)
    rows = []
    for key, of_pair in found.items():
        had = [frozenset(of) for by_seed in of_pair.values() for of in by_seed.values()]
        comparable = {amounts: len(amounts) * sum(of >= amounts for of in had) for amounts in had}
        amounts = sorted(max(comparable, key=lambda of: (comparable[of], sorted(of)), default=frozenset()))
        for (arm, other), by_seed in of_pair.items():
            whole = [fmean(of[decay] for decay in amounts) for of in by_seed.values() if of.keys() >= set(amounts)]
            if whole:
                row = {**row_of((*key, 0)), "arm": arm, "other": other, "seeds": len(whole), "domain_tokens": amounts}
                rows.append({**row, "difference": difference(whole)})
    return rows


def means(study: Study) -> list[dict[str, Any]]:
    """Return the annealed bits per byte of each arm, size, K and D, and the alignment before the decay."""
    rows = []
    diverged = Counter((*p[1:3], *p[5:], p.arm) for p in study.diverged)
    for key, arms in study.groups(lambda p: p.domain == MIXTURE).items():
        for arm, by_seed in arms.items():
            points = list(by_seed.values())
            row: dict[str, Any] = {**row_of(key), "arm": arm, "lr": points[0].lr, "seeds": len(points)}
            row["diverged"] = diverged[(*key, arm)]
            row["trained"] = summary([study.bits(p, study.trained) for p in points])
            row["unseen"] = summary([study.bits(p, study.unseen) for p in points])
            trunks = [study.measured.get(p._replace(domain="", decay_tokens=0)) for p in points]
            aligned = [m["alignment"] for m in trunks if m and m["alignment"] is not None]
            row["alignment"] = summary(aligned) if aligned else None
            rows.append(row)
    return rows


# The law


Rows = np.ndarray
"""Columns N, D, D′ (millions), bits per byte, seed."""
MOST = (4, 4, 3)
"""Sizes, amounts of D and amounts of D′ that a law needs, the largest N and the longest D among them."""


def table_of(study: Study, arm: str, inner_steps: int, domain: str) -> Rows:
    """Return the measurements of specialization on a domain, of a D that several sizes have and a D′ that all have."""
    rows = [
        (parameters(p.size) / MILLION, p.tokens / MILLION, p.decay_tokens / MILLION, study.bits(p, [domain]), p.seed)
        for p in study.measured
        if (p.arm, p.inner_steps, p.domain) == (arm, inner_steps, domain)
    ]
    number = len({row[0] for row in rows})
    for column, least in ((1, min(2, number)), (2, number)):
        sizes: dict[float, set[float]] = {}
        for row in rows:
            sizes.setdefault(row[column], set()).add(row[0])
        rows = [row for row in rows if len(sizes[row[column]]) >= least]
    return np.array(sorted(rows)).reshape(-1, 5)


def missing(table: Rows) -> str:
    """Say what a law lacks, "" if nothing: enough amounts of everything, all combinations of what would be fitted."""
    values = [sorted(set(table[:, i])) for i in range(3)]
    for name, found, least in zip(("sizes", "amounts of D", "amounts of D′"), values, MOST, strict=True):
        if len(found) < least:
            return f"{least} {name}: there are {len(found)} ({', '.join(f'{v:.3g}M' for v in found) or 'none'})"
    have = {tuple(row) for row in table[:, :3]}
    lacking = [p for p in product(values[0][:-1], values[1][:-1], values[2]) if p not in have]
    return "; ".join("N = {:.3g}M, D = {:.3g}M, D′ = {:.3g}M".format(*p) for p in lacking)


def held_out(table: Rows) -> np.ndarray:
    """Return which rows are never fitted: those of the largest N and those of the longest D."""
    return (table[:, 0] == table[:, 0].max()) | (table[:, 1] == table[:, 1].max())


def seeds_of(table: Rows) -> list[float]:
    """Return the seeds that every size, D and D′ of a table has."""
    of_point: dict[tuple[float, ...], set[float]] = {}
    for *point, _, seed in table:
        of_point.setdefault(tuple(point), set()).add(seed)
    return sorted(set.intersection(*of_point.values()))


def resampled(table: Rows, seeds: Sequence[float]) -> Rows:
    """Return the rows of seeds, each as often as it comes; runs of one seed have seen the same text at all sizes."""
    return np.concatenate([table[table[:, 4] == seed] for seed in seeds])


Fits = dict[str, np.ndarray]
"""Parameters of one form, by domain."""


class Laws:
    """Fits of every form to each arm and domain, and the form that predicts the runs best that it has not seen."""

    def __init__(self, study: Study) -> None:
        points = [p for p in sorted(study.measured, key=order) if p.domain not in ("", MIXTURE)]
        self.domains = sorted({p.domain for p in points})
        self.lacks: dict[str, str] = {}
        self.tables: dict[tuple[str, str], Rows] = {}
        self.inner_steps = Counter(p.inner_steps for p in points).most_common(1)[0][0] if points else 0
        arms = list(dict.fromkeys(p.arm for p in points if p.inner_steps == self.inner_steps))
        for arm, domain in product(arms, self.domains):
            self.tables[arm, domain] = table_of(study, arm, self.inner_steps, domain)
            if lack := missing(self.tables[arm, domain]):
                self.lacks[f"{title(arm)} on {domain}"] = lack
        self.arms = [
            arm for arm in arms if not any(f"{title(arm)} on {domain}" in self.lacks for domain in self.domains)
        ]
        fitted = [seeds_of(self._split(arm, domain)[0]) for arm, domain in product(self.arms, self.domains)]
        self.seeds = sorted(set.intersection(*map(set, fitted))) if fitted else []
        jobs = list(product(self.arms, self.domains, FORMS))
        self.fits = {
            (arm, domain, form.name): fit(form, *self._split(arm, domain)[0].T[:4])
            for arm, domain, form in Progress(jobs, desc="laws", disable=not jobs)
        }
        self.rows = [self._row(arm, domain, form) for arm, domain, form in jobs]
        errors = {
            form.name: fmean(row["error_held_out"] for row in self.rows if row["form"] == form.name)
            for form in FORMS
            if self.rows
        }
        self.form = next((form for form in FORMS if errors and form.name == min(errors, key=lambda n: errors[n])), None)

    def _split(self, arm: str, domain: str) -> tuple[Rows, Rows]:
        table = self.tables[arm, domain]
        return table[~held_out(table)], table[held_out(table)]

    def _row(self, arm: str, domain: str, form: Form) -> dict[str, Any]:
        p = self.fits[arm, domain, form.name]
        row: dict[str, Any] = {"arm": arm, "domain": domain, "form": form.name}
        row["parameters"] = dict(zip(form.parameters, map(float, p), strict=True))
        for name, rows in zip(("within", "held_out"), self._split(arm, domain), strict=True):
            over_seeds = np.array([
                (*point, rows[(rows[:, :3] == point).all(1), 3].mean()) for point in np.unique(rows[:, :3], axis=0)
            ])  # fmt: skip
            row[f"error_{name}"] = relative_error(form, p, *over_seeds.T)
            row[f"measurements_{name}"] = len(rows)
        return row

    def losses(self, form: Form, fits: Fits) -> Callable[..., np.ndarray]:
        """Return the mean over domains as a function of N, D, D′."""
        return lambda n, d, s: np.mean([form.predict(fits[domain], n, d, s) for domain in self.domains], axis=0)

    def fits_of(self, arm: str, form: Form) -> Fits:
        """Return the parameters of a form by domain."""
        return {domain: self.fits[arm, domain, form.name] for domain in self.domains}

    def bootstrap(self, arm: str, form: Form) -> list[Fits]:
        """Return fits to resampled runs, of the same seeds for all arms, domains and sizes; none of too few seeds."""
        found: list[Fits] = []
        if len(self.seeds) < CLAIMED:
            return found
        for i in Progress(range(RESAMPLED), desc=f"bootstrap, {title(arm)}"):
            fits = {}
            seeds = np.random.default_rng(i).choice(self.seeds, len(self.seeds))
            for domain in self.domains:
                drawn = resampled(self._split(arm, domain)[0], seeds)
                fits[domain] = fit(form, *drawn[:, :4].T, start=self.fits[arm, domain, form.name])
            found.append(fits)
        return found


def interval(shares: Sequence[float]) -> list[float] | None:
    """Return 90 % of the bootstrap, None where there is none."""
    return [round(float(x), 4) for x in np.percentile(shares, (5, 95))] if len(shares) else None


def beyond(best: Mapping[str, float], every: Rows) -> dict[str, bool]:
    """Return which of N, D and D′ lie outside of what was measured, D of what the sizes around N have."""
    sizes = np.unique(every[:, 0])
    at = int(np.clip(np.searchsorted(sizes, best["n"]), 1, len(sizes) - 1))
    around = [every[every[:, 0] == n, 1] for n in sizes[at - 1 : at + 1]]
    d_from, d_to = max(d.min() for d in around), min(d.max() for d in around)
    return {
        "n": not sizes[0] < best["n"] < sizes[-1],  # at its end a larger or smaller one may be better
        "d": not d_from <= best["d"] <= d_to,
        "d_prime": not every[:, 2].min() <= best["d_prime"] <= every[:, 2].max(),
    }


def splits(laws: Laws) -> list[dict[str, Any]]:
    """Return the best split of budgets by the chosen form, for each arm, with 90 % of the bootstrap.

    Budgets are what the two smallest sizes cost with the middle one of the D and of the D′, for each domain: there the
    best split hardly leaves what was measured. What does is marked.
    """
    form, rows = laws.form, []
    if form is None:
        return []
    every = np.concatenate([laws.tables[arm, domain] for arm, domain in product(laws.arms, laws.domains)])
    sizes, *amounts = (np.unique(every[:, i]) for i in range(3))
    between = np.geomspace(sizes[0], sizes[-1], 30)
    d, d_prime = (of[len(of) // 2] for of in amounts)
    sampled = {arm: laws.bootstrap(arm, form) for arm in laws.arms}
    own = {arm: np.concatenate([laws.tables[arm, domain] for domain in laws.domains]) for arm in laws.arms}
    for n, count in product(sizes[:2], (2, 5, 20)):
        budget, bests, shares = 6 * n * (d + count * d_prime), {}, {}
        for arm in laws.arms:
            bests[arm] = best_split(laws.losses(form, laws.fits_of(arm, form)), budget, count, between)
            resampled_too = (best_split(laws.losses(form, fits), budget, count, between) for fits in sampled[arm])
            shares[arm] = np.array([best["share"] for best in resampled_too])
            first = laws.arms[0]
            row = {"arm": arm, "teraflop": round(float(budget), 2), "domains": count}
            row |= {name: round(value, 4) for name, value in bests[arm].items()}
            row |= {"beyond": beyond(bests[arm], own[arm]), "share_interval": interval(shares[arm])}
            other = arm != first
            row["less_first"] = round(bests[arm]["share"] - bests[first]["share"], 4) if other else None
            row["less_first_interval"] = interval(shares[arm] - shares[first]) if other else None
            rows.append(row)
    return rows


def figures(study: Study, laws: Laws) -> dict[str, Any]:
    """Return everything that a report shows, as JSON can hold it."""
    found: dict[str, Any] = {
        "measurements": len(study.measured) + len(study.diverged),
        "runs": len({p.run for p in [*study.measured, *study.diverged]}),
        "diverged": [p._asdict() for p in study.diverged],
        "left_out": study.left_out(),
        "commits": sorted({m["commit"] for m in study.every.values()}),
        "torch": sorted({m["torch"] for m in study.every.values()}),
        "processors": sorted({m["processor"] for m in study.every.values()}),
        "domains": {"trained": study.trained, "unseen": study.unseen},
        "searches": [
            {
                "arm": a,
                "size": s,
                "parameters": parameters(s),
                "inner_steps": k,
                "best": found.best,
                "bits": [*map(list, found.bits.items())],
            }
            for (a, s, k), found in study.searches.items()
            if found.best is not None
        ],
        "arms": means(study),
        "differences": differences(study),
        "specialized": specialized(study),
        "law": {
            "missing": laws.lacks,
            "seeds": len(laws.seeds),
            "form": laws.form.name if laws.form else None,
            "fits": laws.rows,
        },
    }
    found["law"]["splits"] = splits(laws)
    return dict(finite(found))
