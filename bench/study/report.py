"""Prints what a study found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nexus_fused.demo.report import MINUS

MILLION = 1e6


def shown(found: dict[str, Any], sign: str = "+") -> str:
    """Write a mean with its standard error, and a star where the 95 % interval leaves 0 out."""
    text = f"{found['mean']:{sign}.3f}".replace("-", MINUS)
    text += f" ± {found['standard_error']:.3f}" if found["standard_error"] is not None else ""
    return text + ("*" if found.get("certain") else "")


def place(row: dict[str, Any]) -> str:
    """Say which N, K and D a row is of."""
    return f"{row['size']:>5} K {row['inner_steps']:<3} D {row['tokens'] / MILLION:5.2f}M"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the report line by line."""
    yield f"{found['measurements']} measurements of {found['runs']} runs, {len(found['diverged'])} diverged (left out)."
    yield f"Commits: {', '.join(found['commits'])}. Machines: {', '.join(found['processors'])}."
    yield from (f"  diverged: {point}" for point in found["diverged"])
    yield "\nLearning rates, each arm's best at the end of its search (bits per byte):"
    for s in found["searches"]:
        tried = ", ".join(f"{lr:g}: {bits:.3f}" for lr, bits in s["bits"].items())
        yield f"  {s['size']:>5} K {s['inner_steps']:<3} {s['arm']:14} {s['best']:g}   ({tried})"
    yield "\nBits per byte after the decay, mean over seeds ± standard error:"
    for r in found["arms"]:
        aligned = f"  alignment {shown(r['alignment'])}" if r["alignment"] else ""
        figures = f"{shown(r['trained'], ''):>16} | {shown(r['unseen'], ''):>16}"
        yield f"  {place(r)}  {r['arm']:14} {r['seeds']} seeds {figures}{aligned}"
    yield "\nDifferences seed by seed, trained on | unseen (*: the 95 % interval leaves 0 out):"
    for r in found["differences"]:
        names = f"{r['arm']} {MINUS} {r['other']}"
        yield f"  {place(r)}  {names:22} {r['seeds']} seeds {shown(r['trained']):>18} | {shown(r['unseen']):>18}"
    if found["specialized"]:
        yield "\nThe same after specialization, on its domain, mean over all D′:"
    for r in found["specialized"]:
        names = f"{r['arm']} {MINUS} {r['other']}"
        yield f"  {place(r)}  {r['domain']:12} {names:22} {r['seeds']} seeds {shown(r['difference']):>18}"
    law = found["law"]
    for name, lack in law["missing"].items():
        yield f"\nNo law for {name}, which lacks {lack}."
    if law["fits"]:
        yield "\nThe law, mean relative error within | on the held-out largest N and longest D:"
    for f in law["fits"]:
        values = ", ".join(f"{name} {value:.3g}" for name, value in f["parameters"].items())
        errors = f"{f['error_within']:.2%} of {f['fitted']} | {f['error_held_out']:.2%} of {f['held_out']}"
        chosen = " <-" if f["form"] == law["form"] else ""
        yield f"  {f['arm']:10} {f['domain']:10} {f['form']:15} {errors}   {values}{chosen}"
    if law["splits"]:
        yield "\nThe best split (90 % of the bootstrap):"
    for s in law["splits"]:
        yield (
            f"  {s['arm']:10} {s['teraflop']:g} TFLOP, {s['domains']:2} domains: N {s['n']:.2f}M, D {s['d']:.2f}M, D′ "
            f"{s['d_prime']:.3f}M each, share {s['share']:.0%} ({s['share_low']:.0%} to {s['share_high']:.0%}), "
            f"{s['loss']:.3f}"
        )
