"""Draws README's pictures, light and dark: `python -m bench.pictures`.

The walk is computed, on four quadratic losses of two weights; the gains are those of bench/results/study.json.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .study.figures import CLAIMED
from .study.plots import points, ticks, write

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
STUDY = ROOT / "bench" / "results" / "study.json"
SIZE = (5.4, 3.6)
THEMES = {
    "light": {"ink": "#1f2328", "soft": "#8c959f", "line": "#d0d7de", "walk": "#0072b2", "step": "#d55e00"},
    "dark": {"ink": "#e6edf3", "soft": "#8d96a0", "line": "#3d444d", "walk": "#58a6ff", "step": "#f0883e"},
}
"""Nexus is "walk" in both pictures; "step" is AdamW's step, and what is compared with AdamW."""

Theme = dict[str, str]


def arrow(axes: Axes, begin: np.ndarray, end: np.ndarray, color: str, style: str = "-", width: float = 2.0) -> None:
    """Draw an arrow that stops short of its ends, where points are."""
    how = {"arrowstyle": "-|>", "color": color, "linestyle": style, "linewidth": width, "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", end, begin, arrowprops={**how, "mutation_scale": 14})


def walk(theme: Theme, path: Path) -> None:
    """Draw one cycle of K = 4: four steps of length γ along each loss's own gradient, D, and the step from θ."""
    minima = np.array([[3.4, 2.9], [3.6, 0.4], [1.2, 2.8], [4.2, 1.9]])
    curvature = np.array([[1.0, 0.5], [0.6, 1.2], [0.9, 1.1], [0.5, 1.0]])
    w = [np.array([0.0, 0.0])]
    for minimum, diagonal in zip(minima, curvature, strict=True):
        g = diagonal * (w[-1] - minimum)
        w.append(w[-1] - g / np.linalg.norm(g))
    end = w[0] + 0.45 * (w[-1] - w[0])
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for x, y in w[1:]:
        axes.plot(x, y, "o", color=theme["walk"], markersize=6)
    for k, (begin, to) in enumerate(pairwise(w), 1):
        arrow(axes, begin, to, theme["walk"])
        place = [(-4, 10), (9, -4), (-24, 2), (9, -4)][k - 1]
        axes.annotate(f"w{'₁₂₃₄'[k - 1]}", to, place, textcoords="offset points", color=theme["ink"], fontsize=13)
    arrow(axes, w[-1], w[0], theme["soft"], "--", 1.5)
    arrow(axes, w[0], end, theme["step"], width=3.5)
    axes.plot(*w[0], "o", color=theme["ink"], markersize=9)
    note = {"textcoords": "offset points", "fontsize": 12}
    axes.annotate("θ", w[0], (-6, -20), color=theme["ink"], **{**note, "fontsize": 15})
    axes.annotate("D, which leads back to θ", (w[3] + w[-1]) / 2, (6, -44), color=theme["soft"], **note)
    axes.annotate("AdamW's step from θ,\nwith D/Γ for a gradient", end / 2, (-64, 62), color=theme["step"], **note)
    middle = (w[1] + w[2]) / 2
    axes.annotate("a step of length γ\nfor each micro-batch", middle, (-30, -42), color=theme["walk"], **note)
    axes.set_aspect("equal")
    axes.margins(0.14)
    axes.axis("off")
    figure.patch.set_alpha(0)
    write(figure, path)


def gain(found: dict[str, Any], theme: Theme, path: Path) -> None:
    """Draw Nexus − AdamW and Nexus − unit gradients over tokens, at the smallest size, with standard errors."""
    of = {"size": "0.1M", "inner_steps": 5, "arm": "nexus:0.2"}
    rows = [r for r in found["differences"] if all(r[name] == value for name, value in of.items())]
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    rows = sorted((r for r in rows if r["seeds"] >= CLAIMED), key=lambda r: r["tokens"])
    for other, name, color in (("adamw", "AdamW", "step"), ("unit", "the control without a walk", "walk")):
        line = [r for r in rows if r["other"] == other]
        how = {"color": theme[color], "linewidth": 2, "label": f"Nexus − {name}"}
        points(axes, [r["tokens"] for r in line], [r["trained"] for r in line], "o-", **how)
    axes.axhline(0, color=theme["ink"], linewidth=1)
    ticks(axes, sorted({r["tokens"] for r in rows}), "tokens of training")
    axes.set_ylabel("bits per byte, lower is better")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme["ink"])
    seeds = min(r["seeds"] for r in rows)
    parameters = f"{rows[0]['parameters'] / 1e6:.2f}M parameters, text like the training text, {seeds} seeds"
    axes.set_title(parameters, loc="left", color=theme["ink"], fontsize=11)
    axes.legend(frameon=False, labelcolor=theme["ink"], loc="lower right", fontsize=11)
    axes.tick_params(colors=theme["soft"], labelcolor=theme["ink"])
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(theme["line"])
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    write(figure, path)


def main(folder: Path = PICTURES) -> None:
    """Write all four into a folder."""
    found = json.loads(STUDY.read_text())
    for name, theme in THEMES.items():
        walk(theme, folder / f"walk-{name}.svg")
        gain(found, theme, folder / f"gain-{name}.svg")


if __name__ == "__main__":
    main()
