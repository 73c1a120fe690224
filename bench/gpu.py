"""Figures of a GPU against their goals: `python -m bench.gpu --out FILE [--device cuda] [--quick]`.

Contenders run in turn and a figure is the median over rounds of a ratio within the round, with its quartiles, as in
`python -m bench`; here device events tell the time. Nothing is timed unless the parity check holds. FILE is written
after each section, so that it holds all that was measured whatever happens next. Every fused backend that runs on the
device is a contender; why another one does not, FILE tells.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import nexus_fused
from nexus_fused import NexusAdamW, backends

from .contenders import (
    NEXUS,
    OPTIONS,
    Contender,
    K,
    adamw,
    captured_nexus,
    check_parity,
    compiled_foreach_nexus,
    device_copy,
    foreach_nexus,
    forward_and_backward,
    gpt,
    host_seconds,
    kernels,
    make_gradients,
    make_params,
    nexus,
    quartiles,
    ratio,
    time_in_turn,
    train_adamw,
    train_nexus,
)
from .decoder import Decoder
from .distributed import host_times

ROOT = Path(__file__).resolve().parent.parent
Shapes = list[tuple[int, ...]]
Figures = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class Sizes:
    """What is measured on: shapes of parameters, calls of step() for the host's time, a Decoder's vocabulary, width,
    layers and tokens with its sequences in a micro-batch."""

    parity: Shapes
    kernels: Shapes
    large: Shapes
    small: Shapes
    host: Shapes
    calls: int
    decoder: tuple[int, int, int, int]
    sequences: int


FULL = Sizes(
    parity=gpt(12, 448, 48000),
    kernels=gpt(4, 2048, 50304),  # 307 million: 1.2 GB for each buffer, twenty times an L2 cache
    large=gpt(24, 2048, 50304),  # 1.3 billion
    small=[(224, 224)] * 200,  # 10 million
    host=[(64, 64)] * 500,
    calls=160,
    decoder=(16384, 2048, 8, 1024),  # 472 million: few wide layers, so that the device and not the host is what waits
    sequences=2,
)
QUICK = Sizes(
    parity=[(33, 7), (5,)],
    kernels=[(33, 7), (5,)],
    large=[(33, 7), (5,)],
    small=[(5,)] * 3,
    host=[(5,)] * 2,
    calls=8,
    decoder=(11, 64, 1, 8),
    sequences=1,
)


@dataclass
class Goals:
    """Of one backend: kernels per inner and per outer step, microseconds of step() on the host with addresses unchanged
    and changed, a kernel's bandwidth over a copy's, a cycle over AdamW's in large and small, alone and while training
    with the norm under the backward pass, which None leaves without a goal."""

    inner: int
    outer: int
    unchanged: int
    changed: int
    bandwidth: float
    large: float
    small: float | None
    training: float | None


GOALS = {
    "cuda": Goals(2, 2, 120, 120, 0.92, large=1.17, small=0.7, training=1.0),
    "triton": Goals(3, 4, 250, 500, 0.85, large=1.2, small=None, training=None),
}


@dataclass
class Setting:
    """Where and how sections measure."""

    device: torch.device
    backends: list[str]
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
    for backend in setting.backends:
        params = make_params([(64, 64), (64,)], torch.float32, setting.device)
        gradients = make_gradients([(64, 64), (64,)], torch.float32, setting.device)
        optimizer = nexus(params, gradients, backend=backend)()
        started: list[list[str]] = []
        if setting.device.type == "cuda":
            kernel_launches(optimizer.zero_grad)  # a first profile may lose events
        for micro_batch in gradients:
            for p, g in zip(params, micro_batch, strict=True):
                p.grad = g
            if setting.device.type == "cuda":
                started.append(kernel_launches(optimizer.step))
        goals = GOALS[backend]
        for name, names, goal in (("inner", started[: K - 1], goals.inner), ("outer", started[K - 1 :], goals.outer)):
            title = f"{backend}: kernels that step() starts, {name}"
            if any(names):
                most = max(names, key=len)
                yield title, figure({"median": len(most)}, at_most=goal, names=most)
            else:
                yield title, not_measured("torch.profiler saw no kernel on this device", at_most=goal)


def host_time(setting: Setting) -> Figures:
    """Microseconds until step() returns, on an idle device."""
    shapes = setting.sizes.host
    gradients = make_gradients(shapes, torch.float32, setting.device)
    optimizers = {}
    for backend in setting.backends:
        params = own_params(shapes, setting)
        optimizers[backend] = params, NexusAdamW(params, backend=backend, **NEXUS)
    for title, n_sets in (("unchanged", 1), ("changed", 2)):
        took: dict[str, list[float]] = {backend: [] for backend in setting.backends}
        for call in range(2 * K + setting.sizes.calls):
            for backend, (params, optimizer) in optimizers.items():
                for p, g in zip(params, gradients[call % n_sets], strict=True):
                    p.grad = g
                setting.synchronize()
                start = time.perf_counter()
                optimizer.step()
                took[backend].append((time.perf_counter() - start) * 1e6)
        for backend, times in took.items():
            name = f"{backend}: host time of step(), {len(shapes)} parameters, addresses {title}, microseconds"
            goal = GOALS[backend].unchanged if n_sets == 1 else GOALS[backend].changed
            yield name, figure(quartiles(times[2 * K :]), at_most=goal, calls=setting.sizes.calls)


def host_time_of_dtensors(setting: Setting) -> Figures:
    """FSDP2's parameters over plain ones, in a group of this process alone."""
    for backend in setting.backends:
        n, rounds = len(setting.sizes.host), setting.rounds
        sharded, plain = host_times(setting.device, backend, rounds, setting.synchronize, n=n)
        yield (
            f"{backend}: host time of step(), {n} DTensors / {n} plain parameters",
            figure(ratio(sharded, plain), at_most=1.3),
        )


def bandwidths(setting: Setting) -> Figures:
    """Each kernel's bytes per second over those of a copy on the device."""
    numel = sum(map(math.prod, setting.sizes.kernels))
    for dtype in (torch.float32, torch.bfloat16):
        contenders = [
            (backend, replace(c, name=f"{backend}: {str(dtype).removeprefix('torch.')} {c.name}"))
            for backend in setting.backends
            for c in kernels(setting.sizes.kernels, dtype, backend, setting.device)
        ]
        copy = device_copy(numel, setting.device)
        seconds = setting.time([*(c for _, c in contenders), copy], queued=True)
        for backend, c in contenders:
            per_byte = [t * c.bytes / copy.bytes for t in seconds[copy.name]]
            more = absolute(seconds[c.name], c.bytes, numel)
            values = ratio(per_byte, seconds[c.name])
            yield f"{c.name}: bandwidth / copy's", figure(values, at_least=GOALS[backend].bandwidth, **more)
        yield f"copy beside {dtype}", absolute(seconds[copy.name], copy.bytes, numel)
        del contenders, copy
        free(setting.device)


def cycle_of_large(setting: Setting) -> Figures:
    """Our cycle over AdamW's, float32, as long as the device takes."""
    shapes = setting.sizes.large
    title = f"{sum(map(math.prod, shapes)) / 1e9:.1f}B parameters"
    goals = {backend: GOALS[backend].large for backend in setting.backends}
    yield from _cycle(setting, shapes, title, queued=True, goals=goals)


def cycle_of_small(setting: Setting) -> Figures:
    """The same for 10M parameters in 200 tensors, device idle before each cycle."""
    shapes = setting.sizes.small
    title = f"{sum(map(math.prod, shapes)) / 1e6:.0f}M parameters in {len(shapes)} tensors"
    goals = {backend: GOALS[backend].small for backend in setting.backends}
    yield from _cycle(setting, shapes, title, queued=False, goals=goals)


def _cycle(setting: Setting, shapes: Shapes, title: str, *, queued: bool, goals: dict[str, float | None]) -> Figures:
    """Ours over AdamW's; on an idle device also captured, where no host's time is left."""
    numel = sum(map(math.prod, shapes))
    gradients = make_gradients(shapes, torch.float32, setting.device)  # read only, so all use them
    theirs = Contender("AdamW, accumulation, clipping", adamw(own_params(shapes, setting), gradients), 76)
    ours = [
        (goals[backend], Contender(backend, nexus(own_params(shapes, setting), gradients, backend=backend), 88))
        for backend in setting.backends
    ]
    if not queued and setting.device.type == "cuda":
        for backend in setting.backends:
            captured = captured_nexus(own_params(shapes, setting), gradients, backend=backend)
            ours.append((None, Contender(f"{backend} in a CUDA graph", captured, 88)))
    seconds = setting.time([theirs, *(c for _, c in ours)], queued=queued)
    for goal, c in ours:
        values = ratio(seconds[c.name], seconds[theirs.name])
        yield f"{c.name}: whole cycle / AdamW's cycle, {title}", figure(values, at_most=goal)
    if not queued and setting.device.type != "cuda":
        for backend in setting.backends:
            name = f"{backend} in a CUDA graph: whole cycle / AdamW's cycle, {title}"
            yield name, not_measured("CUDA graphs need a CUDA device")
    for c in (theirs, *(c for _, c in ours)):
        yield f"{c.name}, {title}", absolute(seconds[c.name], c.bytes, numel)


def training(setting: Setting) -> Figures:
    """What our optimizer adds to K forward and backward passes, over what AdamW adds, accumulation and clipping
    included: the time of whole cycles less that of the passes alone."""
    vocabulary, *_, tokens = setting.sizes.decoder
    generator = torch.Generator(setting.device).manual_seed(1)
    size = setting.sizes.sequences, tokens
    micro_batches = [torch.randint(vocabulary, size, generator=generator, device=setting.device) for _ in range(K)]

    def model() -> Decoder:
        torch.manual_seed(0)
        with setting.device:
            return Decoder(*setting.sizes.decoder)

    alone = Contender("forward and backward alone", forward_and_backward(model(), micro_batches), 0)
    theirs = Contender("AdamW", train_adamw(model(), micro_batches), 0)
    ours = []
    for backend in setting.backends:
        for overlap_norm in (True, False):
            run = train_nexus(model(), micro_batches, backend=backend, overlap_norm=overlap_norm)
            name = f"{backend}, {'norm under the backward pass' if overlap_norm else 'norm in step()'}"
            ours.append((GOALS[backend].training if overlap_norm else None, Contender(name, run, 0)))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as one trains
    try:
        seconds = setting.time([alone, theirs, *(c for _, c in ours)], queued=True)
    finally:
        torch.set_float32_matmul_precision(precision)
    numel = sum(p.numel() for p in model().parameters())
    title = f"decoder of {numel / 1e6:.0f}M parameters, K = {K}, {math.prod(size)} tokens"
    passes = seconds[alone.name]
    added = {name: [t - least for t, least in zip(times, passes, strict=True)] for name, times in seconds.items()}
    for goal, c in ours:
        more = {"milliseconds_added": statistics.median(added[c.name]) * 1e3}
        name = f"{c.name}: time added to training / AdamW's, {title}"
        yield name, figure(ratio(added[c.name], added[theirs.name]), at_most=goal, **more)
    for c in (alone, theirs, *(c for _, c in ours)):
        yield f"{c.name}, {title}", {"milliseconds": statistics.median(seconds[c.name]) * 1e3}


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
    ours = [
        Contender(backend, nexus(own_params(shapes, setting), gradients, backend=backend), 88)
        for backend in setting.backends
    ]
    plain_params, compiled_params = own_params(shapes, setting), own_params(shapes, setting)
    plain = foreach_nexus(plain_params, gradients)
    others = [Contender("foreach Nexus", plain, 152)]
    reason = ""
    torch._dynamo.reset()  # or the second model would be compiled for any shapes
    try:
        with at_most_seconds(setting.compile_limit):
            compiled = compiled_foreach_nexus(compiled_params, gradients)
            compiled()  # compiles
            setting.synchronize()
        plain()
        check_close(compiled_params, plain_params)
        others.append(Contender("compiled foreach Nexus", compiled, 96))
    except (Exception, TooLong) as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        torch._dynamo.reset()
        compiled = None
    free(setting.device)
    seconds = setting.time([*ours, *others], queued=queued)
    for c in others:
        goals = {"at_least": goal} if c.name.startswith("compiled") else {}
        for our in ours:
            values = ratio(seconds[c.name], seconds[our.name])
            yield f"{our.name}: {c.name} / ours, {title}", figure(values, **goals)
    for c in (*ours, *others):
        yield f"{c.name}, {title}, in turn with foreach Nexus", absolute(seconds[c.name], c.bytes, numel)
    if reason:
        for our in ours:
            yield f"{our.name}: compiled foreach Nexus / ours, {title}", not_measured(reason, at_least=goal)


SECTIONS = [
    launches,
    host_time,
    host_time_of_dtensors,
    bandwidths,
    cycle_of_large,
    cycle_of_small,
    training,
    foreach_of_small,
    foreach_of_large,
]


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
    """Parity of each backend and dtype that is measured."""
    for backend in setting.backends:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{backend}, {dtype}"
            result["parity"][name] = False
            try:
                check_parity(setting.sizes.parity, dtype, backend, setting.device)
                result["parity"][name] = True
            except Exception:
                result["errors"][f"parity of {name}"] = traceback.format_exc(limit=-5)
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
    parser.add_argument("--backends", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds")
    parser.add_argument("--compile-limit", type=int, default=50, help="seconds that torch.compile gets, each time")
    parser.add_argument("--tests", type=Path, help="JUnit XML of pytest to include; without green parity no figures")
    parser.add_argument("--sanitizers", nargs="*", default=[], metavar="TOOL=OUTCOME", help="to include as they are")
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    reasons = {backend: backends.why_not(backend, device) for backend in options.backends}
    setting = Setting(
        device,
        [backend for backend, reason in reasons.items() if reason is None],
        3 if options.quick else options.rounds,
        QUICK if options.quick else FULL,
        options.compile_limit,
    )
    result: dict[str, Any] = {
        **environment(device),
        "backends": reasons,
        "rounds": setting.rounds,
        "quick": options.quick,
        "tests": summary_of(options.tests) if options.tests else None,
        "sanitizers": dict(outcome.split("=", 1) for outcome in options.sanitizers),
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
