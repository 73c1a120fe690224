"""Draws the comparison as one picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .data import write_atomically
from .report import ARMS, GROUPS, Row, finding, of_arm
from .train import Result

COLORS = {"AdamW": "#7a7a7a", "Nexus": "#d1495b"}
GOOD, BAD, OPEN = "#1b7f3b", "#b03030", "#666666"
"""Better in every seed, worse in every seed, seeds disagree."""


def bare(axes: Axes) -> None:
    """Remove what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)


def draw_curves(axes: Axes, runs: Sequence[Result]) -> None:
    """Draw held-out bits per byte over the cycles: the mean of the seeds, the band from best to worst."""
    for arm in ARMS:
        chosen = of_arm(runs, arm)
        cycles = [cycle for cycle, _ in chosen[0].curve]
        bits = np.array([[value for _, value in run.curve] for run in chosen])
        axes.plot(cycles, bits.mean(0), color=COLORS[arm], linewidth=2, marker="o", markersize=4)
        axes.fill_between(cycles, bits.min(0), bits.max(0), color=COLORS[arm], alpha=0.25, linewidth=0)
        above = arm == max(ARMS, key=lambda a: np.mean([run.mean_bits for run in of_arm(runs, a)]))
        axes.annotate(
            f"{arm} {bits[:, -1].mean():.3f}",
            (cycles[-1], bits[:, -1].mean()),
            xytext=(8, 2 if above else -2),
            textcoords="offset points",
            va="bottom" if above else "top",
            color=COLORS[arm],
            fontweight="bold",
        )
    axes.set_xlim(0, 1.3 * cycles[-1])
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_title("Held-out text of the domains trained on", loc="left", fontsize=11)
    axes.tick_params(labelbottom=False)


def draw_alignment(axes: Axes, runs: Sequence[Result]) -> None:
    """Draw Nexus' alignment over the cycles: every seed thin, their running mean thick."""
    chosen = of_arm(runs, "Nexus")
    cycles = np.array([cycle for cycle, _ in chosen[0].alignment])
    values = np.array([[value for _, value in run.alignment] for run in chosen])
    for seed in values:
        axes.plot(cycles, seed, color=COLORS["Nexus"], alpha=0.2, linewidth=0.7)
    width = max(1, len(cycles) // 40)
    smooth = np.convolve(values.mean(0), np.ones(width) / width, mode="valid")
    axes.plot(cycles[width - 1 :], smooth, color=COLORS["Nexus"], linewidth=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("cycle (one micro-batch of each domain)")
    axes.set_ylabel("cosine")
    axes.set_title("Do the domains' gradients agree along Nexus' walk?", loc="left", fontsize=11)


def draw_domains(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the difference of every domain from a zero line: each seed a small dot, the mean a large one."""
    values = [0.0, *(difference for row in rows for difference in row.by_seed)]
    span = max(values) - min(values) or 1.0
    left, right = min(min(values) - 0.08 * span, -0.3 * span), max(max(values) + 0.08 * span, 0.3 * span)
    margin = right + 0.03 * (right - left)
    y, ticks, names = 0, [], []
    for group in GROUPS:
        members = [row for row in rows if row.group == group]
        if not members:
            continue
        ticks.append(y)
        names.append(group.upper())
        for row in members:
            y += 1
            mean, color = row.difference.mean, {row.seeds: GOOD, 0: BAD}.get(row.better_in, OPEN)
            axes.plot((0, mean), (y, y), color=color, linewidth=4, alpha=0.35, zorder=1)
            axes.scatter(mean, y, color=color, s=80, zorder=3)
            axes.scatter(row.by_seed, [y] * row.seeds, color=color, s=16, alpha=0.6, zorder=2)
            figures = f"{row.adamw.mean:.3f} → {row.nexus.mean:.3f}   {row.difference:+.3f}"
            axes.text(margin, y, figures, color=color, va="center", fontsize=9)
            ticks.append(y)
            names.append(row.domain)
        y += 1
    axes.axvline(0, color="black", linewidth=1)
    axes.axvspan(left, 0, color=GOOD, alpha=0.05, linewidth=0)
    axes.axvspan(0, right, color=BAD, alpha=0.05, linewidth=0)
    axes.text(left, -0.9, " Nexus better", color=GOOD, fontweight="bold")
    axes.text(right, -0.9, "AdamW better ", color=BAD, fontweight="bold", ha="right")
    axes.text(margin, -0.9, "AdamW → Nexus   difference", fontweight="bold", fontsize=9)
    axes.set_yticks(ticks, names)
    for label in axes.get_yticklabels():
        if label.get_text() in {group.upper() for group in GROUPS}:
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -1.5)
    axes.set_xlim(left, right)
    axes.set_xlabel("Nexus − AdamW, bits per byte (small dots: single seeds)")
    axes.set_title("Every domain after the last cycle", loc="left", fontsize=11)


def draw(path: Path, runs: Sequence[Result], rows: Sequence[Row], subtitle: str) -> None:
    """Write the picture to `path` as PNG; raises OSError as the system does."""
    figure = plt.figure(figsize=(14, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.1), height_ratios=(2.2, 1))
    curves, domains = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    alignment = figure.add_subplot(grid[1, 0], sharex=curves)
    draw_curves(curves, runs)
    draw_alignment(alignment, runs)
    draw_domains(domains, rows)
    for axes in (curves, alignment, domains):
        bare(axes)
    domains.spines["left"].set_visible(False)
    figure.suptitle(fill(finding(rows), 125), fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(subtitle, fontsize=9, color="#555555", x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, picture.getvalue())
