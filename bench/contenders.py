"""What is compared. Each contender is a function that runs one cycle on gradients that lie ready, as after a backward
pass, and the bytes per parameter that it must move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexus_fused import NexusAdamW
from nexus_fused.cycle import MicroBatch

K = 4
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
NEXUS: dict[str, Any] = {**OPTIONS, "inner_lr": 0.01, "inner_steps": K}

# GPT-2-like, 12 layers of width 448, 50 million parameters in 148 tensors.
_LAYER = [
    (448,),
    (448,),
    (1344, 448),
    (1344,),
    (448, 448),
    (448,),
    (448,),
    (448,),
    (1792, 448),
    (1792,),
    (448, 1792),
    (448,),
]
GPT2_50M = [(48000, 448), (1024, 448), *_LAYER * 12, (448,), (448,)]
MANY_SMALL = [(64,)] * 2000


@dataclass
class Contender:
    """One side of a comparison: `run` is timed, `bytes` is per parameter and run (0: not counted), `rounds` the most it
    is run, for one that would take longer than all others together."""

    name: str
    run: Callable[[], Any]
    bytes: int
    rounds: int | None = None


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype)) for s in shapes]


def make_gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    """The gradients of K micro-batches."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(K)]


def nexus(params: list[nn.Parameter], gradients: list[list[Tensor]], **options: Any) -> Callable[[], NexusAdamW]:
    """One cycle of NexusAdamW: what a training loop calls, the hand-over of gradients included."""
    optimizer = NexusAdamW(params, **{**NEXUS, **options})

    def run() -> NexusAdamW:
        for micro_batch in gradients:
            for p, g in zip(params, micro_batch, strict=True):
                p.grad = g
            optimizer.step()
        return optimizer

    return run


def adamw(params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], None]:
    """What Nexus replaces: accumulation in place, clipping, torch's fused AdamW. 76 bytes per parameter."""
    optimizer = torch.optim.AdamW(params, fused=True, **OPTIONS)
    accumulated = [g.clone() for g in gradients[0]]  # autograd hands the first one over without a copy

    def run() -> None:
        for p, g in zip(params, accumulated, strict=True):
            p.grad = g
        for micro_batch in gradients[1:]:
            for total, g in zip(accumulated, micro_batch, strict=True):
                total.add_(g)
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return run


def adamw_with_master(params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], None]:
    """The same for low-precision parameters: float32 accumulation, float32 master, rounded back. 82 bytes."""
    masters = [nn.Parameter(p.detach().float()) for p in params]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, fused=True, **OPTIONS)

    def run() -> None:
        with torch.no_grad():
            for master, g in zip(masters, gradients[0], strict=True):
                master.grad.copy_(g)  # type: ignore[union-attr]
            for micro_batch in gradients[1:]:
                for master, g in zip(masters, micro_batch, strict=True):
                    master.grad.add_(g)  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
            optimizer.step()
            torch._foreach_copy_(params, masters)

    return run


def foreach_nexus(params: list[nn.Parameter], gradients: list[list[Tensor]]) -> Callable[[], None]:
    """Nexus as one writes it from foreach operations on a second copy of the model. 144 bytes per parameter."""
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


def triad(numel: int) -> Contender:
    """a ← a + s·b: reads two, writes one, and no hidden read, since what is written has been read. 12 bytes."""
    a, b = torch.zeros(numel), torch.ones(numel)
    return Contender("triad", lambda: a.add_(b, alpha=0.5), 12)


def cycles(shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str | None = None) -> list[Contender]:
    """Whole cycles of every contender, with memory of their own; the first is ours."""
    numel = sum(make.numel() for make in make_params(shapes, dtype))

    def own(make: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        return make(make_params(shapes, dtype), make_gradients(shapes, dtype), **options)

    if dtype == torch.float32:
        others = [
            Contender("AdamW, accumulation, clipping", own(adamw), 76),
            Contender("foreach Nexus, second model", own(foreach_nexus), 152),
        ]
        ours = 88
    else:
        others = [Contender("AdamW, float32 master and accumulation", own(adamw_with_master), 82)]
        ours = 76
    return [
        Contender("nexus_fused", own(nexus, backend=backend), ours),
        *others,
        Contender("nexus_fused reference", own(nexus, backend="reference"), 0, rounds=3),
        triad(numel),
    ]


def kernels(shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str | None = None) -> list[Contender]:
    """The backend's functions by themselves."""
    params, gradients = make_params(shapes, dtype), make_gradients(shapes, dtype)
    optimizer = nexus(params, gradients, backend=backend)()
    for p, g in zip(params, gradients[0], strict=True):
        p.grad = g
    optimizer.step()
    for p, g in zip(params, gradients[1], strict=True):
        p.grad = g
    optimizer._look(gradients=True)
    (table,), (cycle,) = optimizer._tables.values(), optimizer._cycles.values()
    module, micro_batch = cycle.backend, MicroBatch([torch.ones((), dtype=torch.float64)], 1)
    low = dtype != torch.float32

    def inner(touched: bool) -> None:
        table.set_touched(table.segments, touched)
        module.inner_step([table], cycle, micro_batch)

    def outer() -> None:
        table.set_touched(table.segments, True)
        module.outer_step([table], cycle, micro_batch, K)

    return [
        Contender("sq_norm", lambda: module.sq_norm(table), 2 if low else 4),
        Contender("inner_step, first", lambda: inner(False), 12 if low else 16),
        Contender("inner_step, middle", lambda: inner(True), 12),
        Contender("outer_step", outer, 32),
        triad(sum(p.numel() for p in params)),
    ]


def steps_on_small(backend: str | None = None) -> list[Contender]:
    """`step()` on 2,000 parameters of 64 elements: the host's time. Ours: a whole cycle, so divide by K."""
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


def check_parity(shapes: list[tuple[int, ...]], dtype: torch.dtype, backend: str | None = None) -> None:
    """Ours against the reference, two cycles, bit for bit, and foreach Nexus against ours. Raises AssertionError."""
    gradients = make_gradients(shapes, dtype)
    results = []
    for which in (backend, "reference"):
        params = make_params(shapes, dtype)
        run = nexus(params, gradients, backend=which)
        for _ in range(2):
            run()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    # Foreach Nexus in float64: in float32 the difference of weights costs it digits that ours keeps.
    small = MANY_SMALL[:50]
    gradients, results = make_gradients(small, torch.float64), []
    for make in (nexus, foreach_nexus):
        params = make_params(small, torch.float64)
        run = make(params, [[g.clone() for g in micro_batch] for micro_batch in gradients])
        for _ in range(3):
            run()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
