"""Writes what a study found as Markdown tables, to the terminal and into a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nexus_fused.demo.data import write_atomically
from nexus_fused.demo.report import MINUS

from . import StudyError
from .arms import title
from .runs import MILLION

CLAIMED = 5
"""Seeds behind a difference that is claimed."""


def shown(found: dict[str, Any], sign: str = "+") -> str:
    """Write a mean with its standard error, in bold where five seeds or more leave 0 outside of the 95 % interval."""
    text = f"{found['mean']:{sign}.3f}".replace("-", MINUS)
    text += f" ± {found['standard_error']:.3f}" if found["standard_error"] is not None else ""
    return f"**{text}**" if found.get("certain") and len(found["by_seed"]) >= CLAIMED else text


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, the columns as wide as their cells; "" without rows."""
    cells = [list(map(str, row)) for row in rows]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [[name.ljust(width) for name, width in zip(row, widths, strict=True)] for row in (head, *cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["-" * width for width in widths], *lines[1:]))


def place(row: dict[str, Any]) -> list[str]:
    """Return the cells that say which N, K and D a row is of."""
    per = row["tokens"] / row["parameters"]
    size = f"{row['parameters'] / MILLION:.2f}M"
    return [size, str(row["inner_steps"]), f"{row['tokens'] / MILLION:.2f}M", f"{per:.1f}"]


BEYOND = ", beyond what was measured"
WHERE = ["N", "K", "D", "D/N"]


def pivot(rows: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Return a row for each arm, size, K and D, with what it differs by from AdamW and from unit gradients."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in rows:
        other = "adamw" if r["other"] == "muon" else r["other"].removeprefix("muon+")
        found.setdefault((*place(r), title(r["arm"])), {})[other] = r
    return [
        [*key, " and ".join(dict.fromkeys(str(r["seeds"]) for r in of.values()))]
        + [
            shown(of[other][kind]) if other in of else ""
            for kind in ("trained", "unseen")
            for other in ("adamw", "unit")
        ]
        for key, of in found.items()
    ]


def sections(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables by name."""
    law = found["law"]
    plain = "AdamW or Muon" if any(r["other"] == "muon" for r in found["differences"]) else "AdamW"
    where = f"Commits: {', '.join(found['commits'])}. torch {', '.join(found['torch'])}."
    where += f" Machines: {', '.join(found['processors'])}."
    runs = f"{found['measurements']} measurements of {found['runs']} runs, of which {len(found['diverged'])} diverged"
    made = {
        "runs": f"{runs}. {where}",
        "learning rates": table(
            ["N", "K", "arm", "best", "bits per byte by learning rate"],
            (
                [s["size"], s["inner_steps"], title(s["arm"]), f"{s['best']:g}", ", ".join(
                    f"{lr:g}: {bits:.3f}" if bits else f"{lr:g}: diverged" for lr, bits in s["bits"]
                )]
                for s in found["searches"]
            ),
        ),
        "bits per byte": table(
            [*WHERE, "arm", "seeds", "trained on", "unseen", "alignment"],
            (
                [*place(r), title(r["arm"]), r["seeds"], shown(r["trained"], ""), shown(r["unseen"], ""),
                 shown(r["alignment"]) if r["alignment"] else ""]
                for r in found["arms"]
            ),
        ),
        "differences": table(
            [*WHERE, "arm", "seeds", f"trained: − {plain}", "− unit", f"unseen: − {plain}", "− unit"],
            pivot(found["differences"]),
        ),
        "specialized": table(
            [*WHERE, "domain", "difference", "seeds", "on that domain"],
            (
                [*place(r), r["domain"], f"{title(r['arm'])} {MINUS} {title(r['other'])}", r["seeds"],
                 shown(r["difference"])]
                for r in found["specialized"]
            ),
        ),
        "law": table(
            ["arm", "domain", "form", "error within", "held out", "parameters"],
            (
                [title(f["arm"]), f["domain"], f["form"] + (" (chosen)" if f["form"] == law["form"] else ""),
                 f"{f['error_within']:.2%}", f"{f['error_held_out']:.2%}",
                 ", ".join(f"{name} {value:.3g}" for name, value in f["parameters"].items())]
                for f in law["fits"]
            ),
        ),
        "splits": table(
            ["arm", "budget", "domains", "N", "D", "D′ each", "specialization", "bits per byte"],
            (
                [title(s["arm"]), f"{s['teraflop']:g} TFLOP", s["domains"], f"{s['n']:.2f}M", f"{s['d']:.2f}M",
                 f"{s['d_prime']:.3f}M" + BEYOND * s["beyond"],
                 f"{s['share']:.0%} ({s['share_low']:.0%} to {s['share_high']:.0%})",
                 f"{s['loss']:.3f}"]
                for s in law["splits"]
            ),
        ),
    }  # fmt: skip
    lacks = [f"No law for {name}, which lacks {lack}." for name, lack in law["missing"].items()]
    diverged = [f"Diverged: {point}." for point in found["diverged"]]
    return {**made, "runs": "\n".join([made["runs"], *diverged]), "missing": "\n".join(lacks)}


def text(found: dict[str, Any]) -> str:
    """Return everything, for a terminal."""
    return "\n\n".join(f"{name.upper()}\n{content}" for name, content in sections(found).items() if content)


def insert(found: dict[str, Any], page: Path) -> None:
    """Renew what a page has between `<!-- study: NAME -->` and `<!-- end -->`; StudyError for an unknown name."""
    made = sections(found)

    def content(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise StudyError(f"{page} asks for {name!r}; there are {', '.join(made)}.")
        return f"<!-- study: {name} -->\n{made[name]}\n<!-- end -->"

    pattern = r"<!-- study: ([^>]+?) -->\n.*?<!-- end -->"
    write_atomically(page, re.sub(pattern, content, page.read_text(), flags=re.DOTALL).encode())
