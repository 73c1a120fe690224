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
STYLES = ("o-", "s--", "^:", "D-.")


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
    rows = [r for r in found["arms"] if r["inner_steps"] == most(found["arms"], "inner_steps")]
    color = colors(r["arm"] for r in rows)
    sizes = sorted({(r["parameters"], r["size"]) for r in rows})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.6 * len(sizes), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (n, size) in zip(panels[0], sizes, strict=True):
        for arm in dict.fromkeys(r["arm"] for r in rows):
            line = [r for r in rows if r["size"] == size and r["arm"] == arm and r["seeds"] > 1]
            if line:
                x = [r["tokens"] + r["decay_tokens"] for r in line]
                points(axes, x, [r["trained"] for r in line], "o-", color=color[arm], label=title(arm))
        ticks(axes, sorted({r["tokens"] + r["decay_tokens"] for r in rows if r["size"] == size}), "tokens")
        axes.set_title(f"{n / MILLION:.2f}M parameters", loc="left", fontsize=10)
        bare(axes)
    panels[0, 0].set_ylabel("bits per byte, kinds trained on")
    panels[0, 0].legend(frameon=False, fontsize=9)
    write(figure, path)


def nexus(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the Nexus arm and the K that most rows of several seeds are of."""
    rows = [r for r in rows if r["arm"].startswith("nexus") and r["seeds"] > 1]
    rows = [r for r in rows if r["inner_steps"] == most(rows, "inner_steps")]
    return [r for r in rows if r["arm"] == most(rows, "arm")]


def differences(found: dict[str, Any], path: Path) -> None:
    """Draw Nexus − unit and Nexus − AdamW over tokens, a line for each size, and over sizes at a D that all have."""
    rows = nexus(found["differences"])
    arm, color = rows[0]["arm"], colors(("unit",))
    sizes = sorted({(r["parameters"], r["size"]) for r in rows})
    of_size = [{r["tokens"] for r in rows if r["size"] == size} for _, size in sizes]
    common = max(set.intersection(*of_size), default=0)
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6.5), sharey="row", layout="constrained")
    for line, (kind, text) in zip(panels, KINDS, strict=True):
        for other in ("unit", "adamw"):
            for (n, size), style in zip(sizes, STYLES, strict=False):
                mine = [r for r in rows if r["size"] == size and r["other"] == other]
                label = f"− {title(other)}, {n / MILLION:.2f}M"
                points(
                    line[0],
                    [r["tokens"] for r in mine],
                    [r[kind] for r in mine],
                    style,
                    color=color[other],
                    label=label,
                )
            mine = [r for r in rows if r["tokens"] == common and r["other"] == other]
            label = f"− {title(other)}"
            points(
                line[1], [r["parameters"] for r in mine], [r[kind] for r in mine], "o-", color=color[other], label=label
            )
        for axes in line:
            axes.axhline(0, color="black", linewidth=0.8)
            bare(axes)
        line[0].set_ylabel(f"{title(arm)} minus the other,\nbits per byte, {text}", fontsize=9)
        ticks(line[0], sorted({r["tokens"] for r in rows}), "tokens D before the decay")
        ticks(line[1], [n for n, _ in sizes], f"parameters N (D = {common / MILLION:.2g}M)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[0, 1].legend(frameon=False, fontsize=8)
    write(figure, path)


def place_of_several(found: dict[str, Any]) -> tuple[str, int] | None:
    """Return the size and the tokens at which most arms with several K were measured, None if there are none."""
    of_place: dict[tuple[str, int], set[int]] = {}
    for r in found["differences"]:
        if r["arm"].startswith("nexus") and r["other"] == "unit":
            of_place.setdefault((r["size"], r["tokens"]), set()).add(r["inner_steps"])
    best = max(of_place, key=lambda place: len(of_place[place]), default=None)
    return best if best and len(of_place[best]) > 1 else None


def gamma(found: dict[str, Any], path: Path) -> None:
    """Draw what the walk gains, and the alignment, over its length γ·(K − 1), where several K were run."""
    place = place_of_several(found)

    def there(r: dict[str, Any]) -> bool:
        return (r["size"], r["tokens"]) == place

    rows = [r for r in found["differences"] if there(r) and r["other"] == "unit"]
    aligned = [r for r in found["arms"] if there(r) and r["alignment"] and not parse(r["arm"])[0]]
    steps = sorted({r["inner_steps"] for r in rows})
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for k, style, shade in zip(steps, STYLES, PALETTE, strict=False):
        mine = sorted((r for r in rows if r["inner_steps"] == k), key=lambda r: parse(r["arm"])[1] or 0)
        x = [(parse(r["arm"])[1] or 0) * (k - 1) for r in mine]
        for axes, (kind, _) in zip(panels, KINDS, strict=False):
            points(axes, x, [r[kind] for r in mine], style, color=shade, label=f"K = {k}")
        mine = sorted((r for r in aligned if r["inner_steps"] == k), key=lambda r: parse(r["arm"])[1] or 0)
        # A walk of length 0 has no place on a logarithmic axis: it stands at the left.
        x = [max((parse(r["arm"])[1] or 0) * (k - 1), 0.05) for r in mine]
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
    rows = nexus(found["specialized"])
    color = colors(("unit",))
    domains = sorted({r["domain"] for r in rows})
    figure, panels = plt.subplots(
        1, len(domains), figsize=(4.8 * len(domains), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, domain in zip(panels[0], domains, strict=True):
        for other in ("adamw", "unit"):
            sizes = sorted({(r["parameters"], r["size"]) for r in rows if r["other"] == other})
            for (n, size), style in zip(sizes, STYLES, strict=False):
                mine = [r for r in rows if (r["domain"], r["size"], r["other"]) == (domain, size, other)]
                how = {"color": color[other], "label": f"− {title(other)}, {n / MILLION:.2f}M"}
                points(axes, [r["tokens"] for r in mine], [r["difference"] for r in mine], style, **how)
        axes.axhline(0, color="black", linewidth=0.8)
        ticks(axes, sorted({r["tokens"] for r in rows}), "tokens D before specialization")
        axes.set_title(domain, loc="left", fontsize=10)
        bare(axes)
    panels[0, 0].set_ylabel("Nexus minus the other, bits per byte,\nmean over all D′")
    panels[0, 0].legend(frameon=False, fontsize=8)
    write(figure, path)


def law(laws: Laws, found: dict[str, Any], path: Path) -> None:
    """Draw what the chosen form predicts against what was measured, and the loss over the share of specialization."""
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
    n, tokens = np.unique(every[:, 0])[-2], every[:, 1].max()
    for arm in laws.arms:
        losses = laws.losses(form, laws.fits_of(arm, form))
        for count, style in zip((2, 5, 20), ("-", "--", ":"), strict=True):
            values = losses(np.full_like(share, n), tokens * (1 - share), tokens * share / count)
            right.plot(share, values, style, color=color[arm], label=f"{title(arm)}, {count} domains")
            right.scatter(share[np.argmin(values)], values.min(), color=color[arm], s=25, zorder=3)
    right.set_xlabel(f"share of specialization in {tokens:.2g}M tokens, N = {n:.2g}M")
    right.set_ylabel("bits per byte of its domain, mean")
    right.set_title("dots: the best split", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        bare(axes)
    write(figure, path)


def draw(found: dict[str, Any], laws: Laws, folder: Path) -> list[Path]:
    """Draw everything that the figures allow; return the files."""
    drawings = {
        "loss": (loss, found["arms"]),
        "differences": (differences, nexus(found["differences"])),
        "gamma": (gamma, place_of_several(found)),
        "specialized": (specialized, nexus(found["specialized"])),
        "law": (partial(law, laws), laws.form),
    }
    written = []
    for name, (drawing, possible) in drawings.items():
        if possible:
            written.append(folder / f"study_{name}.svg")
            drawing(found, written[-1])
    return written
