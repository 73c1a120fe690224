"""What is compared, and how it is timed in turn. Each contender is a function that runs one cycle on gradients that are
ready, as after a backward pass, and the bytes per parameter that it must move.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import inside
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_function

from nexus_fused import Nexus, NexusAdamW
from nexus_fused.cycle import MicroBatch

K = 4
BYTES = {torch.float32: 92, torch.bfloat16: 76}  # per parameter of our cycle, with D in bfloat16: bench.cost
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
Walking = TypeVar("Walking", Nexus, NexusAdamW)
NEXUS: dict[str, Any] = {**OPTIONS, "inner_lr": 0.01, "inner_steps": K}

CPU = torch.device("cpu")


def gpt(layers: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Returns the parameters of a GPT-2-like model: embeddings, a last norm, and for each layer two norms and four
    linear maps.
    """
    w = width
    layer = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(vocabulary, w), (1024, w), *layer * layers, (w,), (w,)]


GPT2_50M = gpt(12, 448, 48000)  # 148 tensors
MANY_SMALL = [(64,)] * 2000


@dataclass
class Contender:
    """One side of a comparison. `run` is timed; `bytes` is per parameter and run (0: not counted). `rounds` limits how
    often it runs, if it takes longer than all others together.
    """

    name: str
    run: Callable[[], Any]
    bytes: int
    rounds: int | None = None


def host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_in_turn(
    contenders: list[Contender],
    rounds: int,
    *,
    seconds_of: Callable[[Callable[[], Any]], float] = host_seconds,
    progress: Callable[[range], Iterable[int]] = iter,
    until: float = float("inf"),
) -> dict[str, list[float]]:
    """Returns seconds of each contender in each round, without two rounds of warm-up. Ends early, after three rounds at
    least, once time.monotonic() has passed `until`.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in progress(range(rounds + 2)):
        if i >= 5 and time.monotonic() > until:
            break
        for contender in contenders:
            if contender.rounds is None or i < contender.rounds + 2:
                took = seconds_of(contender.run)
                if i >= 2:
                    seconds[contender.name].append(took)
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartile1": low, "quartile3": high}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Returns median and quartiles of the paired ratios."""
    return quartiles([a / b for a, b in zip(over, under, strict=False)])


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device = CPU) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator, device=device) * 0.02).to(dtype)) for s in shapes]


def make_gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device = CPU) -> list[list[Tensor]]:
    """Returns the gradients of K micro-batches."""
    generator = torch.Generator(device).manual_seed(1)
    return [[torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes] for _ in range(K)]


def nexus(params: list[nn.Parameter], gradients: list[list[Tensor]], **options: Any) -> Callable[[], NexusAdamW]:
    """One cycle of NexusAdamW: what a training loop calls, with the hand-over of gradients."""
    return cycle_of(NexusAdamW(params, **{**NEXUS, **options}), params, gradients)


def cycle_of(optimizer: Walking, params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], Walking]:
    """K steps of an optimizer with a walk, along these gradients."""

    def run() -> Walking:
        for micro_batch in gradients:
            for p, g in zip(params, micro_batch, strict=True):
                p.grad = g
            optimizer.step()
        return optimizer

    return run


def open_nexus(params: list[nn.Parameter], gradients: list[list[Tensor]], **options: Any) -> Callable[[], NexusAdamW]:
    """One cycle with `inner_steps=None`: K inner steps, as backward passes take them, then `step()` without a gradient.
    Moves 104 bytes per parameter in float32: norms 4·4, first step 14, others 16·3, end 26.
    """
    optimizer = NexusAdamW(params, **{**NEXUS, "inner_steps": None, **options})

    def run() -> NexusAdamW:
        for micro_batch in gradients:
            with optimizer.one_micro_batch():
                for p, g in zip(params, micro_batch, strict=True):
                    p.grad = g
        optimizer.step()
        return optimizer

    return run


def in_front_of_adamw(params: list[nn.Parameter], gradients: list[list[Tensor]], **options: Any) -> Callable[[], Nexus]:
    """One cycle with torch's fused AdamW behind the walk. The last step moves 50 bytes, not 30: its end 16, D/Γ 6,
    AdamW 28.
    """
    walk = {key: value for key, value in {**NEXUS, **options}.items() if key not in OPTIONS}
    return cycle_of(Nexus(torch.optim.AdamW(params, fused=True, **OPTIONS), **walk), params, gradients)


def captured(cycle: Callable[[], Any]) -> Callable[[], None]:
    """One cycle as a CUDA graph, captured after one cycle outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cycle()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cycle()

    def replay() -> None:
        graph.replay()

    replay.keeps = cycle  # type: ignore[attr-defined]  # and with it the optimizer, whose memory the graph uses
    return replay


def adamw(
    params: list[nn.Parameter], gradients: list[list[Tensor]], *, foreach: bool = False, capturable: bool = False
) -> Callable[[], None]:
    """What Nexus replaces: accumulation in place, clipping, torch's fused AdamW. 76 bytes per parameter. foreach:
    accumulates all tensors at once, not one after another as autograd does.
    """
    optimizer = torch.optim.AdamW(params, fused=True, capturable=capturable, **OPTIONS)
    accumulated = [g.clone() for g in gradients[0]]  # autograd hands the first one over without a copy

    def run() -> None:
        for p, g in zip(params, accumulated, strict=True):
            p.grad = g
        for micro_batch in gradients[1:]:
            if foreach:
                torch._foreach_add_(accumulated, micro_batch)
            else:
                for total, g in zip(accumulated, micro_batch, strict=True):
                    total.add_(g)
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return run


class WithMaster:
    """AdamW of low-precision parameters: float32 accumulation, float32 masters, rounded back."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.masters = [nn.Parameter(p.detach().float()) for p in params]
        self.totals = [torch.zeros_like(master) for master in self.masters]
        for master, total in zip(self.masters, self.totals, strict=True):
            master.grad = total
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, **OPTIONS)

    @torch.no_grad()
    def add(self, gradients: list[Tensor], *, first: bool) -> None:
        """Takes the gradients of a micro-batch."""
        (torch._foreach_copy_ if first else torch._foreach_add_)(self.totals, gradients)

    @torch.no_grad()
    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.masters)


def adamw_with_master(params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], None]:
    """AdamW for low-precision parameters: see `WithMaster`. 82 bytes."""
    optimizer = WithMaster(params)

    def run() -> None:
        for i, micro_batch in enumerate(gradients):
            optimizer.add(micro_batch, first=i == 0)
        optimizer.step()

    return run


def foreach_nexus(params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], None]:
    """Nexus as one writes it from foreach operations on a second copy of the model. 152 bytes per parameter. Scales
    `gradients` in place to the length γ, which does not matter to whoever uses them next: Nexus normalizes.
    """
    optimizer = torch.optim.AdamW(params, fused=True, **OPTIONS)
    inner = [p.detach().clone() for p in params]
    gamma = NEXUS["inner_lr"]

    @torch.no_grad()
    def run() -> None:
        for micro_batch in gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(micro_batch)))
            torch._foreach_mul_(micro_batch, gamma / norm)
            torch._foreach_sub_(inner, micro_batch)
        displacement = torch._foreach_sub(params, inner)
        torch._foreach_div_(displacement, K * gamma)
        for p, d in zip(params, displacement, strict=True):
            p.grad = d
        optimizer.step()
        torch._foreach_copy_(inner, params)

    return run


def compiled_foreach_nexus(params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], None]:
    """foreach Nexus for torch.compile, with AdamW, its constants compiled in. At best 96 bytes per parameter."""
    thetas, inner = [p.detach() for p in params], [p.detach().clone() for p in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in thetas] for _ in range(2))
    steps = [torch.zeros((), device=p.device) for p in thetas]
    gamma, (beta1, beta2) = NEXUS["inner_lr"], OPTIONS["betas"]

    @torch.compile(dynamic=False)
    def move(inner: list[Tensor], micro_batch: list[Tensor]) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(micro_batch)))
        torch._foreach_sub_(inner, torch._foreach_mul(micro_batch, gamma / norm))

    @torch.compile(dynamic=False)
    def finish(
        thetas: list[Tensor],
        inner: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        displacement = torch._foreach_div(torch._foreach_sub(thetas, inner), K * gamma)
        adamw_function(
            thetas,
            list(displacement),
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            foreach=True,
            capturable=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=OPTIONS["lr"],
            weight_decay=OPTIONS["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
        torch._foreach_copy_(inner, thetas)

    @torch.no_grad()
    def run() -> None:
        for micro_batch in gradients:
            move(inner, micro_batch)
        finish(thetas, inner, exp_avgs, exp_avg_sqs, steps)

    return run


def forward_and_backward(model: nn.Module, micro_batches: list[Tensor]) -> Callable[[], None]:
    """K forward and backward passes, each with gradients in memory of their own, and no optimizer."""

    def run() -> None:
        for tokens in micro_batches:
            model(tokens).backward()
            model.zero_grad()

    return run


def train_nexus(model: nn.Module, micro_batches: list[Tensor], **options: Any) -> Callable[[], None]:
    """One cycle of training with NexusAdamW."""
    optimizer = NexusAdamW(model.parameters(), **{**NEXUS, **options})

    def run() -> None:
        for tokens in micro_batches:
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def train_adamw(model: nn.Module, micro_batches: list[Tensor]) -> Callable[[], None]:
    """One cycle of training with what that replaces: autograd's accumulation, clipping, torch's fused AdamW."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, fused=True, **OPTIONS)

    def run() -> None:
        for tokens in micro_batches:
            model(tokens).backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return run


def train_adamw_with_master(model: nn.Module, micro_batches: list[Tensor]) -> Callable[[], None]:
    """One cycle of training with AdamW for a model below float32: see `WithMaster`."""
    params = list(model.parameters())
    optimizer = WithMaster(params)

    def run() -> None:
        for i, tokens in enumerate(micro_batches):
            model(tokens).backward()
            optimizer.add([p.grad for p in params], first=i == 0)  # type: ignore[misc]
            model.zero_grad()
        optimizer.step()

    return run


def triad(numel: int) -> Contender:
    """a ← a + s·b: reads two, writes one. Nothing else is read, since what is written has been read. 12 bytes."""
    a, b = torch.zeros(numel), torch.ones(numel)
    return Contender("triad", lambda: a.add_(b, alpha=0.5), 12)


def device_copy(numel: int, device: torch.device) -> Contender:
    """a ← b in float32, on one device: the most that a GPU's memory gives. 8 bytes."""
    a, b = torch.zeros(numel, device=device), torch.randn(numel, device=device)
    return Contender("copy", lambda: a.copy_(b), 8)


def cycles(shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str | None = None) -> list[Contender]:
    """Returns whole cycles of every contender, with memory of their own; the first is ours."""

    def own(make: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        return make(make_params(shapes, dtype), make_gradients(shapes, dtype), **options)

    if dtype == torch.float32:
        others = [
            Contender("AdamW, accumulation, clipping", own(adamw), 76),
            Contender("foreach Nexus, second model", own(foreach_nexus), 152),
            Contender("Nexus(torch AdamW(fused=True))", own(in_front_of_adamw, backend=backend), BYTES[dtype] + 20),
            Contender("nexus_fused, inner_steps=None", own(open_nexus, backend=backend), BYTES[dtype] + 12),
        ]
    else:
        others = [Contender("AdamW, float32 master and accumulation", own(adamw_with_master), 82)]
    return [
        Contender("nexus_fused", own(nexus, backend=backend), BYTES[dtype]),
        *others,
        Contender("nexus_fused reference", own(nexus, backend="reference"), 0, rounds=3),
    ]


def kernels(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    backend: str | None = None,
    device: torch.device = CPU,
    **options: Any,
) -> list[Contender]:
    """Returns the backend's functions alone."""
    params, gradients = make_params(shapes, dtype, device), make_gradients(shapes, dtype, device)
    optimizer = nexus(params, gradients, backend=backend, **options)()
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g
    optimizer.step()
    for p, g in zip(params, gradients[1], strict=True):
        p.grad = g
    inside.look(optimizer, gradients=True)
    table, (cycle,) = inside.only_table(optimizer), inside.cycles(optimizer)
    module, micro_batch = cycle.backend, MicroBatch([torch.ones((), dtype=torch.float64, device=device)], 1)
    low = dtype != torch.float32

    def inner(touched: bool) -> None:
        table.set_touched(table.segments, touched)
        module.inner_step([table], cycle, micro_batch)

    def outer() -> None:
        table.set_touched(table.segments, True)
        module.outer_step([table], cycle, micro_batch, K)

    def end_walk() -> None:
        table.set_touched(table.segments, True)
        module.end_walk([table], cycle, micro_batch, 0.5)

    return [
        Contender("sq_norm", lambda: module.sq_norm(table), 2 if low else 4),
        Contender("inner_step, first", lambda: inner(False), 12 if low else 14),
        Contender("inner_step, middle", lambda: inner(True), 14 if low else 16),
        Contender("outer_step", outer, 28 if low else 30),
        Contender("end_walk", end_walk, 14 if low else 16),
    ]


def steps_on_small(backend: str | None = None) -> list[Contender]:
    """Returns `step()` on 2,000 parameters of 64 elements: the host's time. Ours is a whole cycle: divide by K."""
    ours, gradients = make_params(MANY_SMALL, torch.float32), make_gradients(MANY_SMALL, torch.float32)
    theirs = make_params(MANY_SMALL, torch.float32)
    optimizer = torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    for p, g in zip(theirs, gradients[0], strict=True):
        p.grad = g.clone()

    def adamw_steps() -> None:
        for _ in range(K):
            optimizer.step()

    return [
        Contender("nexus_fused, 4 step()", nexus(ours, gradients, backend=backend), 0),
        Contender("torch AdamW(fused=True), 4 step()", adamw_steps, 0),
    ]


def inner_steps_on_small(backend: str | None = None) -> list[Contender]:
    """Returns K inner steps on the same parameters, of both classes: the host's time."""
    options = {"inner_steps": 4096, "backend": backend}  # more than are taken
    gradients = make_gradients(MANY_SMALL, torch.float32)
    runs = [make(make_params(MANY_SMALL, torch.float32), gradients, **options) for make in (in_front_of_adamw, nexus)]
    return [
        Contender("Nexus(torch AdamW), 4 inner steps", runs[0], 0),
        Contender("NexusAdamW, 4 inner steps", runs[1], 0),
    ]


def passes_on_small() -> list[Contender]:
    """Returns backward passes through 500 parameters of 4 elements, each with its inner step, and the outer step after
    K of them. Either the pass takes the inner step, or a `step()` after it, which `zero_grad()` follows.
    """

    def own(inner_steps: int | None) -> Callable[[], None]:
        params = make_params([(4,)] * 500, torch.float32)
        optimizer = NexusAdamW(params, **{**NEXUS, "inner_steps": inner_steps})

        def run() -> None:
            for _ in range(K):
                torch.stack(torch._foreach_mul(params, 2.0)).sum().backward()  # type: ignore[no-untyped-call]
                if inner_steps is not None:
                    optimizer.step()
                    optimizer.zero_grad()
            optimizer.outer_step()

        return run

    return [
        Contender("inner_steps=None, 4 backward passes", own(None), 0),
        Contender("inner_steps=5, 4 backward passes", own(K + 1), 0),
    ]


def check_parity(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str | None = None, device: torch.device = CPU
) -> None:
    """Compares ours with the reference for two cycles, and foreach Nexus with ours. Raises AssertionError.

    On a CPU bit for bit. A GPU computes the scalars in another order, so now and then γ/n is rounded to the neighbor in
    float32. Here and there D then goes to its neighbor in bfloat16, and G changes by up to 1/128 of itself: at most a
    hundredth of lr in θ, and a unit of θ's dtype. Given the scalars, tests/test_gpu.py demands equality of the kernels.
    """
    gradients = make_gradients(shapes, dtype, device)
    results = []
    for which in (backend, "reference"):
        params = make_params(shapes, dtype, device)
        run = nexus(params, gradients, backend=which)
        for _ in range(2):
            run()
        results.append(params)
    exact = device.type == "cpu"
    rtol, atol = (0, 0) if exact else (torch.finfo(dtype).eps, OPTIONS["lr"] / 100)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    small, n_cycles = MANY_SMALL[:10], 3

    def trained(make: Callable[..., Any], dtype: torch.dtype, **options: Any) -> Tensor:
        params = make_params(small, dtype, device)
        run = make(params, make_gradients(small, dtype, device), **options)
        for _ in range(n_cycles):
            run()
        return torch.cat([p.detach().double() for p in params])

    # Foreach Nexus in float64: in float32 the difference of weights costs it digits that ours keeps.
    theirs = trained(foreach_nexus, torch.float64)
    torch.testing.assert_close(trained(nexus, torch.float64, backend=backend), theirs, rtol=0, atol=1e-9)
    # D in bfloat16 is rounded K-1 times: 0.3 % of G, on average, and no larger part of lr in each of AdamW's updates.
    apart = (trained(nexus, torch.float32, backend=backend) - theirs).abs().mean().item()
    assert apart <= n_cycles * 0.003 * OPTIONS["lr"], f"ours and foreach Nexus are {apart:.2g} apart on average"
