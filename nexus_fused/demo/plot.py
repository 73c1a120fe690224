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
from .report import ARMS, GROUPS, Row, finding, of_arm, spread
from .train import Result

COLORS = {"AdamW": "#555555", "unit": "#0072b2", "Nexus": "#d55e00"}
NAMES = {"AdamW": "AdamW", "unit": "unit gradients, no walk", "Nexus": "Nexus"}


def bare(axes: Axes, grid: str = "both") -> None:
    """Remove what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#eeeeee")  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def curves_of(runs: Sequence[Result], arm: str) -> np.ndarray:
    """Return held-out bits per byte (seeds, points)."""
    return np.array([[value for _, value in run.curve] for run in of_arm(runs, arm)])


def draw_curves(axes: Axes, runs: Sequence[Result]) -> None:
    """Draw held-out bits per byte over the cycles, the mean of the seeds."""
    cycles = [cycle for cycle, _ in runs[0].curve]
    for arm in ARMS:
        axes.plot(cycles, curves_of(runs, arm).mean(0), color=COLORS[arm], linewidth=2, label=NAMES[arm])
    axes.legend(frameon=False)
    axes.set_ylabel("bits per byte")
    axes.set_title("Held-out text of the kinds trained on: lower is better", loc="left", fontsize=11)
    axes.tick_params(labelbottom=False)
    bare(axes)


def draw_differences(axes: Axes, runs: Sequence[Result]) -> None:
    """Draw how far the other arms are from AdamW over the cycles, seed by seed, with standard errors."""
    cycles = [cycle for cycle, _ in runs[0].curve]
    for arm in ARMS[1:]:
        differences = curves_of(runs, arm) - curves_of(runs, "AdamW")
        found = [spread(values) for values in differences.T]
        mean, error = np.array([f.mean for f in found]), np.nan_to_num([f.error for f in found])
        axes.plot(cycles, mean, color=COLORS[arm], linewidth=2, marker="o", markersize=4)
        axes.fill_between(cycles, mean - error, mean + error, color=COLORS[arm], alpha=0.2, linewidth=0)
    axes.axhline(0, color=COLORS["AdamW"], linewidth=2)
    axes.set_xlabel("cycle (one micro-batch of each kind of text)")
    axes.set_ylabel("difference from AdamW")
    axes.set_title("The same, less AdamW's (bands: standard error over seeds)", loc="left", fontsize=11)
    bare(axes)


def draw_domains(axes: Axes, rows: Sequence[Row], means: Sequence[Row]) -> None:
    """Draw how far the other arms are from AdamW on every domain at the end: means, standard errors, single seeds."""
    y, ticks, names, bold = 0.0, [], [], set()
    for group in ("mean", *GROUPS):
        members = [row for row in (*means, *rows) if row.group == group]
        if members and group != "mean":
            ticks.append(y)
            names.append(group.upper())
            bold.add(group.upper())
            y += 1
        for row in members:
            for arm, values, shift in (("unit", row.unit_from_adamw, 0.17), ("Nexus", row.from_adamw, -0.17)):
                found = spread(values)
                axes.errorbar(
                    found.mean,
                    y + shift,
                    xerr=np.nan_to_num(found.error),
                    fmt="o",
                    color=COLORS[arm],
                    markersize=8 if group == "mean" else 5,
                    linewidth=2,
                    label=NAMES[arm] if not ticks else None,
                )
                axes.scatter(values, [y + shift] * len(values), color=COLORS[arm], s=8, alpha=0.35)
            ticks.append(y)
            names.append(row.domain)
            bold |= {row.domain} if group == "mean" else set()
            y += 1
        y += 0.4
    axes.axvline(0, color=COLORS["AdamW"], linewidth=2)
    low, high = axes.get_xlim()
    axes.text(low, -0.9, "← better than AdamW", va="center")
    axes.text(high, -0.9, "worse →", va="center", ha="right")
    axes.set_xlim(low, high)
    axes.set_yticks(ticks, names)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -1.4)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.02, 1, 0.1), ncols=2, borderaxespad=0)
    axes.set_xlabel("difference from AdamW at the end, bits per byte (bars: standard error, dots: seeds)")
    bare(axes, "x")
    axes.spines["left"].set_visible(False)


def draw(path: Path, runs: Sequence[Result], rows: Sequence[Row], means: Sequence[Row], subtitle: str) -> None:
    """Write the picture to `path` as PNG; raises OSError as the system does."""
    figure = plt.figure(figsize=(14, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.1), height_ratios=(1, 1.2))
    curves, domains = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    differences = figure.add_subplot(grid[1, 0], sharex=curves)
    draw_curves(curves, runs)
    draw_differences(differences, runs)
    draw_domains(domains, rows, means)
    figure.suptitle(fill(finding(means), 120), fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(subtitle, fontsize=9, color="#555555", x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, picture.getvalue())
