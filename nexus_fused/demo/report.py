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

ARMS = ("AdamW", "unit", "Nexus")
MINUS = "−"
GROUPS = ("trained on", "unseen, far", "unseen, near")
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Half the width of a 95 % interval in standard errors, from 2 seeds on; the last one is for more, too."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float

    def __format__(self, spec: str) -> str:
        """Write the mean with `spec`, and the standard error where there is one."""
        text = f"{self.mean:{spec}}".replace("-", MINUS)
        return text if math.isnan(self.error) else f"{text} ± {self.error:{spec.replace('+', '')}}"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard error of one value per seed."""
    return Spread(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def certain(values: Sequence[float]) -> bool:
    """Return whether the 95 % interval of the mean over seeds (Student's) leaves 0 out; of one seed it does not."""
    found = spread(values)
    return len(values) > 1 and abs(found.mean) > STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * found.error


@dataclass(frozen=True)
class Row:
    """Bits per byte of each arm, mean over seeds, of one domain or a mean of domains; differences seed by seed."""

    domain: str
    group: str
    bits: dict[str, float]
    from_adamw: tuple[float, ...]
    """Nexus − AdamW."""
    from_unit: tuple[float, ...]
    """Nexus − unit gradients: what the walk adds."""
    unit_from_adamw: tuple[float, ...]


def of_arm(runs: Sequence[Result], arm: str) -> list[Result]:
    """Return the runs of one arm in the order of their seeds, without nudged ones."""
    return sorted((run for run in runs if run.arm == arm and not run.nudged), key=lambda run: run.seed)


def row(runs: Sequence[Result], domain: str, group: str, names: Sequence[str]) -> Row:
    """Return the means over some domains, from runs of all arms with the same seeds."""
    bits = {arm: [fmean(run.bits[name] for name in names) for run in of_arm(runs, arm)] for arm in ARMS}

    def difference(arm: str, other: str) -> tuple[float, ...]:
        return tuple(x - y for x, y in zip(bits[arm], bits[other], strict=True))

    means = {arm: fmean(values) for arm, values in bits.items()}
    return Row(
        domain, group, means, difference("Nexus", "AdamW"), difference("Nexus", "unit"), difference("unit", "AdamW")
    )


def compare(runs: Sequence[Result]) -> list[Row]:
    """Return a row per domain, those trained on first."""
    groups = {name: GROUPS[1] if name in FAR else GROUPS[2] if name in NEAR else GROUPS[0] for name in runs[0].bits}
    return [row(runs, name, groups[name], [name]) for name in sorted(groups, key=lambda n: GROUPS.index(groups[n]))]


def overall(runs: Sequence[Result]) -> list[Row]:
    """Return the means over the domains trained on, and over the unseen ones where there are any."""
    rows = compare(runs)
    trained = [r.domain for r in rows if r.group == GROUPS[0]]
    unseen = [r.domain for r in rows if r.group != GROUPS[0]]
    found = [("mean, trained on", trained), ("mean, unseen", unseen)]
    return [row(runs, name, "mean", names) for name, names in found if names]


def clause(values: Sequence[float], other: str) -> str:
    """Say how Nexus stands to another arm, and how sure that is."""
    found = spread(values)
    if not certain(values):
        return f"not certainly different from {other} ({found:+.3f})"
    return f"{'below' if found.mean < 0 else 'above'} {other} by {Spread(abs(found.mean), found.error):.3f}"


def finding(means: Sequence[Row]) -> str:
    """Return the result in two sentences, whatever it is."""
    kinds = ("On held-out text of the kinds it trained on", "On kinds it never saw")
    return " ".join(
        f"{kind}, Nexus is {clause(mean.from_adamw, 'AdamW')} and {clause(mean.from_unit, 'unit gradients')}."
        for kind, mean in zip(kinds, means, strict=False)
    )


def table(rows: Sequence[Row], means: Sequence[Row]) -> str:
    """Return the comparison as text, one line per domain, then the means."""
    lines = [f"{'bits per byte':17}{'AdamW':>7}{'unit':>7}{'Nexus':>7}{'Nexus − AdamW':>18}{'Nexus − unit':>18}"]
    for group in (*GROUPS, "mean"):
        members = [r for r in (*rows, *means) if r.group == group]
        lines += [f"-- {group}"] if members and group != "mean" else []
        for r in members:
            differences = (f"{f'{spread(values):+.3f}':>18}" for values in (r.from_adamw, r.from_unit))
            lines.append(f"{r.domain:17}" + "".join(f"{r.bits[arm]:7.3f}" for arm in ARMS) + "".join(differences))
    return "\n".join(lines)


def rounding_line(runs: Sequence[Result]) -> str:
    """Return how far a run ends from itself after a change that rounding alone could make."""
    parts = []
    for run in (run for run in runs if run.nudged):
        (same,) = (r for r in of_arm(runs, run.arm) if r.seed == run.seed)
        parts.append(
            f"{run.mean_bits - same.mean_bits:+.4f} bits per byte".replace("-", MINUS)
            + f" ({run.arm}, seed {run.seed})"
        )
    return f"What rounding does: with the last bit of each initial weight changed, a run ends {', '.join(parts)} away."


def grid_lines(grid: Sequence[Result], lr: float) -> str:
    """Return what the choice of the learning rate rests on."""
    if not grid:
        return f"Learning rate {lr:g} for all, as given; it was not searched for."
    figures = ", ".join(f"{run.lr:g}: {run.mean_bits:.3f}" for run in grid)
    text = f"Learning rate {lr:g} for all, AdamW's best of (held-out bits per byte, seed 0): {figures}."
    if len(grid) > 1 and lr in (min(run.lr for run in grid), max(run.lr for run in grid)):
        text += "\nIt lies at the EDGE of the grid: AdamW may do better beyond it (see --lr-grid)."
    return text


def cost_lines(runs: Sequence[Result], steps: int) -> str:
    """Return where the time of a cycle went, for AdamW and Nexus."""
    lines = []
    for arm in ("AdamW", "Nexus"):
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


def versions(device: str = "cpu") -> dict[str, Any]:
    """Return what the figures depend on besides the settings."""
    found = {"nexus_fused": __version__, "torch": torch.__version__, "python": platform.python_version()}
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {**found, "machine": platform.machine(), "gpu": gpu}


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
) -> None:
    """Write every figure, with settings, versions and the hash of the data; raises OSError."""
    content = {
        "finding": finding(overall(runs)),
        "settings": settings,
        "versions": versions(settings["device"]),
        "data": manifest,
        "grid": [asdict(run) for run in grid],
        "runs": [asdict(run) for run in runs],
        "domains": [asdict(r) for r in compare(runs)],
        "means": [asdict(r) for r in overall(runs)],
    }
    write_atomically(path, json.dumps(finite(content), indent=1, ensure_ascii=False).encode())
