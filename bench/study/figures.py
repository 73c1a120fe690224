"""Turns measurements into figures: means over seeds, differences seed by seed, laws and splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from nexus_fused.demo.report import certain, spread
from nexus_fused.demo.train import UNIT

from . import StudyError
from .arms import parse
from .law import FORMS, Form, best_split, fit, relative_error
from .plan import SEARCHED, Search, search
from .runs import MIXTURE, Point, parameters

Measured = Mapping[Point, Mapping[str, Any]]
MILLION = 1e6
RESAMPLED = 100
"""Fits of a bootstrap."""


def domains_of(measured: Measured) -> tuple[list[str], list[str]]:
    """Return the domains trained on, and the unseen ones."""
    trained = next((m["bits"] for p, m in measured.items() if not p.domain), {})
    every = next((m["bits"] for p, m in measured.items() if p.domain == MIXTURE), {})
    return sorted(trained), [name for name in every if name not in trained]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds, its standard error (None of one seed) and the values."""
    found = spread(values)
    error = None if found.error != found.error else round(found.error, 5)
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
        self.searches: dict[tuple[str, str, int], Search] = {}
        for p in sorted(measured, key=order):
            if p[:3] not in self.searches:
                self.searches[p[:3]] = search(measured, p.run, settings["search"]["tokens"], self.trained)
        reported = {p: m for p, m in measured.items() if p.seed not in SEARCHED and p.lr == self.searches[p[:3]].best}
        self.diverged = [p for p, m in reported.items() if m["diverged"]]
        self.measured = {p: m for p, m in reported.items() if not m["diverged"]}

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
    """Return the differences between arms after specialization, the mean over all D′ that both have, seed by seed."""
    found: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for (*key, _), arms in study.groups(lambda p: p.domain not in ("", MIXTURE)).items():
        for arm, other in pairs(arms):
            by_seed = found.setdefault((*key, arm, other), {})
            for s in sorted(arms[arm].keys() & arms[other].keys()):
                bits = (study.bits(arms[a][s], [key[3]]) for a in (arm, other))
                by_seed.setdefault(s, []).append(next(bits) - next(bits))
    rows = []
    for (*key, arm, other), by_seed in found.items():
        if by_seed:
            row = {**row_of((*key, 0)), "arm": arm, "other": other, "seeds": len(by_seed)}
            rows.append({**row, "difference": difference([fmean(values) for values in by_seed.values()])})
    return rows


def means(study: Study) -> list[dict[str, Any]]:
    """Return the annealed bits per byte of each arm, size, K and D, and the alignment before the decay."""
    rows = []
    for key, arms in study.groups(lambda p: p.domain == MIXTURE).items():
        for arm, by_seed in arms.items():
            points = list(by_seed.values())
            row: dict[str, Any] = {**row_of(key), "arm": arm, "lr": points[0].lr, "seeds": len(points)}
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


def table_of(study: Study, arm: str, domain: str) -> Rows:
    """Return the measurements of specialization on a domain."""
    rows = [
        (parameters(p.size) / MILLION, p.tokens / MILLION, p.decay_tokens / MILLION, study.bits(p, [domain]), p.seed)
        for p in study.measured
        if p.arm == arm and p.domain == domain
    ]
    return np.array(sorted(rows)).reshape(-1, 5)


def missing(table: Rows) -> str:
    """Say what a law lacks, "" if nothing: three sizes and amounts of each kind, all combinations of what is fitted."""
    values = [sorted(set(table[:, i])) for i in range(3)]
    for name, found, least in zip(("sizes", "amounts of D", "amounts of D′"), values, (3, 3, 2), strict=True):
        if len(found) < least:
            return f"{least} {name}, where there are {len(found)} ({', '.join(f'{v:.3g}M' for v in found) or 'none'})"
    have = {tuple(row) for row in table[:, :3]}
    lacking = [p for p in product(values[0][:-1], values[1][:-1], values[2]) if p not in have]
    return "; ".join("N = {:.3g}M, D = {:.3g}M, D′ = {:.3g}M".format(*p) for p in lacking)


def held_out(table: Rows) -> np.ndarray:
    """Return which rows are never fitted: those of the largest N and those of the longest D."""
    return (table[:, 0] == table[:, 0].max()) | (table[:, 1] == table[:, 1].max())


def resampled(table: Rows, rng: np.random.Generator) -> Rows:
    """Return the rows of as many runs, drawn with replacement from those of each size."""
    drawn = []
    for n in sorted(set(table[:, 0])):
        seeds = sorted(set(table[table[:, 0] == n, 4]))
        drawn += [table[(table[:, 0] == n) & (table[:, 4] == s)] for s in rng.choice(seeds, len(seeds))]
    return np.concatenate(drawn)


class Laws:
    """Fits of every form to each arm and domain, and the form that predicts the runs best that it has not seen."""

    def __init__(self, study: Study) -> None:
        points = [p for p in study.measured if p.domain not in ("", MIXTURE)]
        self.arms = sorted({p.arm for p in points})
        self.domains = sorted({p.domain for p in points})
        self.rows: list[dict[str, Any]] = []
        self.lacks: dict[str, str] = {}
        self.tables: dict[tuple[str, str], Rows] = {}
        self.fits: dict[tuple[str, str, str], np.ndarray] = {}
        for arm, domain in product(self.arms, self.domains):
            table = table_of(study, arm, domain)
            if lack := missing(table):
                self.lacks[f"{arm} on {domain}"] = lack
                continue
            self.tables[arm, domain] = table
            for form in FORMS:
                self._fit(arm, domain, form, table)
        self.arms = [arm for arm in self.arms if all((arm, domain) in self.tables for domain in self.domains)]
        errors = {
            form.name: fmean(row["error_held_out"] for row in self.rows if row["form"] == form.name)
            for form in FORMS
            if self.rows
        }
        self.form = next((form for form in FORMS if errors and form.name == min(errors, key=lambda n: errors[n])), None)

    def _fit(self, arm: str, domain: str, form: Form, table: Rows) -> None:
        out = held_out(table)
        columns, beyond = table[~out, :4].T, table[out, :4].T
        p = fit(form, *columns)
        self.fits[arm, domain, form.name] = p
        row: dict[str, Any] = {"arm": arm, "domain": domain, "form": form.name, "fitted": int((~out).sum())}
        row |= {"held_out": int(out.sum()), "parameters": dict(zip(form.parameters, map(float, p), strict=True))}
        row["error_within"] = relative_error(form, p, *columns)
        row["error_held_out"] = relative_error(form, p, *beyond)
        self.rows.append(row)

    def losses(self, arm: str, fits: Mapping[str, np.ndarray]) -> Callable[..., np.ndarray]:
        """Return the mean over domains as a function of N, D, D′; `fits` are the parameters by domain."""
        form = self.form
        assert form is not None
        return lambda n, d, s: np.mean([form.predict(fits[domain], n, d, s) for domain in self.domains], axis=0)

    def fits_of(self, arm: str) -> dict[str, np.ndarray]:
        """Return the parameters of the chosen form by domain."""
        assert self.form is not None
        return {domain: self.fits[arm, domain, self.form.name] for domain in self.domains}

    def bootstrap(self, arm: str) -> list[dict[str, np.ndarray]]:
        """Return the parameters by domain of fits to resampled runs, the same runs for all domains."""
        assert self.form is not None
        found = []
        for i in range(RESAMPLED):
            fits = {}
            for domain in self.domains:
                table = self.tables[arm, domain]
                drawn = resampled(table[~held_out(table)], np.random.default_rng(i))
                fits[domain] = fit(self.form, *drawn[:, :4].T, start=self.fits[arm, domain, self.form.name])
            found.append(fits)
        return found


def splits(laws: Laws) -> list[dict[str, Any]]:
    """Return the best split of two budgets for 2, 5 and 20 domains by the chosen form, with 90 % of the bootstrap."""
    rows = []
    for arm in laws.arms:
        sizes = np.unique(np.concatenate([laws.tables[arm, d][:, 0] for d in laws.domains]))
        between = np.geomspace(sizes[0], sizes[-1], 30)
        sampled = laws.bootstrap(arm)
        for budget, count in product((3.0, 12.0), (2, 5, 20)):
            best = best_split(laws.losses(arm, laws.fits_of(arm)), budget, count, between)
            shares = [best_split(laws.losses(arm, fits), budget, count, between)["share"] for fits in sampled]
            low, high = np.percentile(shares, (5, 95))
            row = {"arm": arm, "teraflop": budget, "domains": count, **{k: round(v, 4) for k, v in best.items()}}
            rows.append({**row, "share_low": round(float(low), 4), "share_high": round(float(high), 4)})
    return rows


def figures(study: Study, laws: Laws) -> dict[str, Any]:
    """Return everything that a report shows, as JSON can hold it."""
    found: dict[str, Any] = {
        "measurements": len(study.measured) + len(study.diverged),
        "runs": len({p.run for p in [*study.measured, *study.diverged]}),
        "diverged": [p._asdict() for p in study.diverged],
        "commits": sorted({m["commit"] for m in study.measured.values()}),
        "processors": sorted({m["processor"] for m in study.measured.values()}),
        "domains": {"trained": study.trained, "unseen": study.unseen},
        "searches": [
            {"arm": a, "size": s, "inner_steps": k, "best": found.best, "bits": found.bits}
            for (a, s, k), found in study.searches.items()
            if found.best is not None
        ],
        "arms": means(study),
        "differences": differences(study),
        "specialized": specialized(study),
        "law": {"missing": laws.lacks, "form": laws.form.name if laws.form else None, "fits": laws.rows},
    }
    found["law"]["splits"] = splits(laws) if laws.form and laws.arms else []
    return found
