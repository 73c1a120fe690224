"""Turns the runs into figures: the table, the sentences above it and the JSON file."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from nexus_fused import __version__

from .corpora import FAR, NEAR
from .data import write_atomically
from .train import Result

ARMS = ("AdamW", "Nexus")
MINUS = "−"
GROUPS = ("trained on", "unseen, far", "unseen, near")


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its standard deviation (NaN with one seed)."""

    mean: float
    deviation: float

    def __format__(self, spec: str) -> str:
        """Write the mean with `spec`, and the deviation where there is one."""
        text = f"{self.mean:{spec}}".replace("-", MINUS)
        return text if math.isnan(self.deviation) else f"{text} ± {self.deviation:{spec.replace('+', '')}}"


@dataclass(frozen=True)
class Row:
    """One domain: bits per byte of both arms, and the difference Nexus − AdamW, taken seed by seed."""

    domain: str
    group: str
    adamw: Spread
    nexus: Spread
    difference: Spread
    by_seed: tuple[float, ...]
    """The difference of each seed."""

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def better_in(self) -> int:
        """Seeds in which Nexus has fewer bits per byte."""
        return sum(difference < 0 for difference in self.by_seed)


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of one value per seed."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else math.nan)


def of_arm(runs: Sequence[Result], arm: str) -> list[Result]:
    """Return the runs of one optimizer in the order of their seeds."""
    return sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)


def compare(runs: Sequence[Result]) -> list[Row]:
    """Return one row per domain, from runs of both arms with the same seeds."""
    adamw, nexus = (of_arm(runs, arm) for arm in ARMS)
    rows = []
    for domain in adamw[0].bits:
        a, n = [run.bits[domain] for run in adamw], [run.bits[domain] for run in nexus]
        differences = [y - x for x, y in zip(a, n, strict=True)]
        group = GROUPS[1] if domain in FAR else GROUPS[2] if domain in NEAR else GROUPS[0]
        rows.append(Row(domain, group, spread(a), spread(n), spread(differences), tuple(differences)))
    return sorted(rows, key=lambda row: GROUPS.index(row.group))


def verdict(rows: Sequence[Row], kind: str) -> str:
    """Say on how many rows Nexus is better or worse in every seed, and by how much on average."""
    better = sum(row.better_in == row.seeds for row in rows)
    worse = sum(row.better_in == 0 for row in rows)
    counts = {"better": better, "worse": worse, "undecided": len(rows) - better - worse}
    found = [f"{word} on {count}" for word, count in counts.items() if count]
    text = f"{found[0].split()[0]} on all {len(rows)}" if len(found) == 1 else f"{', '.join(found)} of {len(rows)}"
    mean = f"{fmean(row.difference.mean for row in rows):+.3f}".replace("-", MINUS)
    return f"{text} {kind} ({mean} bits per byte on average)"


def finding(rows: Sequence[Row]) -> str:
    """Return the result in one sentence, whatever it is; "undecided" is where the seeds disagree."""
    trained = [row for row in rows if row.group == GROUPS[0]]
    unseen = [row for row in rows if row.group != GROUPS[0]]
    sentence = f"Compared with AdamW, Nexus is {verdict(trained, 'kinds of text trained on')}"
    return sentence + (f" and {verdict(unseen, 'unseen kinds')}" if unseen else "")


def table(rows: Sequence[Row]) -> str:
    """Return the comparison as text, one line per domain."""
    lines = [f"{'domain':16} {'AdamW':>15} {'Nexus':>15} {'Nexus − AdamW':>17}  Nexus better in"]
    for group in GROUPS:
        members = [row for row in rows if row.group == group]
        lines += [f"-- {group}"] if members else []
        for row in members:
            arms = f"{f'{row.adamw:.3f}':>15} {f'{row.nexus:.3f}':>15}"
            difference = f"{f'{row.difference:+.3f}':>17}"
            lines.append(f"{row.domain:16} {arms} {difference}  {row.better_in} of {row.seeds} seeds")
    return "\n".join(lines)


def grid_lines(grid: Sequence[Result], lr: float) -> str:
    """Return what the choice of the learning rate rests on."""
    if not grid:
        return f"Learning rate {lr:g} for both, as given; it was not searched for."
    figures = ", ".join(f"{run.lr:g}: {run.mean_bits:.3f}" for run in grid)
    text = f"Learning rate {lr:g} for both, AdamW's best of (held-out bits per byte, seed 0): {figures}."
    if len(grid) > 1 and lr in (min(run.lr for run in grid), max(run.lr for run in grid)):
        text += "\nIt lies at the EDGE of the grid: AdamW may do better beyond it (see --lr-grid)."
    return text


def cost_lines(runs: Sequence[Result], steps: int) -> str:
    """Return where the time of a cycle went, for both arms."""
    lines = []
    for arm in ARMS:
        total = 1e3 * fmean(run.seconds for run in of_arm(runs, arm)) / steps
        inside = 1e3 * fmean(run.optimizer_seconds for run in of_arm(runs, arm)) / steps
        lines.append(
            f"{arm:5} {total:8.1f} ms per cycle: optimizer {inside:6.2f} ms ({inside / total:.1%}), "
            f"the rest {total - inside:8.1f} ms"
        )
    lines.append("(AdamW's optimizer time: clipping and step; its gradients are added up inside the backward pass,")
    lines.append(" which cannot be told from the rest. Nexus': all five steps of a cycle.)")
    return "\n".join(lines)


def alignment_line(runs: Sequence[Result]) -> str:
    """Return Nexus' alignment at the start, in the middle and at the end of training."""
    values = [[value for _, value in run.alignment] for run in of_arm(runs, "Nexus")]
    merged = [fmean(cycle) for cycle in zip(*values, strict=True)]
    tenth = max(1, len(merged) // 10)
    middle = len(merged) // 2
    parts = merged[:tenth], merged[middle : middle + tenth], merged[-tenth:]
    first, half, last = (f"{fmean(part):+.3f}" for part in parts)
    return f"Alignment of the gradients along the walk: {first} at first, {half} half-way, {last} at the end."


def text_line(manifest: dict[str, Any], runs: Sequence[Result]) -> str:
    """Return how much text there was and how often it was used."""
    megabytes = ", ".join(
        f"{name.removesuffix('.train.txt')} {entry['bytes'] / 1e6:.1f}"
        for name, entry in manifest["sizes"].items()
        if name.endswith(".train.txt")
    )
    epochs = runs[0].epochs.values()
    leaked = max(entry.get("leaked") or 0.0 for entry in manifest["sizes"].values())
    return (
        f"Training text, MB after removing near duplicates: {megabytes}. A run used {min(epochs):.3g} to "
        f"{max(epochs):.3g} epochs of it.\nAt most {leaked:.1%} of a held-out text's runs of 13 words "
        "stand in its training text."
    )


def versions() -> dict[str, Any]:
    """Return what the figures depend on beside the settings."""
    found = {"nexus_fused": __version__, "torch": torch.__version__, "python": platform.python_version()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**found, "machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}


def finite(value: Any) -> Any:
    """Return the value with every NaN or infinity replaced by None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(
    path: Path,
    settings: dict[str, Any],
    manifest: dict[str, Any],
    grid: Sequence[Result],
    runs: Sequence[Result],
    rows: Sequence[Row],
) -> None:
    """Write every figure, with settings, versions and the hash of the data; raises OSError."""
    content = {
        "finding": finding(rows),
        "settings": settings,
        "versions": versions(),
        "data": manifest,
        "grid": [asdict(run) for run in grid],
        "runs": [asdict(run) for run in runs],
        "domains": [asdict(row) for row in rows],
    }
    write_atomically(path, json.dumps(finite(content), indent=1, ensure_ascii=False).encode())
