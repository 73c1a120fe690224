"""Draws what a study found; every picture is an SVG that is the same each time it is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
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

from .arms import parse
from .figures import Laws, held_out
from .report import title

MILLION = 1e6
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
KINDS = (("trained", "text of the kinds trained on"), ("unseen", "kinds never seen"))
STYLES = ("o-", "s--", "^:", "D-.")


def color(arm: str) -> str:
    """Return the color of an arm, the same in every picture."""
    if arm in ("adamw", "muon"):
        return "#555555"
    known = ("unit", "nexus:0.2", "nexus:0.05", "nexus:0.8", "muon+unit", "muon+nexus:0.2")
    return PALETTE[known.index(arm)] if arm in known else PALETTE[-1]


def points(axes: Axes, x: Sequence[float], found: Sequence[dict[str, Any]], style: str, **how: Any) -> None:
    """Draw means with standard errors."""
    errors = [f["standard_error"] or 0.0 for f in found]
    axes.errorbar(x, [f["mean"] for f in found], yerr=errors, fmt=style, markersize=5, capsize=2, **how)


def ticks(axes: Axes, values: Sequence[float], text: str, axis: str = "x") -> None:
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
    rows = [r for r in found["arms"] if r["inner_steps"] == 5]
    sizes = sorted({(r["parameters"], r["size"]) for r in rows})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.6 * len(sizes), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (n, size) in zip(panels[0], sizes, strict=True):
        for arm in dict.fromkeys(r["arm"] for r in rows):
            line = [r for r in rows if r["size"] == size and r["arm"] == arm and r["seeds"] > 1]
            if line:
                x = [r["tokens"] + r["decay_tokens"] for r in line]
                points(axes, x, [r["trained"] for r in line], "o-", color=color(arm), label=title(arm))
        ticks(axes, sorted({r["tokens"] + r["decay_tokens"] for r in rows if r["size"] == size}), "tokens")
        axes.set_title(f"{n / MILLION:.2f}M parameters", loc="left", fontsize=10)
        bare(axes)
    panels[0, 0].set_ylabel("bits per byte, kinds trained on")
    panels[0, 0].legend(frameon=False, fontsize=9)
    write(figure, path)


def differences(found: dict[str, Any], path: Path) -> None:
    """Draw Nexus − unit and Nexus − AdamW over tokens, a line for each size, and over sizes at a D that all have."""
    rows = [r for r in found["differences"] if r["inner_steps"] == 5 and r["arm"].startswith("nexus")]
    arm = max({r["arm"] for r in rows}, key=lambda a: sum(r["arm"] == a for r in rows))
    rows = [r for r in rows if r["arm"] == arm and r["seeds"] > 1]
    sizes = sorted({(r["parameters"], r["size"]) for r in rows})
    of_size = [{r["tokens"] for r in rows if r["size"] == size} for _, size in sizes]
    common = max(set.intersection(*of_size)) if of_size else 0
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
                    color=color(other),
                    label=label,
                )
            mine = [r for r in rows if r["tokens"] == common and r["other"] == other]
            label = f"− {title(other)}"
            points(
                line[1], [r["parameters"] for r in mine], [r[kind] for r in mine], "o-", color=color(other), label=label
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


def gamma(found: dict[str, Any], path: Path) -> None:
    """Draw what the walk gains, and the alignment, over its length γ·(K − 1), where several K were run."""
    wide = {r["size"] for r in found["arms"] if r["inner_steps"] != 5}
    tokens = {r["tokens"] for r in found["arms"] if r["inner_steps"] != 5}
    rows = [r for r in found["differences"] if r["size"] in wide and r["tokens"] in tokens and r["other"] == "unit"]
    aligned = [r for r in found["arms"] if r["size"] in wide and r["tokens"] in tokens and r["alignment"]]
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
    rows = [r for r in found["specialized"] if r["arm"].startswith("nexus") and r["seeds"] > 1]
    domains = sorted({r["domain"] for r in rows})
    figure, panels = plt.subplots(
        1, len(domains), figsize=(4.8 * len(domains), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, domain in zip(panels[0], domains, strict=True):
        for other in ("adamw", "unit"):
            sizes = sorted({(r["parameters"], r["size"]) for r in rows if r["other"] == other})
            for (n, size), style in zip(sizes, STYLES, strict=False):
                mine = [r for r in rows if (r["domain"], r["size"], r["other"]) == (domain, size, other)]
                how = {"color": color(other), "label": f"− {title(other)}, {n / MILLION:.2f}M"}
                points(axes, [r["tokens"] for r in mine], [r["difference"] for r in mine], style, **how)
        axes.axhline(0, color="black", linewidth=0.8)
        ticks(axes, sorted({r["tokens"] for r in rows}), "tokens D before specialization")
        axes.set_title(domain, loc="left", fontsize=10)
        bare(axes)
    panels[0, 0].set_ylabel("Nexus minus the other, bits per byte,\nmean over all D′")
    panels[0, 0].legend(frameon=False, fontsize=8)
    write(figure, path)


def law(laws: Laws, path: Path) -> None:
    """Draw what the chosen form predicts against what was measured, and the loss over the share of specialization."""
    form = laws.form
    if form is None or not laws.arms:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for arm in laws.arms:
        for domain, mark in zip(laws.domains, "os^D", strict=False):
            table = laws.tables[arm, domain]
            predicted = form.predict(laws.fits[arm, domain, form.name], *table[:, :3].T)
            for out in (False, True):
                chosen = held_out(table) == out
                label = f"{title(arm)}, {domain}, {'held out' if out else 'fitted'}"
                fill = color(arm) if not out else "none"
                left.scatter(
                    table[chosen, 3],
                    predicted[chosen],
                    s=18,
                    marker=mark,
                    facecolors=fill,
                    edgecolors=color(arm),
                    label=label,
                )
    ends = [f(t[:, 3].tolist()) for t in laws.tables.values() for f in (min, max)]
    left.plot((min(ends), max(ends)), (min(ends), max(ends)), color="black", linewidth=0.8)
    left.set_xlabel("measured, bits per byte")
    left.set_ylabel(f"predicted by {form.formula}")
    left.legend(frameon=False, fontsize=7)
    share = np.arange(0.01, 0.96, 0.01)
    n, tokens = 0.25, 4.0
    for arm in laws.arms:
        losses = laws.losses(arm, laws.fits_of(arm))
        for count, style in zip((2, 5, 20), ("-", "--", ":"), strict=True):
            values = losses(np.full_like(share, n), tokens * (1 - share), tokens * share / count)
            right.plot(share, values, style, color=color(arm), label=f"{title(arm)}, {count} domains")
            right.scatter(share[np.argmin(values)], values.min(), color=color(arm), s=25, zorder=3)
    right.set_xlabel(f"share of specialization in {tokens:g}M tokens, N = {n:g}M")
    right.set_ylabel("bits per byte of its domain, mean")
    right.set_title("dots: the best split", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        bare(axes)
    write(figure, path)


def draw(found: dict[str, Any], laws: Laws, folder: Path) -> list[Path]:
    """Draw everything that the figures allow; return the files."""
    have = {"loss": bool(found["arms"]), "differences": any(r["arm"].startswith("nexus") for r in found["differences"])}
    have["gamma"] = len({r["inner_steps"] for r in found["arms"]}) > 1
    have["specialized"] = any(r["arm"].startswith("nexus") and r["seeds"] > 1 for r in found["specialized"])
    for name, drawing in (("loss", loss), ("differences", differences), ("gamma", gamma), ("specialized", specialized)):
        if have[name]:
            drawing(found, folder / f"study_{name}.svg")
    law(laws, folder / "study_law.svg")
    return sorted(folder.glob("study_*.svg"))
