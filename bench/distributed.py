"""Host time of step() on DTensors: `python -m bench.distributed [--threads 1] [--rounds 25] [--out FILE]`.

Compares 500 parameters of 64 elements under FSDP2 with those of a plain model, in one process, where nothing is sent:
on a mesh of one rank they are DTensors all the same. A figure is the median over rounds of the ratio within a round,
with its quartiles; a round is four cycles of each.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nexus_fused import NexusAdamW

from .__main__ import arguments, started, write
from .contenders import NEXUS, K, ratio

CYCLES = 4  # of each contender in a round
WARM_UP = 2  # rounds that are not counted
NAME = "host time of step(), 500 DTensors / 500 plain parameters"


class Squares(nn.Module):
    """Parameters of one shape, and the sum of their squares."""

    def __init__(self, n: int, numel: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        values = [torch.randn(numel, generator=generator, device=device) for _ in range(n)]
        self.values = nn.ParameterList([nn.Parameter(value) for value in values])

    def forward(self, scale: torch.Tensor) -> torch.Tensor:  # FSDP2 moves inputs to a GPU, and wants one to move
        return torch.stack([value.square().sum() for value in self.values]).sum() * scale


def host_times(
    device: torch.device, backend: str | None, rounds: int, synchronize: Callable[[], None], *, n: int = 500
) -> tuple[list[float], list[float]]:
    """Returns seconds per step() of each round, on DTensors and on plain parameters, after finding both equal. Joins a
    group of one process meanwhile. synchronize: waits until the device is idle.
    """
    store = dist.HashStore()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        plain = Squares(n, 64, device)
        sharded = copy.deepcopy(plain)
        fully_shard(sharded, mesh=init_device_mesh(device.type, (1,)))
        optimizers = []
        for module in (sharded, plain):
            module(torch.ones((), device=device)).backward()
            optimizers.append(NexusAdamW(module.parameters(), backend=backend, **NEXUS))
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(WARM_UP + rounds):
            for optimizer, took in zip(optimizers, seconds, strict=True):
                elapsed = 0.0
                for _ in range(CYCLES * K):
                    synchronize()
                    start = time.perf_counter()
                    optimizer.step()
                    elapsed += time.perf_counter() - start
                took.append(elapsed / (CYCLES * K))
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.to_local(), q.data, rtol=0, atol=0)
        return seconds[0][WARM_UP:], seconds[1][WARM_UP:]
    finally:
        dist.destroy_process_group()


def main() -> None:
    options = arguments("python -m bench.distributed", str(__doc__))
    result = started(options)
    sharded, plain = host_times(torch.device("cpu"), None, options.rounds, lambda: None)
    figure = ratio(sharded, plain)
    result["figures"][NAME] = figure
    print(f"  {NAME}: {figure['median']:.2f} ({figure['quartile1']:.2f} to {figure['quartile3']:.2f})")
    write(result, options.out)


if __name__ == "__main__":
    main()
