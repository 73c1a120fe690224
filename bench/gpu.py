"""Figures of a GPU against their goals: `python -m bench.gpu --out FILE [--device cuda] [--quick]`.

Contenders run in turn and a figure is the median over rounds of a ratio within the round, with its quartiles, as in
`python -m bench`; here device events tell the time. A backend that fails the parity check is not timed. The
most valuable sections come first, and each has a time limit; FILE is written after each, so that it holds all that was
measured whatever happens next. Every fused backend that runs on the device is a contender; FILE says why any other does
not run.

`--device cpu --quick` with TRITON_INTERPRET=1 goes through the motions without a GPU; its figures mean nothing.
docs/gpu.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
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
    BYTES,
    NEXUS,
    OPTIONS,
    Contender,
    K,
    adamw,
    adamw_with_master,
    captured,
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
    ratio,
    time_in_turn,
    train_adamw,
    train_adamw_with_master,
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
    large: list[Shapes]  # the largest that fits
    small: Shapes
    host: Shapes
    calls: int
    decoder: tuple[int, int, int, int]
    sequences: int


FULL = Sizes(
    parity=gpt(12, 448, 48000),
    kernels=gpt(4, 2048, 50304),  # 307 million: 1.2 GB for each buffer, twenty times an L2 cache
    large=[gpt(layers, 2048, 50304) for layers in (24, 14, 4, 1)],  # 1.3, 0.8, 0.3, 0.2 billion
    small=[(224, 224)] * 200,  # 10 million
    host=[(64, 64)] * 500,
    calls=160,
    decoder=(16384, 2048, 8, 1024),  # 472 million: few wide layers, so that the device and not the host is what waits
    sequences=2,
)
QUICK = Sizes(
    parity=[(33, 7), (5,)],
    kernels=[(33, 7), (5,)],
    large=[[(33, 7), (5,)]],
    small=[(5,)] * 3,
    host=[(5,)] * 2,
    calls=8,
    decoder=(11, 64, 1, 8),
    sequences=1,
)


@dataclass
class Goals:
    """Of one backend: kernels per inner and per outer step, a kernel's bandwidth over a copy's."""

    inner: int
    outer: int
    bandwidth: float


GOALS = {"cuda": Goals(2, 2, 0.92), "triton": Goals(3, 4, 0.85)}


@dataclass
class Setting:
    """Where and how sections measure."""

    device: torch.device
    backends: list[str]
    rounds: int
    sizes: Sizes
    compile_limit: int  # seconds that torch.compile gets; 0: it is not tried
    until: float = float("inf")  # when a section ends its rounds, by time.monotonic()

    def time(self, contenders: list[Contender], *, queued: bool) -> dict[str, list[float]]:
        """`time_in_turn` by the device's clock.

        queued: the device is still busy when a contender is started, as it is with the backward pass in training, so
        that only what the device does counts. Otherwise it is idle, and the host's time counts where that is longer.
        """
        if self.device.type == "cpu":
            return time_in_turn(contenders, self.rounds, seconds_of=host_seconds, until=self.until)

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

        return time_in_turn(contenders, self.rounds, seconds_of=device_seconds, until=self.until)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def large(self, bytes_per_parameter: int) -> Shapes:
        """The largest of the large sizes that leaves a tenth of the free memory."""
        if self.device.type != "cuda":
            return self.sizes.large[0]
        free = 0.9 * torch.cuda.mem_get_info(self.device)[0]
        fits = [s for s in self.sizes.large if bytes_per_parameter * sum(map(math.prod, s)) <= free]
        return (fits or self.sizes.large[-1:])[0]


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
    """Time until step() returns, on an idle device, over that of AdamW's fused step."""
    shapes = setting.sizes.host
    gradients = make_gradients(shapes, torch.float32, setting.device)
    params = own_params(shapes, setting)
    optimizers = {"AdamW": (params, torch.optim.AdamW(params, fused=True, **OPTIONS))}
    for backend in setting.backends:
        params = own_params(shapes, setting)
        optimizers[backend] = params, NexusAdamW(params, backend=backend, **NEXUS)
    for title, n_sets in (("unchanged", 1), ("changed", 2)):
        took: dict[str, list[float]] = {name: [] for name in optimizers}
        for call in range(2 * K + setting.sizes.calls):
            for name, (params, optimizer) in optimizers.items():
                for p, g in zip(params, gradients[call % n_sets], strict=True):
                    p.grad = g
                setting.synchronize()
                start = time.perf_counter()
                optimizer.step()
                took[name].append((time.perf_counter() - start) * 1e6)
        took = {name: times[2 * K :] for name, times in took.items()}
        for backend in setting.backends:
            name = f"{backend}: host time of step() / AdamW's fused, {len(shapes)} parameters, addresses {title}"
            yield name, figure(ratio(took[backend], took["AdamW"]), at_most=0.5, calls=setting.sizes.calls)
        for name, times in took.items():
            title_of_time = f"{name}: host time of step(), {len(shapes)} parameters, addresses {title}"
            yield title_of_time, {"microseconds": statistics.median(times)}


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
            (backend, replace(c, name=f"{backend}: {word(dtype)} {c.name}"))
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


def offloaded(setting: Setting) -> Figures:
    """Outer steps on moments in pinned host memory over those on moments on the device; how many bytes of each memory
    it takes, by what is there before and after; and whether weights are the same after a cycle."""
    shapes, small = setting.sizes.kernels, setting.sizes.small
    numel = sum(map(math.prod, shapes))
    gradients = make_gradients(small, torch.float32, setting.device)
    for backend in setting.backends:
        steps, weights, taken = [], [], []
        for offload in (False, True):
            weights.append(own_params(small, setting))
            nexus(weights[-1], gradients, backend=backend, offload=offload)()
            free(setting.device)
            before = bytes_taken(setting.device)
            of_backend = kernels(shapes, torch.float32, backend, setting.device, offload=offload)
            free(setting.device)
            steps += [replace(c, name=f"{c.name} {offload}") for c in of_backend if c.name == "outer_step"]
            taken.append([(now - then) / numel for now, then in zip(bytes_taken(setting.device), before, strict=True)])
        assert all(map(torch.equal, *weights)), f"{backend}: offload=True changes weights"
        on_device, on_host = (seconds for seconds in setting.time(steps, queued=True).values())
        more = {
            "milliseconds": statistics.median(on_host) * 1e3,
            "milliseconds_on_device": statistics.median(on_device) * 1e3,
            "gigabytes_per_second_each_way": 8 * numel / statistics.median(on_host) / 1e9,
            "device_bytes_less_per_parameter": taken[0][0] - taken[1][0],
            "pinned_bytes_per_parameter": taken[1][1] - taken[0][1],
        }
        name = f"{backend}: outer step with offload / without, {numel / 1e6:.0f}M parameters, float32"
        yield name, figure(ratio(on_host, on_device), **more)
        del of_backend, steps
        free(setting.device)


def cycle_of_large(setting: Setting) -> Figures:
    """Our cycle over AdamW's, as long as the device takes; bfloat16 with a float32 master."""
    for dtype, theirs, name, n_bytes, at_most in (
        (torch.float32, adamw, "AdamW, accumulation, clipping", 76, 1.15),
        (torch.bfloat16, adamw_with_master, "AdamW, float32 master and accumulation", 82, 1.05),
    ):
        shapes = setting.large(62)
        gradients = make_gradients(shapes, dtype, setting.device)  # read only, so all use them

        def own(shapes: Shapes = shapes, dtype: torch.dtype = dtype) -> list[torch.nn.Parameter]:
            return make_params(shapes, dtype, setting.device)

        other = Contender(name, theirs(own(), gradients), n_bytes)
        ours = [
            Contender(backend, nexus(own(), gradients, backend=backend), BYTES[dtype]) for backend in setting.backends
        ]
        title = f"{billions(shapes)} parameters, {word(dtype)}"
        seconds = setting.time([other, *ours], queued=True)
        for c in ours:
            values = ratio(seconds[c.name], seconds[other.name])
            yield f"{c.name}: whole cycle / AdamW's cycle, {title}", figure(values, at_most=at_most)
        for c in (other, *ours):
            yield f"{c.name}, {title}", absolute(seconds[c.name], c.bytes, sum(map(math.prod, shapes)))
        del gradients, other, ours, c
        free(setting.device)


def cycle_of_small(setting: Setting) -> Figures:
    """The same for 10M parameters in 200 tensors, device idle before each cycle: what the host takes counts. In a CUDA
    graph nothing is left of that, so captured is compared with captured."""
    shapes = setting.sizes.small
    numel = sum(map(math.prod, shapes))
    title = f"{numel / 1e6:.0f}M parameters in {len(shapes)} tensors"
    gradients = make_gradients(shapes, torch.float32, setting.device)
    plain = Contender("AdamW", adamw(own_params(shapes, setting), gradients), 76)
    at_once = Contender("AdamW, _foreach_add_", adamw(own_params(shapes, setting), gradients, foreach=True), 76)
    ours = [
        Contender(backend, nexus(own_params(shapes, setting), gradients, backend=backend), BYTES[torch.float32])
        for backend in setting.backends
    ]
    theirs_captured, ours_captured = [], []
    if setting.device.type == "cuda":
        cycle = adamw(own_params(shapes, setting), gradients, foreach=True, capturable=True)
        theirs_captured.append(Contender("AdamW in a CUDA graph", captured(cycle), 76))
        for backend in setting.backends:
            cycle = nexus(own_params(shapes, setting), gradients, backend=backend, capturable=True)
            ours_captured.append(Contender(f"{backend} in a CUDA graph", captured(cycle), BYTES[torch.float32]))
    contenders = [plain, at_once, *ours, *theirs_captured, *ours_captured]
    seconds = setting.time(contenders, queued=False)
    for c in ours:
        for other in (plain, at_once):
            yield (
                f"{c.name}: whole cycle / {other.name}'s cycle, {title}",
                figure(ratio(seconds[c.name], seconds[other.name]), at_most=0.7),
            )
    for c in ours_captured:
        values = ratio(seconds[c.name], seconds[theirs_captured[0].name])
        yield f"{c.name}: whole cycle / AdamW's captured cycle, {title}", figure(values)
    if not ours_captured:
        for backend in setting.backends:
            name = f"{backend} in a CUDA graph: whole cycle / AdamW's captured cycle, {title}"
            yield name, not_measured("CUDA graphs need a CUDA device")
    for c in contenders:
        yield f"{c.name}, {title}", absolute(seconds[c.name], c.bytes, numel)


def misaligned(setting: Setting) -> Figures:
    """A cycle on gradients that begin one element off 16 bytes, as in a bucket of DistributedDataParallel behind an odd
    parameter, over one on gradients that do not."""
    shapes = setting.sizes.kernels
    for dtype in (torch.float32, torch.bfloat16):
        gradients = make_gradients(shapes, dtype, setting.device)
        shifted = [[torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape) for g in of] for of in gradients]
        contenders = []
        for backend in setting.backends:
            runs = [
                nexus(make_params(shapes, dtype, setting.device), of, backend=backend) for of in (shifted, gradients)
            ]
            contenders.append((backend, [Contender(f"{backend} {i}", run, 0) for i, run in enumerate(runs)]))
            del runs
        seconds = setting.time([c for _, pair in contenders for c in pair], queued=True)
        for backend, (off, on) in contenders:
            name = f"{backend}: cycle on misaligned / on aligned gradients, {word(dtype)}"
            yield name, figure(ratio(seconds[off.name], seconds[on.name]))
        del gradients, shifted, contenders
        free(setting.device)


def training(setting: Setting) -> Figures:
    """K forward and backward passes with our optimizer over those with AdamW, accumulation and clipping included; and
    what each adds: the time of whole cycles less that of the passes alone."""
    vocabulary, *_, tokens = setting.sizes.decoder
    generator = torch.Generator(setting.device).manual_seed(1)
    size = setting.sizes.sequences, tokens
    micro_batches = [torch.randint(vocabulary, size, generator=generator, device=setting.device) for _ in range(K)]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as one trains
    try:
        for dtype, theirs_of in ((torch.float32, train_adamw), (torch.bfloat16, train_adamw_with_master)):

            def model(dtype: torch.dtype = dtype) -> Decoder:
                torch.manual_seed(0)
                with setting.device:
                    return Decoder(*setting.sizes.decoder).to(dtype)

            alone = Contender("forward and backward alone", forward_and_backward(model(), micro_batches), 0)
            theirs = Contender("AdamW", theirs_of(model(), micro_batches), 0)
            ours = [
                Contender(backend, train_nexus(model(), micro_batches, backend=backend), 0)
                for backend in setting.backends
            ]
            seconds = setting.time([alone, theirs, *ours], queued=True)
            numel = sum(p.numel() for p in model().parameters())
            title = f"decoder of {numel / 1e6:.0f}M parameters, {word(dtype)}, K = {K}, {math.prod(size)} tokens"
            passes = seconds[alone.name]
            added = {
                name: [t - least for t, least in zip(times, passes, strict=True)] for name, times in seconds.items()
            }
            for c in ours:
                more = {"milliseconds_added": statistics.median(added[c.name]) * 1e3}
                yield f"{c.name}: training / AdamW's, {title}", figure(ratio(seconds[c.name], seconds[theirs.name]))
                name = f"{c.name}: time added to training / AdamW's, {title}"
                yield name, figure(ratio(added[c.name], added[theirs.name]), at_most=1.05, **more)
            for c in (alone, theirs, *ours):
                yield f"{c.name}, {title}", {"milliseconds": statistics.median(seconds[c.name]) * 1e3}
            del alone, theirs, ours, c
            free(setting.device)
    finally:
        torch.set_float32_matmul_precision(precision)


def foreach_of_small(setting: Setting) -> Figures:
    """10M parameters in 200 tensors, device idle before each cycle."""
    shapes = setting.sizes.small
    title = f"{sum(map(math.prod, shapes)) / 1e6:.0f}M parameters in {len(shapes)} tensors"
    yield from _foreach(setting, shapes, title, queued=False, goal=1.5)


def foreach_of_large(setting: Setting) -> Figures:
    shapes = setting.large(92)
    yield from _foreach(setting, shapes, f"{billions(shapes)} parameters", queued=True, goal=1.05)


def _foreach(setting: Setting, shapes: Shapes, title: str, *, queued: bool, goal: float) -> Figures:
    """foreach Nexus, plain and compiled, over ours."""
    numel = sum(map(math.prod, shapes))
    gradients = make_gradients(shapes, torch.float32, setting.device)
    ours = [
        Contender(backend, nexus(own_params(shapes, setting), gradients, backend=backend), BYTES[torch.float32])
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


# In the order of their worth, each with the seconds after which it begins no further round.
SECTIONS = {
    bandwidths: 40,
    cycle_of_large: 40,
    training: 60,
    offloaded: 10,
    cycle_of_small: 20,
    host_time: 20,
    launches: 15,
    misaligned: 20,
    host_time_of_dtensors: 20,
    foreach_of_small: 60,
    foreach_of_large: 70,
}


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def billions(shapes: Shapes) -> str:
    return f"{sum(map(math.prod, shapes)) / 1e9:.1f}B"


def own_params(shapes: Shapes, setting: Setting) -> list[torch.nn.Parameter]:
    return make_params(shapes, torch.float32, setting.device)


def absolute(seconds: list[float], n_bytes: int, numel: int) -> dict[str, float]:
    """Milliseconds and GB/s by the bytes per parameter that must move."""
    median = statistics.median(seconds)
    return {"milliseconds": median * 1e3, "gigabytes_per_second": n_bytes * numel / median / 1e9}


def bytes_taken(device: torch.device) -> tuple[int, int]:
    """Of the device's memory by tensors, and of the host's by the allocator of pinned memory, which rounds up."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.host_memory_stats()["allocated_bytes.current"]


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


def output_of(*command: str) -> list[str]:
    """Lines a program prints; none where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


ASKED = "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What the figures belong to. commit: where the folder's history is not at hand."""
    on_gpu = device.type == "cuda"
    with_triton = importlib.util.find_spec("triton") is not None
    query = ["nvidia-smi", f"--id={device.index}", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    answers = (output_of(*query) or [""])[0].split(", ") if on_gpu else []
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        **dict(zip(ASKED, answers, strict=False)),
        "cuda": torch.version.cuda,
        "nvcc": next((line for line in output_of("nvcc", "--version") if "release" in line), None),
        "targets": backends.cuda_targets(),
        "triton": importlib.metadata.version("triton") if with_triton else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "nexus_fused": nexus_fused.__version__,
        "commit": commit or next(iter(output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty")), None),
    }


def summary_of(report: Path) -> dict[str, Any]:
    """Counts from a JUnit XML of pytest, and what failed with the first line of why."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {"error": f"no report of the tests: {error}"}
    passed, failed, skipped = 0, {}, Counter()
    for case in cases:
        name, outcomes = f"{case.get('classname')}::{case.get('name')}", {child.tag: child for child in case}
        red = outcomes.get("failure", outcomes.get("error"))
        if red is not None:
            failed[name] = (red.get("message") or red.text or "").strip().partition("\n")[0][:300]
        elif "skipped" in outcomes:
            skipped[outcomes["skipped"].get("message", "")] += 1
        else:
            passed += 1
    return {
        "passed": passed,
        "failed": len(failed),
        "skipped": skipped.total(),
        "failures": failed,
        "skips": dict(skipped),
    }


def show(name: str, values: dict[str, Any]) -> None:
    numbers = {key: value for key, value in values.items() if isinstance(value, float | int | bool) or key == "reason"}
    goal = f" (goal: {values['goal']})" if "goal" in values else ""
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    print(f"  {name}: {shown}{goal}", file=sys.stderr, flush=True)


def check(setting: Setting, result: dict[str, Any]) -> None:
    """Parity of each backend and dtype that is measured; a backend that fails is none of the contenders."""
    for backend in list(setting.backends):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{backend}, {dtype}"
            try:
                check_parity(setting.sizes.parity, dtype, backend, setting.device)
                result["parity"][name] = True
            except Exception:
                result["parity"][name] = False
                result["errors"][f"parity of {name}"] = traceback.format_exc(limit=-5)
                setting.backends = [known for known in setting.backends if known != backend]
            free(setting.device)


def measure(setting: Setting, result: dict[str, Any], write: Callable[[], None], seconds: float) -> None:
    """Fills `result` section by section; an error ends its section only, and is kept. No section begins after so many
    seconds."""
    began = time.monotonic()
    for section, limit in SECTIONS.items():
        started = time.monotonic()
        if started > began + seconds:
            result["left_out"].append(section.__name__)
            continue
        setting.until = started + limit
        print(f"{section.__name__} (at most about {limit} s)", file=sys.stderr, flush=True)
        try:
            for name, values in section(setting):
                result["figures" if "median" in values else "absolute"][name] = values
                show(name, values)
            free(setting.device)
        except (Exception, KeyboardInterrupt) as error:
            result["errors"][section.__name__] = traceback.format_exc(limit=-5)
            print(result["errors"][section.__name__], file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):  # also what a time limit from outside sends
                return
        result["seconds"][section.__name__] = round(time.monotonic() - started, 1)
        write()


def main() -> int:
    """Returns the exit status: 0 unless something failed. A missed goal is no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backends", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds")
    parser.add_argument("--compile-limit", type=int, default=40, help="seconds that torch.compile gets, each time")
    parser.add_argument("--seconds", type=float, default=150, help="after which no section begins (%(default)s)")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--tests", type=Path, help="JUnit XML of pytest to include")
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
        **environment(device, options.commit),
        "memory_free": torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        "backends": reasons,
        "rounds": setting.rounds,
        "quick": options.quick,
        "tests": summary_of(options.tests) if options.tests else None,
        "parity": {},
        "figures": {},
        "absolute": {},
        "seconds": {},
        "left_out": [],
        "errors": {},
    }

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")

    write()
    check(setting, result)
    if setting.backends:
        measure(setting, result, write, options.seconds)
    write()
    print(json.dumps(result["errors"], indent=2) if result["errors"] else f"written to {options.out}", file=sys.stderr)
    return int(bool(result["errors"] or result["left_out"] or not setting.backends))


if __name__ == "__main__":
    sys.exit(main())
