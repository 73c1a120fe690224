"""Draws what a study found; every picture is an SVG that is the same each time it is drawn."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nexus_fused.demo.data import write_atomically
from nexus_fused.demo.plot import bare

from .arms import parse, title
from .figures import Laws, held_out
from .runs import MILLION

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
KINDS = (("trained", "text of the kinds trained on"), ("unseen", "kinds never seen"))
STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--")
"""One for each size of runs.SIZES."""


def colors(arms: Iterable[str]) -> dict[str, str]:
    """Return a color for each arm: those without a walk are gray, the others take the palette's in order."""
    walking = sorted({arm for arm in arms if parse(arm)[1] is not None}, key=lambda arm: (parse(arm), arm))
    plain = {"adamw": "#555555", "muon": "#aaaaaa"}
    return {**plain, **{arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(walking)}}


def most(rows: Iterable[dict[str, Any]], name: str) -> Any:
    """Return the value that most rows have; of several, the first in order."""
    counted = Counter(r[name] for r in rows)
    return max(sorted(counted), key=lambda value: counted[value], default=None)


def points(axes: Axes, x: Sequence[float], found: Sequence[dict[str, Any]], style: str, **how: Any) -> None:
    """Draw means with standard errors."""
    errors = [f["standard_error"] or 0.0 for f in found]
    axes.errorbar(x, [f["mean"] for f in found], yerr=errors, fmt=style, markersize=5, capsize=2, **how)


def ticks(axes: Axes, values: Sequence[float], text: str) -> None:
    """Label a logarithmic axis at the values that were measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), [f"{v / MILLION:.2g}M" for v in values])
    axes.minorticks_off()
    axes.set_xlabel(text)


def write(figure: Figure, path: Path) -> None:
    """Write a figure; raises OSError as the system does."""
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nexus_fused", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getvalue())


def loss(found: dict[str, Any], path: Path) -> None:
    """Draw bits per byte over tokens, a panel for each size."""
    rows = several(found["arms"])
    rows = [r for r in rows if r["inner_steps"] == most(rows, "inner_steps")]
    color = colors(r["arm"] for r in rows)
    sizes = sorted({(r["parameters"], r["size"]) for r in rows})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.6 * len(sizes), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (n, size) in zip(panels[0], sizes, strict=True):
        for arm in dict.fromkeys(r["arm"] for r in rows):
            line = [r for r in rows if r["size"] == size and r["arm"] == arm]
            if line:
                x = [r["tokens"] + r["decay_tokens"] for r in line]
                points(axes, x, [r["trained"] for r in line], "o-", color=color[arm], label=title(arm))
        ticks(axes, sorted({r["tokens"] + r["decay_tokens"] for r in rows if r["size"] == size}), "tokens")
        axes.set_title(f"{n / MILLION:.2f}M parameters", loc="left", fontsize=10)
        bare(axes)
    panels[0, 0].set_ylabel("bits per byte, kinds trained on")
    legend(figure)
    write(figure, path)


def several(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of more seeds than one."""
    return [r for r in rows if r["seeds"] > 1]


def legend(figure: Figure) -> None:
    """Explain below all panels what any of them shows."""
    shown = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def nexus(rows: Iterable[dict[str, Any]], value: str) -> list[dict[str, Any]]:
    """Return the rows of one Nexus arm at one K, of several seeds: the K of most rows, and of the arms that most sizes
    have at most places the best one, in the mean of `value` where all of them were run."""
    rows = [r for r in several(rows) if r["arm"].startswith("nexus")]
    rows = [r for r in rows if r["inner_steps"] == most(rows, "inner_steps")]
    of_arm: dict[str, dict[tuple[Any, ...], float]] = {}
    for r in rows:
        of_arm.setdefault(r["arm"], {})[r["size"], r["tokens"], r["domain"], r["other"]] = r[value]["mean"]
    sizes = {arm: len({place[0] for place in of}) for arm, of in of_arm.items()}
    widest = [arm for arm in of_arm if sizes[arm] == max(sizes.values())]
    widest = [arm for arm in widest if len(of_arm[arm]) == max(len(of_arm[other]) for other in widest)]
    common = set.intersection(*(set(of_arm[arm]) for arm in widest)) if widest else set()
    best = min(widest, key=lambda arm: sum(of_arm[arm][place] for place in common), default=None)
    return [r for r in rows if r["arm"] == best]


def sizes_of(rows: Iterable[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Return the sizes of rows, ascending: parameters, name, and the style of their lines."""
    sizes = sorted({(r["parameters"], r["size"]) for r in rows})
    return [(*size, style) for size, style in zip(sizes, STYLES, strict=False)]


def differences(found: dict[str, Any], path: Path) -> None:
    """Draw Nexus − unit and Nexus − AdamW over tokens, a line for each size, and over sizes at a D that all have."""
    rows = nexus(found["differences"], "trained")
    arm, color, sizes = rows[0]["arm"], colors(("unit",)), sizes_of(rows)
    of_size = [{r["tokens"] for r in rows if r["size"] == size} for _, size, _ in sizes]
    common = max(set.intersection(*of_size), default=0)
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6.5), sharey="row", layout="constrained")
    for line, (kind, text) in zip(panels, KINDS, strict=True):
        for other in ("unit", "adamw"):
            for n, size, style in sizes:
                mine = [r for r in rows if r["size"] == size and r["other"] == other]
                how = {"color": color[other], "label": f"− {title(other)}, {n / MILLION:.2f}M"}
                if mine:
                    points(line[0], [r["tokens"] for r in mine], [r[kind] for r in mine], style, **how)
            mine = [r for r in rows if r["tokens"] == common and r["other"] == other]
            if mine:  # no line, which would join sizes across one that lacks
                points(line[1], [r["parameters"] for r in mine], [r[kind] for r in mine], "o", color=color[other])
        for axes in line:
            axes.axhline(0, color="black", linewidth=0.8)
            bare(axes)
        line[0].set_ylabel(f"{title(arm)}, K = {rows[0]['inner_steps']}, minus the other,\n{text}", fontsize=9)
        ticks(line[0], sorted({r["tokens"] for r in rows}), "tokens D before the decay")
        at = f"D = {common / MILLION:.2g}M" if common else "there is no D that all sizes have"
        ticks(line[1], [n for n, *_ in sizes], f"parameters N ({at})")
    panels[0, 0].set_title("bits per byte, lower is better for Nexus", loc="left", fontsize=10)
    legend(figure)
    write(figure, path)


def place_of_several(found: dict[str, Any]) -> tuple[str, int] | None:
    """Return the size and the tokens at which most arms with several K were measured, None if there are none."""
    of_place: dict[tuple[str, int], set[int]] = {}
    for r in several(found["differences"]):
        if r["arm"].startswith("nexus") and r["other"] == "unit":
            of_place.setdefault((r["size"], r["tokens"]), set()).add(r["inner_steps"])
    best = max(of_place, key=lambda place: len(of_place[place]), default=None)
    return best if best and len(of_place[best]) > 1 else None


def gamma(found: dict[str, Any], path: Path) -> None:
    """Draw what the walk gains, and the alignment, over its length γ·(K − 1), where several K were run."""
    place = place_of_several(found)

    def there(r: dict[str, Any]) -> bool:
        return (r["size"], r["tokens"]) == place

    rows = several(r for r in found["differences"] if there(r) and r["other"] == "unit")
    aligned = [r for r in found["arms"] if there(r) and r["alignment"] and not parse(r["arm"])[0]]
    steps = sorted({r["inner_steps"] for r in rows})
    shortest = min((parse(r["arm"])[1] or 0) * (r["inner_steps"] - 1) for r in rows)
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for k, style, shade in zip(steps, STYLES, PALETTE, strict=False):
        mine = sorted((r for r in rows if r["inner_steps"] == k), key=lambda r: parse(r["arm"])[1] or 0)
        x = [(parse(r["arm"])[1] or 0) * (k - 1) for r in mine]
        for axes, (kind, _) in zip(panels, KINDS, strict=False):
            points(axes, x, [r[kind] for r in mine], style, color=shade, label=f"K = {k}")
        mine = sorted((r for r in aligned if r["inner_steps"] == k), key=lambda r: parse(r["arm"])[1] or 0)
        # A walk of length 0 has no place on a logarithmic axis: it stands at the left of all others.
        x = [max((parse(r["arm"])[1] or 0) * (k - 1), shortest / 4) for r in mine]
        points(panels[2], x, [r["alignment"] for r in mine], style, color=shade, label=f"K = {k}")
    for axes, text in zip(panels, (*(text for _, text in KINDS), "alignment (left: unit gradients)"), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("length of the walk, γ·(K − 1)")
        axes.set_title(text, loc="left", fontsize=10)
        axes.axhline(0, color="black", linewidth=0.8)
        bare(axes)
    panels[0].set_ylabel("Nexus − unit gradients, bits per byte")
    panels[2].set_ylabel("mean cosine of gradients in a cycle")
    panels[0].legend(frameon=False)
    write(figure, path)


def specialized(found: dict[str, Any], path: Path) -> None:
    """Draw Nexus − AdamW and Nexus − unit after specialization, over the tokens before it, a panel for each domain."""
    rows = nexus(found["specialized"], "difference")
    color, sizes = colors(("unit",)), sizes_of(rows)
    domains = sorted({r["domain"] for r in rows})
    figure, panels = plt.subplots(
        1, len(domains), figsize=(4.8 * len(domains), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, domain in zip(panels[0], domains, strict=True):
        for other in ("adamw", "unit"):
            for n, size, style in sizes:
                mine = [r for r in rows if (r["domain"], r["size"], r["other"]) == (domain, size, other)]
                how = {"color": color[other], "label": f"− {title(other)}, {n / MILLION:.2f}M"}
                if mine:
                    points(axes, [r["tokens"] for r in mine], [r["difference"] for r in mine], style, **how)
        axes.axhline(0, color="black", linewidth=0.8)
        ticks(axes, sorted({r["tokens"] for r in rows}), "tokens D before specialization")
        axes.set_title(domain, loc="left", fontsize=10)
        bare(axes)
    arm = f"{title(rows[0]['arm'])}, K = {rows[0]['inner_steps']},"
    panels[0, 0].set_ylabel(f"{arm}\nminus the other, bits per byte, mean over D′", fontsize=9)
    legend(figure)
    write(figure, path)


def law(laws: Laws, found: dict[str, Any], path: Path) -> None:
    """Draw what the chosen form predicts against what was measured, and the loss over the share of specialization.

    The latter is for the larger of the two middle sizes and the longest D that it was trained for; curves are thin
    where D or D′ leaves what was measured.
    """
    form = laws.form
    assert form is not None
    color = colors(laws.arms)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for arm, (domain, mark) in product(laws.arms, zip(laws.domains, "os^Dv", strict=False)):
        table = laws.tables[arm, domain]
        predicted = form.predict(laws.fits[arm, domain, form.name], *table[:, :3].T)
        for out in (False, True):
            chosen = held_out(table) == out
            how = {"facecolors": "none" if out else color[arm], "edgecolors": color[arm], "marker": mark, "s": 18}
            label = f"{title(arm)}, {domain}, {'held out' if out else 'fitted'}"
            left.scatter(table[chosen, 3], predicted[chosen], label=label, **how)
    every = np.concatenate([laws.tables[arm, domain] for arm, domain in product(laws.arms, laws.domains)])
    ends = every[:, 3].min(), every[:, 3].max()
    left.plot(ends, ends, color="black", linewidth=0.8)
    left.set_xlabel("measured, bits per byte")
    left.set_ylabel(f"predicted by {form.formula}")
    left.legend(frameon=False, fontsize=7)
    share = np.arange(0.01, 0.96, 0.01)
    sizes = np.unique(every[:, 0])
    n = sizes[len(sizes) // 2]
    tokens = every[every[:, 0] == n, 1].max()
    for arm in laws.arms:
        losses = laws.losses(form, laws.fits_of(arm, form))
        here = np.concatenate([laws.tables[arm, domain] for domain in laws.domains])
        here = here[here[:, 0] == n]
        for count, style in zip((2, 5, 20), ("-", "--", ":"), strict=True):
            d, s = tokens * (1 - share), tokens * share / count
            values = losses(np.full_like(share, n), d, s)
            within = (
                (d >= here[:, 1].min()) & (d <= here[:, 1].max()) & (s >= here[:, 2].min()) & (s <= here[:, 2].max())
            )
            right.plot(share, values, style, color=color[arm], linewidth=0.6)
            label = f"{title(arm)}, {count} domains"
            right.plot(share, np.where(within, values, np.nan), style, color=color[arm], linewidth=2, label=label)
            right.scatter(share[np.argmin(values)], values.min(), color=color[arm], s=25, zorder=3)
    right.set_xlabel(f"share of specialization in {tokens:.2g}M tokens")
    right.set_ylabel("bits per byte of its domain, mean")
    right.set_title(f"N = {n:.2g}M; dots: its best share; thin: not measured", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        bare(axes)
    write(figure, path)


def draw(found: dict[str, Any], laws: Laws, folder: Path) -> list[Path]:
    """Draw everything that the figures allow; return the files."""
    drawings = {
        "loss": (loss, several(found["arms"])),
        "differences": (differences, nexus(found["differences"], "trained")),
        "gamma": (gamma, place_of_several(found)),
        "specialized": (specialized, nexus(found["specialized"], "difference")),
        "law": (partial(law, laws), laws.form),
    }
    written = []
    for name, (drawing, possible) in drawings.items():
        if possible:
            written.append(folder / f"study_{name}.svg")
            drawing(found, written[-1])
    return written
