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
from .figures import CLAIMED
from .runs import MILLION


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


BEYOND = " (beyond)"
"""Behind what lies outside of the range that was measured, and behind an N at its end."""
WHERE = ["N", "K", "D", "D/N"]


def seeds_of(row: dict[str, Any]) -> str:
    """Write how many seeds a mean is over, and of how many where some diverged."""
    return f"{row['seeds']} of {row['seeds'] + row['diverged']}" if row["diverged"] else str(row["seeds"])


def percent(share: float, interval: Sequence[float] | None, sign: str = "") -> str:
    """Write a share, with its interval where there is one."""
    text = f"{share:{sign}.0%}" + (" ({:.0%} to {:.0%})".format(*interval) if interval else "")
    return text.replace("-", MINUS)


def pivot(rows: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Return a row for each arm, size, K and D, with what it differs by from AdamW and from unit gradients."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in rows:
        other = "adamw" if r["other"] == "muon" else r["other"].removeprefix("muon+")
        found.setdefault((r["size"], r["inner_steps"], r["tokens"], r["arm"]), {})[other] = r
    table = []
    for of in found.values():
        both = [of[other] for other in ("adamw", "unit") if other in of]
        seeds = " and ".join(dict.fromkeys(str(r["seeds"]) for r in both))
        cells = [shown(of[o][kind]) if o in of else "" for kind in ("trained", "unseen") for o in ("adamw", "unit")]
        table.append([*place(both[0]), title(both[0]["arm"]), seeds, *cells])
    return table


def of_runs(diverged: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each run that diverged."""
    told = {(title(p["arm"]), p["size"], p["inner_steps"], p["seed"], p["lr"]): None for p in diverged}
    return [
        f"Diverged: {arm} at {size}, K = {k}, seed {seed}, learning rate {lr:g}." for arm, size, k, seed, lr in told
    ]


def sections(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables by name."""
    law = found["law"]
    plain = "AdamW or Muon" if any(r["other"] == "muon" for r in found["differences"]) else "AdamW"
    where = f"Commits: {', '.join(found['commits'])}. torch {', '.join(found['torch'])}."
    where += f" Machines: {', '.join(found['processors'])}."
    diverged = of_runs(found["diverged"])
    runs = f"{found['measurements']} measurements of {found['runs']} runs, of which {len(diverged)} diverged"
    made = {
        "runs": f"{runs}.\n{where}",
        "learning rates": table(
            ["N", "K", "arm", "best", "bits per byte by learning rate"],
            (
                [f"{s['parameters'] / MILLION:.2f}M", s["inner_steps"], title(s["arm"]), f"{s['best']:g}", ", ".join(
                    f"{lr:g}: {bits:.3f}" if bits else f"{lr:g}: diverged" for lr, bits in s["bits"]
                )]
                for s in found["searches"]
            ),
        ),
        "bits per byte": table(
            [*WHERE, "arm", "seeds", "trained on", "unseen", "alignment"],
            (
                [*place(r), title(r["arm"]), seeds_of(r), shown(r["trained"], ""), shown(r["unseen"], ""),
                 shown(r["alignment"]) if r["alignment"] else ""]
                for r in found["arms"]
            ),
        ),
        "differences": table(
            [*WHERE, "arm", "seeds", f"trained: − {plain}", "− unit", f"unseen: − {plain}", "− unit"],
            pivot(found["differences"]),
        ),
        "specialized": table(
            [*WHERE, "domain", "D′", "difference", "seeds", "on that domain"],
            (
                [*place(r), r["domain"], ", ".join(f"{s / MILLION:.2f}" for s in r["domain_tokens"]) + "M",
                 f"{title(r['arm'])} {MINUS} {title(r['other'])}", r["seeds"], shown(r["difference"])]
                for r in found["specialized"]
            ),
        ),
        "law": table(
            ["arm", "domain", "form", "error within", "held out", "parameters"],
            (
                [title(f["arm"]), f["domain"], f["form"] + (" (chosen)" if f["form"] == law["form"] else ""),
                 f"{f['error_within']:.2%}", f"{f['error_held_out']:.2%}",
                 ", ".join(f"{name} {value:.2g}" for name, value in f["parameters"].items())]
                for f in law["fits"]
            ),
        ),
        "splits": table(
            ["arm", "budget", "domains", "N", "D", "D′ each", "specialization", "less the first", "bits per byte"],
            (
                [title(s["arm"]), f"{s['teraflop']:.1f} TFLOP", s["domains"],
                 *(f"{s[name]:.2f}M" + BEYOND * s["beyond"][name] for name in ("n", "d", "d_prime")),
                 percent(s["share"], s["share_interval"]),
                 "" if s["less_first"] is None else percent(s["less_first"], s["less_first_interval"], "+"),
                 f"{s['loss']:.3f}"]
                for s in law["splits"]
            ),
        ),
    }  # fmt: skip
    lacks = [f"No law for {name}, which lacks {lack}." for name, lack in law["missing"].items()]
    if law["form"] and law["seeds"] < CLAIMED:
        lacks.append(f"No intervals: {law['seeds']} seeds have every point that is fitted, and {CLAIMED} are needed.")
    return {**made, "runs": "\n".join([made["runs"], *diverged, *found["left_out"]]), "missing": "\n".join(lacks)}


def text(found: dict[str, Any]) -> str:
    """Return everything, for a terminal."""
    return "\n\n".join(f"{name.upper()}\n{content}" for name, content in sections(found).items() if content)


def insert(found: dict[str, Any], page: Path) -> None:
    """Renew what a page has between `<!-- study: NAME -->` and `<!-- end -->`.

    Raises StudyError for an unknown name, for a section that does not end, and where there is none.
    """
    made, before = sections(found), page.read_text()

    def content(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise StudyError(f"{page} asks for {name!r}; there are {', '.join(made)}.")
        if "<!-- study: " in match[2]:
            raise StudyError(f"the section {name!r} of {page} does not end: write <!-- end --> below it.")
        return f"<!-- study: {name} -->\n{made[name]}\n<!-- end -->"

    pattern = r"<!-- study: ([^>]+?) -->\n(.*?)<!-- end -->"
    after, count = re.subn(pattern, content, before, flags=re.DOTALL)
    if not count:
        raise StudyError(
            f"{page} has no section: write <!-- study: differences --> and <!-- end --> where one belongs."
        )
    write_atomically(page, after.encode())
