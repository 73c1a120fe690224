"""Figures of a GPU against their goals: `python -m bench.gpu --out FILE [--device cuda] [--quick]`.

Contenders run in turn and a figure is the median over rounds of a ratio within the round, with its quartiles, as in
`python -m bench`; here device events tell the time. Nothing is timed unless the parity check holds. FILE is written
after each section, so that it holds all that was measured whatever happens next.

`--device cpu --quick` with TRITON_INTERPRET=1 goes through the motions without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import nexus_fused
from nexus_fused import NexusAdamW

from .contenders import (
    NEXUS,
    OPTIONS,
    Contender,
    K,
    adamw,
    check_parity,
    compiled_foreach_nexus,
    device_copy,
    foreach_nexus,
    gpt,
    host_seconds,
    kernels,
    make_gradients,
    make_params,
    nexus,
    quartiles,
    ratio,
    time_in_turn,
)

ROOT = Path(__file__).resolve().parent.parent
Shapes = list[tuple[int, ...]]
Figures = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class Sizes:
    """What is measured on: shapes of parameters, calls of step() for the host's time."""

    parity: Shapes
    kernels: Shapes
    large: Shapes
    small: Shapes
    host: Shapes
    calls: int


FULL = Sizes(
    parity=gpt(12, 448, 48000),
    kernels=gpt(4, 2048, 50304),  # 307 million: 1.2 GB for each buffer, twenty times an L2 cache
    large=gpt(24, 2048, 50304),  # 1.3 billion
    small=[(224, 224)] * 200,  # 10 million
    host=[(64, 64)] * 500,
    calls=160,
)
QUICK = Sizes(
    parity=[(33, 7), (5,)], kernels=[(33, 7), (5,)], large=[(33, 7), (5,)], small=[(5,)] * 3, host=[(5,)] * 2, calls=8
)


@dataclass
class Setting:
    """Where and how sections measure."""

    device: torch.device
    backend: str
    rounds: int
    sizes: Sizes
    compile_limit: int  # seconds that torch.compile gets; 0: it is not tried

    def time(self, contenders: list[Contender], *, queued: bool) -> dict[str, list[float]]:
        """`time_in_turn` by the device's clock.

        queued: the device is still busy when a contender is started, as it is with the backward pass in training, so
        that only what the device does counts. Otherwise it is idle, and the host's time counts where that is longer.
        """
        if self.device.type == "cpu":
            return time_in_turn(contenders, self.rounds, seconds_of=host_seconds)

        def device_seconds(run: Callable[[], Any]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(10_000_000)  # cycles: about 5 ms
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return time_in_turn(contenders, self.rounds, seconds_of=device_seconds)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def figure(
    values: dict[str, Any], *, at_most: float | None = None, at_least: float | None = None, **more: Any
) -> dict[str, Any]:
    """`values` (its median is None where nothing could be measured) beside the goal and whether it is met."""
    median = values["median"]
    if at_most is not None:
        values = {**values, "goal": f"at most {at_most}", "met": None if median is None else median <= at_most}
    if at_least is not None:
        values = {**values, "goal": f"at least {at_least}", "met": None if median is None else median >= at_least}
    return {**values, **more}


def not_measured(reason: str, **goal: float) -> dict[str, Any]:
    return figure({"median": None}, **goal, reason=reason)


def kernel_launches(run: Callable[[], Any]) -> list[str]:
    """Names of the kernels that `run` starts on CUDA devices, copies and fills not counted."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        # The trace, since a profiler's list of events mixes kernels with annotations of the same device.
        events = json.loads(trace.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "kernel"]


# Sections


def launches(setting: Setting) -> Figures:
    """Kernels that one step() starts."""
    params = make_params([(64, 64), (64,)], torch.float32, setting.device)
    gradients = make_gradients([(64, 64), (64,)], torch.float32, setting.device)
    optimizer = nexus(params, gradients, backend=setting.backend)()
    started: list[list[str]] = []
    if setting.device.type == "cuda":
        kernel_launches(optimizer.zero_grad)  # a first profile may lose events
    for micro_batch in gradients:
        for p, g in zip(params, micro_batch, strict=True):
            p.grad = g
        if setting.device.type == "cuda":
            started.append(kernel_launches(optimizer.step))
    for name, names, goal in (("inner", started[: K - 1], 3), ("outer", started[K - 1 :], 4)):
        title = f"kernels that step() starts, {name}"
        if any(names):
            most = max(names, key=len)
            yield title, figure({"median": len(most)}, at_most=goal, names=most)
        else:
            yield title, not_measured("torch.profiler saw no kernel on this device", at_most=goal)


def host_time(setting: Setting) -> Figures:
    """Microseconds until step() returns, on an idle device."""
    shapes = setting.sizes.host
    params = make_params(shapes, torch.float32, setting.device)
    optimizer = NexusAdamW(params, backend=setting.backend, **NEXUS)
    gradients = make_gradients(shapes, torch.float32, setting.device)
    for title, n_sets, goal in (("unchanged", 1, 250), ("changed", 2, 500)):
        took = []
        for call in range(2 * K + setting.sizes.calls):
            for p, g in zip(params, gradients[call % n_sets], strict=True):
                p.grad = g
            setting.synchronize()
            start = time.perf_counter()
            optimizer.step()
            took.append((time.perf_counter() - start) * 1e6)
        name = f"host time of step(), {len(shapes)} parameters, addresses {title}, microseconds"
        yield name, figure(quartiles(took[2 * K :]), at_most=goal, calls=setting.sizes.calls)


def bandwidths(setting: Setting) -> Figures:
    """Each kernel's bytes per second over those of a copy on the device."""
    numel = sum(map(math.prod, setting.sizes.kernels))
    for dtype in (torch.float32, torch.bfloat16):
        contenders = kernels(setting.sizes.kernels, dtype, setting.backend, setting.device)
        copy = device_copy(numel, setting.device)
        seconds = setting.time([*contenders, copy], queued=True)
        for c in contenders:
            per_byte = [t * c.bytes / copy.bytes for t in seconds[copy.name]]
            more = absolute(seconds[c.name], c.bytes, numel)
            name = f"{str(dtype).removeprefix('torch.')} {c.name}: bandwidth / copy's"
            yield name, figure(ratio(per_byte, seconds[c.name]), at_least=0.85, **more)
        yield f"copy beside {dtype}", absolute(seconds[copy.name], copy.bytes, numel)
        del contenders, copy
        free(setting.device)


def whole_cycle(setting: Setting) -> Figures:
    """Our cycle over AdamW's, float32."""
    shapes, numel = setting.sizes.large, sum(map(math.prod, setting.sizes.large))
    gradients = make_gradients(shapes, torch.float32, setting.device)  # read only, so both use them
    contenders = [
        Contender("nexus_fused", nexus(own_params(shapes, setting), gradients, backend=setting.backend), 88),
        Contender("AdamW, accumulation, clipping", adamw(own_params(shapes, setting), gradients), 76),
    ]
    seconds = setting.time(contenders, queued=True)
    ours, theirs = seconds.values()
    name = f"float32 whole cycle / AdamW's cycle, {numel / 1e9:.1f}B parameters"
    yield name, figure(ratio(ours, theirs), at_most=1.2)
    for c in contenders:
        yield f"{c.name}, {numel / 1e9:.1f}B parameters", absolute(seconds[c.name], c.bytes, numel)


def foreach_of_small(setting: Setting) -> Figures:
    """10M parameters in 200 tensors, device idle before each cycle."""
    shapes = setting.sizes.small
    title = f"{sum(map(math.prod, shapes)) / 1e6:.0f}M parameters in {len(shapes)} tensors"
    yield from _foreach(setting, shapes, title, queued=False, goal=1.5)


def foreach_of_large(setting: Setting) -> Figures:
    shapes = setting.sizes.large
    title = f"{sum(map(math.prod, shapes)) / 1e9:.1f}B parameters"
    yield from _foreach(setting, shapes, title, queued=True, goal=1.05)


def _foreach(setting: Setting, shapes: Shapes, title: str, *, queued: bool, goal: float) -> Figures:
    """foreach Nexus, plain and compiled, over ours."""
    numel = sum(map(math.prod, shapes))
    gradients = make_gradients(shapes, torch.float32, setting.device)
    ours = nexus(own_params(shapes, setting), gradients, backend=setting.backend)
    plain_params, compiled_params = own_params(shapes, setting), own_params(shapes, setting)
    plain = foreach_nexus(plain_params, gradients)
    contenders = [Contender("nexus_fused", ours, 88), Contender("foreach Nexus", plain, 152)]
    reason = ""
    torch._dynamo.reset()  # or the second model would be compiled for any shapes
    try:
        with at_most_seconds(setting.compile_limit):
            compiled = compiled_foreach_nexus(compiled_params, gradients)
            compiled()  # compiles
            setting.synchronize()
        plain()
        check_close(compiled_params, plain_params)
        contenders.append(Contender("compiled foreach Nexus", compiled, 96))
    except (Exception, TooLong) as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        torch._dynamo.reset()
        compiled = None
    free(setting.device)
    seconds = setting.time(contenders, queued=queued)
    for c in contenders:
        if c.name != "nexus_fused":
            goals = {"at_least": goal} if c.name.startswith("compiled") else {}
            yield f"{c.name} / ours, {title}", figure(ratio(seconds[c.name], seconds["nexus_fused"]), **goals)
        yield f"{c.name}, {title}", absolute(seconds[c.name], c.bytes, numel)
    if reason:
        yield f"compiled foreach Nexus / ours, {title}", not_measured(reason, at_least=goal)


SECTIONS = [launches, host_time, bandwidths, whole_cycle, foreach_of_small, foreach_of_large]


def own_params(shapes: Shapes, setting: Setting) -> list[torch.nn.Parameter]:
    return make_params(shapes, torch.float32, setting.device)


def absolute(seconds: list[float], n_bytes: int, numel: int) -> dict[str, float]:
    """Milliseconds and GB/s by the bytes per parameter that must move."""
    median = statistics.median(seconds)
    return {"milliseconds": median * 1e3, "gigabytes_per_second": n_bytes * numel / median / 1e9}


def free(device: torch.device) -> None:
    """Returns what a section held, cycles of references included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_close(params: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> None:
    """AssertionError unless the two are close on average after one cycle. Elements that hardly moved may differ by lr:
    both know D only to a unit of w, and AdamW's first update keeps just its sign."""
    numel = sum(p.numel() for p in params)
    apart = sum((p - q).abs().sum(dtype=torch.float64).item() for p, q in zip(params, others, strict=True)) / numel
    assert apart <= OPTIONS["lr"] / 20, f"compiled and plain foreach Nexus are {apart:.2g} apart on average"


class TooLong(BaseException):
    """A time limit; not an Exception, which a compiler may catch and go on."""


@contextlib.contextmanager
def at_most_seconds(limit: int) -> Iterator[None]:
    """Raises TooLong in the main thread after `limit` seconds; at once for 0."""
    if not limit:
        raise TooLong("torch.compile was not tried (--compile-limit 0)")

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 10)  # again, should a destructor have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What the figures belong to


def output_of(*command: str) -> str | None:
    """First line a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]


def environment(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    versions = {}
    for package in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "triton": None,
        **versions,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "nexus_fused": nexus_fused.__version__,
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def summary_of(report: Path) -> dict[str, Any]:
    """Counts and failures from a JUnit XML of pytest; `parity`: whether its tests passed, None if none ran."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {"error": f"no report of the tests: {error}", "parity": False}
    passed, failed, skipped = [], [], Counter()
    for case in cases:
        name, outcomes = f"{case.get('classname')}::{case.get('name')}", {child.tag: child for child in case}
        if "failure" in outcomes or "error" in outcomes:
            failed.append(name)
        elif "skipped" in outcomes:
            skipped[outcomes["skipped"].get("message", "")] += 1
        else:
            passed.append(name)
    equal = [name in passed for name in passed + failed if "parity" in name.lower()]
    return {
        "passed": len(passed),
        "failed": len(failed),
        "skipped": skipped.total(),
        "failures": failed,
        "skips": dict(skipped),
        "parity": all(equal) if equal else None,
    }


def show(name: str, values: dict[str, Any]) -> None:
    numbers = {key: value for key, value in values.items() if isinstance(value, float | int | bool) or key == "reason"}
    goal = f" (goal: {values['goal']})" if "goal" in values else ""
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    print(f"  {name}: {shown}{goal}", file=sys.stderr, flush=True)


def check(setting: Setting, result: dict[str, Any]) -> None:
    """Parity of each dtype that is measured."""
    for dtype in (torch.float32, torch.bfloat16):
        result["parity"][str(dtype)] = False
        try:
            check_parity(setting.sizes.parity, dtype, setting.backend, setting.device)
            result["parity"][str(dtype)] = True
        except Exception:
            result["errors"][f"parity of {dtype}"] = traceback.format_exc(limit=-5)
        free(setting.device)


def measure(setting: Setting, result: dict[str, Any], write: Callable[[], None]) -> None:
    """Fills `result` section by section; an error ends its section only, and is kept."""
    for section in SECTIONS:
        started = time.perf_counter()
        try:
            for name, values in section(setting):
                result["figures" if "median" in values else "absolute"][name] = values
                show(name, values)
        except (Exception, KeyboardInterrupt) as error:
            result["errors"][section.__name__] = traceback.format_exc(limit=-5)
            print(result["errors"][section.__name__], file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):  # also what a time limit from outside sends
                return
        free(setting.device)
        result["seconds"][section.__name__] = round(time.perf_counter() - started, 1)
        write()


def main() -> int:
    """Returns the exit status: 0 unless something failed. A missed goal is no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds")
    parser.add_argument("--compile-limit", type=int, default=80, help="seconds that torch.compile gets, each time")
    parser.add_argument("--tests", type=Path, help="JUnit XML of pytest to include; without green parity no figures")
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    setting = Setting(
        device,
        options.backend,
        3 if options.quick else options.rounds,
        QUICK if options.quick else FULL,
        options.compile_limit,
    )
    result: dict[str, Any] = {
        **environment(device),
        "backend": setting.backend,
        "rounds": setting.rounds,
        "quick": options.quick,
        "tests": summary_of(options.tests) if options.tests else None,
        "parity": {},
        "figures": {},
        "absolute": {},
        "seconds": {},
        "errors": {},
    }

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")

    write()
    # Without a GPU its tests are skipped, and there is nothing to publish.
    tested = result["tests"]["parity"] if options.tests else True
    if tested or (tested is None and device.type == "cpu"):
        check(setting, result)
    if result["parity"] and all(result["parity"].values()):
        measure(setting, result, write)
    else:
        result["errors"]["figures"] = "none without parity with the reference: see parity and tests"
    write()
    print(json.dumps(result["errors"], indent=2) if result["errors"] else f"written to {options.out}", file=sys.stderr)
    return int(bool(result["errors"]))


if __name__ == "__main__":
    sys.exit(main())
