"""Contenders in turn, paired ratios, a table and a JSON: `python -m bench [--threads 2] [--rounds 25] [--out FILE]`.

Machines drift, so no absolute time is a result. In each round every contender runs once, in turn. A figure is the
median over rounds of a ratio within the round, with its quartiles. Nothing is timed unless the parity check holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import nexus_fused

from .contenders import (
    GPT2_50M,
    MANY_SMALL,
    Contender,
    check_parity,
    cycles,
    inner_steps_on_small,
    kernels,
    passes_on_small,
    quartiles,
    ratio,
    steps_on_small,
    time_in_turn,
    triad,
)


def timed(contenders: list[Contender], rounds: int, title: str) -> dict[str, list[float]]:
    return time_in_turn(contenders, rounds, progress=lambda steps: tqdm(steps, desc=title, leave=False))


def rows(contenders: list[Contender], seconds: dict[str, list[float]], numel: int) -> list[dict[str, Any]]:
    """Returns one row for each contender: time, and bandwidth by the bytes that it must move, beside the triad of the
    same round.
    """
    triad = next((c for c in contenders if c.name == "triad"), None)
    made = []
    for c in contenders:
        median = statistics.median(seconds[c.name])
        row: dict[str, Any] = {"name": c.name, "milliseconds": median * 1e3, "bytes_per_parameter": c.bytes}
        row["time_of_first"] = ratio(seconds[c.name], seconds[contenders[0].name])["median"]
        if c.bytes and triad:
            row["gigabytes_per_second"] = c.bytes * numel / median / 1e9
            row["bandwidth_of_triad"] = ratio([t * c.bytes / triad.bytes for t in seconds["triad"]], seconds[c.name])
        made.append(row)
    return made


def sections(rounds: int) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, dict[str, float]]]]:
    """Yields title, rows and figures, section by section."""
    numel = sum(torch.Size(shape).numel() for shape in GPT2_50M)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        check_parity(GPT2_50M, dtype)
        contenders = [*cycles(GPT2_50M, dtype), triad(numel)]
        seconds = timed(contenders, rounds, f"{name} cycle")
        ours, adamw = (seconds[c.name] for c in contenders[:2])
        figures = {f"{name}: whole cycle / AdamW's cycle": ratio(ours, adamw)}
        if dtype == torch.float32:
            figures["float32: foreach Nexus / ours"] = ratio(seconds[contenders[2].name], ours)
            figures["float32: Nexus(torch AdamW(fused=True)) / ours"] = ratio(seconds[contenders[3].name], ours)
            figures["float32: whole cycle with inner_steps=None / AdamW's cycle"] = ratio(
                seconds[contenders[4].name], adamw
            )
            per_byte = [t * contenders[0].bytes / 12 for t in seconds["triad"]]
            name_of_bandwidth = f"float32: bandwidth by {contenders[0].bytes} bytes per parameter / triad's"
            figures[name_of_bandwidth] = ratio(per_byte, ours)
        yield f"one cycle, K = 4, {numel / 1e6:.1f}M parameters, {name}", rows(contenders, seconds, numel), figures
        del contenders
        # `end_walk` is for ranks that walk alone.
        contenders = [*(c for c in kernels(GPT2_50M, dtype) if c.name != "end_walk"), triad(numel)]
        seconds = timed(contenders, rounds, f"{name} kernels")
        yield f"kernels, {numel / 1e6:.1f}M parameters, {name}", rows(contenders, seconds, numel), {}
        del contenders
    check_parity(MANY_SMALL, torch.float32)
    contenders = steps_on_small()
    seconds = timed(contenders, rounds, "2,000 parameters")
    figures = {"step() on 2,000 parameters of 64 / AdamW's fused step": ratio(*seconds.values())}
    yield "2,000 parameters of 64 elements, float32", rows(contenders, seconds, 128_000), figures
    contenders = inner_steps_on_small()
    seconds = timed(contenders, 2 * rounds, "2,000 parameters, inner steps")
    figures = {"inner steps on 2,000 parameters of 64: Nexus(torch AdamW) / NexusAdamW": ratio(*seconds.values())}
    yield "inner steps on 2,000 parameters of 64 elements, float32", rows(contenders, seconds, 128_000), figures
    contenders = passes_on_small()
    seconds = timed(contenders, 4 * rounds, "500 parameters, backward passes")
    added = [(a - b) / 4 * 1e6 for a, b in zip(*seconds.values(), strict=True)]
    figures = {"microseconds added to a backward pass by inner_steps=None, 500 parameters": quartiles(added)}
    yield "backward passes, 500 parameters of 4 elements, float32", rows(contenders, seconds, 2000), figures


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def show(title: str, table: list[dict[str, Any]], figures: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n{'':40}{'ms':>9}{'bytes':>7}{'GB/s':>7}{'/ triad':>9}{'/ first':>9}")
    for row in table:
        bandwidth = row.get("gigabytes_per_second")
        print(
            f"{row['name']:40}{row['milliseconds']:9.2f}{row['bytes_per_parameter'] or '':>7}"
            + (f"{bandwidth:7.1f}{row['bandwidth_of_triad']['median']:9.2f}" if bandwidth else " " * 16)
            + f"{row['time_of_first']:9.2f}"
        )
    for name, figure in figures.items():
        print(f"  {name}: {figure['median']:.2f} ({figure['quartile1']:.2f} to {figure['quartile3']:.2f})")


def arguments(prog: str, description: str) -> argparse.Namespace:
    """Parses the command line, and sets the number of threads."""
    parser = argparse.ArgumentParser(prog=prog, description=description.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="also write everything there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def started(options: argparse.Namespace) -> dict[str, Any]:
    """Returns a result without figures yet: what it is measured on and with. Prints the gist."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    result: dict[str, Any] = {
        "processor": processor(),
        "threads": options.threads,
        "rounds": options.rounds,
        "instruction_set": nexus_fused.backends.instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nexus_fused": nexus_fused.__version__,
        "commit": commit.stdout.strip(),
        "sections": [],
        "figures": {},
    }
    print(", ".join(f"{key} {result[key]}" for key in ("processor", "threads", "instruction_set", "torch", "commit")))
    return result


def write(result: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {out}")


def main() -> None:
    options = arguments("python -m bench", str(__doc__))
    result = started(options)
    for title, table, figures in sections(options.rounds):
        show(title, table, figures)
        result["sections"].append({"title": title, "rows": table})
        result["figures"].update(figures)
    write(result, options.out)


if __name__ == "__main__":
    main()
