"""What a cycle costs, from a few numbers: `python -m bench.cost --parameters 70e9 --ranks 1024 ...`.

Bytes that a rank sends, bytes through its memory, time by the given bandwidths, and memory. It compares AdamW
(accumulation, without reductions as far as possible, clipping, step), Nexus that reduces the gradients of each
micro-batch, and Nexus whose ranks walk on their own (`displacement_group`). `--measure` checks the bytes on 1, 2 and 4
processes (gloo) with DistributedDataParallel, FSDP2 and both; it measures no times, so other load on the machine does
not matter. docs/cost.md explains.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from nexus_fused import memory
from nexus_fused.flat import BUCKET_BYTES
from nexus_fused.options import displacement_dtype

ADAMW, WIDE, UNSHARDED = "AdamW", "AdamW, float32 gradients", "AdamW, accumulates unsharded"
SYNCHRONIZED, LOCAL, LOCAL_F32 = "Nexus, synchronized", "Nexus, local walks", "Nexus, local walks, D in float32"

MIB = 2**20


class Collective(NamedTuple):
    """What one kind of collective does in a cycle. kind: "all_reduce", "all_gather" or "reduce_scatter". across:
    between replicas, not within the shards of one. ranks: in a group. bytes: of the whole tensors, as each rank has
    them before or after. calls: how many.
    """

    kind: str
    across: bool
    ranks: int
    bytes: float
    calls: int


class Cost(NamedTuple):
    """The cost of a cycle for one rank. traffic: bytes that the optimizer reads and writes. memory: bytes of weights,
    gradients and state at the peak, without activations.
    """

    collectives: list[Collective]
    traffic: float
    memory: float


# The model


def sent(kind: str, ranks: int, size: float) -> float:
    """Returns the bytes that each of `ranks` sends in a ring for a tensor of `size` bytes. Reducing and gathering take
    one round each, in which everything but a rank's own part passes by.
    """
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * (ranks - 1) / ranks * size


def adamw_traffic(inner_steps: int, itemsize: int, wide: bool = False) -> int:
    """Returns bytes per parameter and cycle: K-1 accumulations in place, the norm, scaling, and the step. wide:
    gradients of `itemsize` bytes are accumulated in a float32 buffer, which the first one initializes.
    """
    if wide:
        accumulation = (itemsize + 4) + (inner_steps - 1) * (itemsize + 8)
        return accumulation + 12 + 30
    return (inner_steps - 1) * 3 * itemsize + 3 * itemsize + 28


# Of Nexus: a weight has 4 bytes, float32 or a parameter and a remainder of 2. gradient, displacement: bytes of each.


def nexus_traffic(inner_steps: int, gradient: int, displacement: int = 2) -> int:
    """Returns bytes per parameter and cycle: K norms, K-1 inner steps, the last one with AdamW: w D g m v -> w m v."""
    if inner_steps == 1:  # there is no D
        return gradient + gradient + 24
    return _walk_traffic(inner_steps, gradient, displacement) + displacement + gradient + 24


def walks_traffic(inner_steps: int, gradient: int, displacement: int = 2) -> int:
    """Returns bytes per parameter and cycle of local walks. As above, but the end of the walk, anchor D g -> w D, is a
    pass of its own, and AdamW, w D m v -> w m v, another. The communication library's reads and writes between them
    do not count.
    """
    adamw = displacement + 24
    if inner_steps == 1:  # g -> D, since w is θ
        return gradient + gradient + displacement + adamw
    anchor = 4  # which the first step writes
    return _walk_traffic(inner_steps, gradient, displacement) + anchor + 8 + gradient + 2 * displacement + adamw


def _walk_traffic(inner_steps: int, gradient: int, displacement: int) -> int:
    """Returns the bytes of K norms and K-1 inner steps: w D g -> w D, of which the first one reads no D."""
    return inner_steps * gradient + (inner_steps - 1) * (8 + gradient + 2 * displacement) - displacement


def costs(
    *,
    parameters: float,
    ranks: int,
    inner_steps: int,
    dtype: torch.dtype,
    shards: int = 1,
    blocks: int = 1,
    tensors: int = 1,
) -> dict[str, Cost]:
    """The cost of a cycle with each method that the layout allows.

    shards: 1, DistributedDataParallel on all ranks; as many as ranks, FSDP2; between, FSDP2 within each `shards` ranks
    and replicas across. blocks: modules under `fully_shard`. tensors: parameters of the model. dtype: of parameters and
    gradients, torch.float32, or torch.bfloat16: AdamW has a float32 master then, Nexus a remainder. D has the dtype
    that NexusAdamW gives it, but for LOCAL_F32. Memory is nexus_fused.memory's. ValueError for numbers that do not fit
    together.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, but is {dtype}")
    if min(parameters, ranks, inner_steps, shards, blocks, tensors) < 1 or ranks % shards:
        raise ValueError(
            "parameters, ranks, inner_steps, shards, blocks and tensors must be at least 1, and shards must divide "
            f"ranks, but {shards} shards and {ranks} ranks, {parameters:g} parameters, {inner_steps} inner steps, "
            f"{blocks} blocks and {tensors} tensors were given"
        )
    steps, itemsize, mine = inner_steps, dtype.itemsize, parameters / shards
    narrow, replicated = itemsize < 4, shards == 1
    size, wide_size = parameters * itemsize, parameters * 4

    def within(kind: str, times: int, each: float, calls: int = blocks) -> Collective:
        return Collective(kind, False, shards, times * each, times * calls)

    def across(times: int, each: float, calls: int) -> Collective:
        return Collective("all_reduce", True, ranks // shards, times * each, times * calls)

    def gradients(scatters: int, reductions: int, each: float = size) -> list[Collective]:
        calls = ddp_buckets(each) if replicated else blocks
        return [within("reduce_scatter", scatters, each), across(reductions, each / shards, calls)]

    gathers = within("all_gather", 2 * steps, size)  # before each forward pass and again before each backward pass
    nexus = [gathers, within("all_reduce", steps, 8, 1), within("all_reduce", 1, 24, 1)]  # norms in float64; metrics
    adamw = [gathers, within("all_reduce", 1, tensors * itemsize, 1)]  # clipping: each tensor's norm
    held = memory.adamw(dtype, master=True)
    found = {ADAMW: Cost([*adamw, *gradients(steps, 1)], mine * adamw_traffic(steps, itemsize), mine * held.device)}
    if narrow:
        traffic = mine * adamw_traffic(steps, itemsize, wide=True)
        clipping = within("all_reduce", 1, tensors * 4, 1)
        wide_held = memory.adamw(dtype, gradients=torch.float32, master=True)
        found[WIDE] = Cost([gathers, clipping, *gradients(steps, 1, wide_size)], traffic, mine * wide_held.device)
    if not replicated:
        later = (steps - 1) * 3 * itemsize  # accumulation, here of whole gradients
        traffic = mine * (adamw_traffic(steps, itemsize) - later) + parameters * later
        more = size - mine * itemsize if steps > 1 else 0
        found[UNSHARDED] = Cost([*adamw, *gradients(1, 1)], traffic, mine * held.device + more)
    kept_in = displacement_dtype(None, steps)
    traffic, ours = nexus_traffic(steps, itemsize, kept_in.itemsize), memory.nexus_adamw(dtype, steps)
    found[SYNCHRONIZED] = Cost([*nexus, *gradients(steps, steps)], mine * traffic, mine * ours.device)
    walks = {LOCAL: kept_in} if kept_in == torch.float32 else {LOCAL: kept_in, LOCAL_F32: torch.float32}
    for method, kept_in in walks.items() if replicated or shards < ranks else ():
        of_d = kept_in.itemsize
        displacements = [
            across(1, mine * of_d, math.ceil(mine * 4 / BUCKET_BYTES)),  # buckets are of so many bytes in float32
            across(1, 8 * (9 + tensors), 1),  # two votes, Γ, Σγ², AdamW's five, who had a gradient
        ]
        scatters = within("reduce_scatter", steps, size)
        traffic = walks_traffic(steps, itemsize, of_d)
        ours = memory.nexus_adamw(dtype, steps, displacements=kept_in, local=True)
        found[method] = Cost([*nexus, scatters, *displacements], mine * traffic, mine * ours.device)
    return {
        method: cost._replace(collectives=[c for c in cost.collectives if c.ranks > 1])
        for method, cost in found.items()
    }


def ddp_buckets(size: float) -> int:
    """Returns about how many buckets DistributedDataParallel makes of `size`
    bytes: a first one of 1 MiB, then of 25.
    """
    return 1 + max(0, math.ceil((size - MIB) / (25 * MIB)))


def bytes_sent(collectives: list[Collective], across: bool | None = None) -> float:
    """Returns bytes that a rank sends; across: only between replicas (True) or within the shards of one (False)."""
    return sum(sent(c.kind, c.ranks, c.bytes) for c in collectives if across in (None, c.across))


def communication_seconds(
    collectives: list[Collective], *, network_bandwidth: float, shard_bandwidth: float, latency: float
) -> float:
    """Returns the time of collectives one after another, with nothing hidden. Bandwidths: bytes per second and rank.
    latency: seconds of each call.
    """
    return (
        bytes_sent(collectives, True) / network_bandwidth
        + bytes_sent(collectives, False) / shard_bandwidth
        + sum(c.calls for c in collectives) * latency
    )


def table(
    found: dict[str, Cost],
    *,
    parameters: float,
    inner_steps: int,
    memory_bandwidth: float,
    flops: float,
    **speeds: float,
) -> Iterator[str]:
    """Markdown, a row for each method; then where local walks are faster than synchronized ones.

    memory_bandwidth: bytes per second. flops: per second, in the backward pass. speeds: communication_seconds()'s.
    """
    optimizer = {method: cost.traffic / memory_bandwidth for method, cost in found.items()}
    yield (
        "| | sent within shards | across replicas | / AdamW's | calls | communication | through memory | optimizer "
        "| memory |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    whole = bytes_sent(found[ADAMW].collectives)
    for method, cost in found.items():
        within, across = (bytes_sent(cost.collectives, which) for which in (False, True))
        cells = (
            f"{_short(within / 1e9)} GB",
            f"{_short(across / 1e9)} GB",
            _short((within + across) / whole) if whole else "–",
            f"{sum(c.calls for c in cost.collectives):,}",
            f"{_short(communication_seconds(cost.collectives, **speeds))} s",
            f"{_short(cost.traffic / 1e9)} GB",
            f"{_short(optimizer[method] * 1e3)} ms",
            f"{_short(cost.memory / 1e9)} GB",
        )
        yield f"| {method} | {' | '.join(cells)} |"
    reductions = [c for c in found[SYNCHRONIZED].collectives if c.across]
    if not reductions:
        return
    each = communication_seconds(reductions, **speeds) / inner_steps
    yield f"\nReducing gradients across replicas takes {_short(each * 1e3)} ms, K times in a cycle; backward passes"
    yield "hide part of that. Where they are short, local walks are faster:\n"
    for method in (LOCAL, LOCAL_F32):
        if method in found:
            average = [c for c in found[method].collectives if c.across]
            longer = communication_seconds(average, **speeds) + optimizer[method] - optimizer[SYNCHRONIZED]
            tokens = (each - longer / inner_steps) * flops / (4 * parameters)
            where = f"faster below {tokens:,.0f} tokens per rank and micro-batch" if tokens >= 1 else "never faster"
            yield f"* {method}: add {_short(longer * 1e3)} ms to a cycle; {where}"


def _short(value: float) -> str:
    """Writes three digits, more before the decimal point."""
    rounded = float(f"{value:.3g}")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(rounded)))}f}" if rounded else "0"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost",
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--parameters", type=float, default=1e9, help="of the model, their number")
    add("--ranks", type=int, default=8, help="processes, one device each")
    add(
        "--shards", type=int, default=1, help="1: replicas (DDP); as many as ranks: FSDP; between: FSDP in each replica"
    )
    add("--inner-steps", type=int, default=4, help="K, micro-batches in a cycle")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and gradients")
    add("--memory-bandwidth", type=float, default=3350, help="GB/s")
    add("--network-bandwidth", type=float, default=50, help="GB/s that a rank can send")
    add("--shard-bandwidth", type=float, help="GB/s within the shards of a replica; as the network's if not given")
    add("--latency", type=float, default=20, help="microseconds of each collective, whatever its size")
    add("--flops", type=float, default=400, help="TFLOP/s of a rank in its backward passes")
    add("--blocks", type=int, default=1, help="modules under fully_shard")
    add("--tensors", type=int, default=1, help="parameters of the model, counted as tensors")
    add("--measure", action="store_true", help="compare with bytes measured on 1, 2 and 4 processes of this machine")
    add("--out", type=Path, help="write what was measured there too, as JSON")
    options = parser.parse_args(arguments)
    if options.measure:
        from . import cost_measured  # which imports this module

        cost_measured.show(options.out)
        return
    try:
        found = costs(
            parameters=options.parameters,
            ranks=options.ranks,
            inner_steps=options.inner_steps,
            dtype=getattr(torch, options.dtype),
            shards=options.shards,
            blocks=options.blocks,
            tensors=options.tensors,
        )
    except ValueError as error:
        parser.error(str(error))
    rows = table(
        found,
        parameters=options.parameters,
        flops=options.flops * 1e12,
        inner_steps=options.inner_steps,
        memory_bandwidth=options.memory_bandwidth * 1e9,
        network_bandwidth=options.network_bandwidth * 1e9,
        shard_bandwidth=(options.shard_bandwidth or options.network_bandwidth) * 1e9,
        latency=options.latency / 1e6,
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
