"""What a cycle costs, from a few numbers: `python -m bench.cost --parameters 70e9 --ranks 1024 ...`.

Bytes that a rank sends, bytes through its memory, time by the bandwidths given, and memory: of AdamW (accumulation
without reductions as far as that goes, clipping, step), Nexus that reduces the gradients of each micro-batch, and Nexus
whose ranks walk on their own (`displacement_group`). `--measure` checks the bytes on 1, 2 and 4 processes (gloo), with
DistributedDataParallel, FSDP2 and both: no times, so other load on the machine does not matter. docs/cost.md explains.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_fused import NexusAdamW
from nexus_fused.flat import BUCKET_BYTES

from .__main__ import started, write

ADAMW, WIDE, UNSHARDED = "AdamW", "AdamW, float32 gradients", "AdamW, accumulates unsharded"
SYNCHRONIZED, LOCAL, LOCAL_BF16 = "Nexus, synchronized", "Nexus, local walks", "Nexus, local walks in bfloat16"

MIB = 2**20


class Collective(NamedTuple):
    """What one kind of collective does in a cycle.

    kind: "all_reduce", "all_gather" or "reduce_scatter". across: between replicas, not within the shards of one. ranks:
    in a group. bytes: of the whole tensors, as each rank has them before or after. calls: how many.
    """

    kind: str
    across: bool
    ranks: int
    bytes: float
    calls: int


class Cost(NamedTuple):
    """Of one rank, in a cycle. traffic: bytes that the optimizer reads and writes. memory: bytes of weights, gradients
    and state at the peak, without activations."""

    collectives: list[Collective]
    traffic: float
    memory: float


# The model


def sent(kind: str, ranks: int, size: float) -> float:
    """Bytes that each of `ranks` sends in a ring for a tensor of `size` bytes: reducing and gathering are one round
    each, in which everything but a rank's own part passes by."""
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * (ranks - 1) / ranks * size


def adamw_traffic(inner_steps: int, itemsize: int, wide: bool = False) -> int:
    """Bytes per parameter and cycle: K-1 accumulations in place, the norm, scaling, and the step.

    wide: gradients of `itemsize` bytes are accumulated in float32, in a buffer that the first one initializes.
    """
    if wide:
        accumulation = (itemsize + 4) + (inner_steps - 1) * (itemsize + 8)
        return accumulation + 12 + 30
    return (inner_steps - 1) * 3 * itemsize + 3 * itemsize + 28


def nexus_traffic(inner_steps: int, itemsize: int) -> int:
    """Bytes per parameter and cycle: K norms, K-1 inner steps, and the last one fused with AdamW's."""
    if inner_steps == 1:  # no walk to write or read
        return itemsize + 28
    return inner_steps * itemsize + _walk_traffic(inner_steps, itemsize) + 32


def walks_traffic(inner_steps: int, itemsize: int, reduced: int) -> int:
    """Bytes per parameter and cycle where the last inner step leaves D, in `reduced` bytes, for AdamW to read.

    What the all-reduce reads and writes between the two is the communication library's.
    """
    walk = 4 if itemsize == 4 or inner_steps > 1 else 0  # of float32: the anchor, which K = 1 writes instead
    read = 4 + itemsize if itemsize < 4 else 8  # θ and the gradient
    displace = read + walk + reduced
    outer = 12 + reduced + (12 if itemsize == 4 else 12 + itemsize)  # θ m v D -> θ m v, and the mirror of a master
    return inner_steps * itemsize + _walk_traffic(inner_steps, itemsize) + displace + outer


def _walk_traffic(inner_steps: int, itemsize: int) -> int:
    """The inner steps but for the last. float32: w g -> w, the first one saves an anchor. Below: master or walk, g ->
    walk, and the parameter mirrors it."""
    first = 16 if itemsize == 4 else 8 + 2 * itemsize
    middle = 12 if itemsize == 4 else 8 + 2 * itemsize
    return first + (inner_steps - 2) * middle if inner_steps > 1 else 0


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
    gradients, torch.float32, or torch.bfloat16 with a float32 master. ValueError for numbers that do not fit together.
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
    found = {ADAMW: Cost([*adamw, *gradients(steps, 1)], mine * adamw_traffic(steps, itemsize), mine * 16)}
    if narrow:
        traffic = mine * adamw_traffic(steps, itemsize, wide=True)
        clipping = within("all_reduce", 1, tensors * 4, 1)
        found[WIDE] = Cost([gathers, clipping, *gradients(steps, 1, wide_size)], traffic, mine * 18)
    if not replicated:
        later = (steps - 1) * 3 * itemsize  # accumulation, here of whole gradients
        traffic = mine * (adamw_traffic(steps, itemsize) - later) + parameters * later
        memory = mine * (16 - itemsize) + (size if steps > 1 else mine * itemsize)
        found[UNSHARDED] = Cost([*adamw, *gradients(1, 1)], traffic, memory)
    found[SYNCHRONIZED] = Cost([*nexus, *gradients(steps, steps)], mine * nexus_traffic(steps, itemsize), mine * 20)
    for method, reduced in {LOCAL: 4, LOCAL_BF16: 2}.items():
        if shards == ranks > 1 or (reduced < 4 and not narrow):
            continue
        flat = replicated or reduced > itemsize  # else D takes the place of shards, which stay where FSDP2 put them
        calls = math.ceil(parameters * reduced / shards / BUCKET_BYTES) if flat else tensors
        displacement = [across(1, mine * reduced, calls), across(1, 8 * (2 + tensors), 1)]
        scatters = within("reduce_scatter", steps, size)
        traffic = mine * walks_traffic(steps, itemsize, reduced)
        found[method] = Cost([*nexus, scatters, *displacement], traffic, mine * 20)
    return {
        method: cost._replace(collectives=[c for c in cost.collectives if c.ranks > 1])
        for method, cost in found.items()
    }


def ddp_buckets(size: float) -> int:
    """About how many buckets DistributedDataParallel makes of `size` bytes: a first one of 1 MiB, then of 25."""
    return 1 + max(0, math.ceil((size - MIB) / (25 * MIB)))


def bytes_sent(collectives: list[Collective], across: bool | None = None) -> float:
    """Bytes that a rank sends; across: only between replicas (True) or within the shards of one (False)."""
    return sum(sent(c.kind, c.ranks, c.bytes) for c in collectives if across in (None, c.across))


def communication_seconds(
    collectives: list[Collective], *, network_bandwidth: float, shard_bandwidth: float, latency: float
) -> float:
    """One after another, nothing hidden. Bandwidths: bytes per second and rank. latency: seconds of each call."""
    return (
        bytes_sent(collectives, True) / network_bandwidth
        + bytes_sent(collectives, False) / shard_bandwidth
        + sum(c.calls for c in collectives) * latency
    )


def table(found: dict[str, Cost], *, inner_steps: int, memory_bandwidth: float, **speeds: float) -> Iterator[str]:
    """Markdown, a row for each method; then how far reductions must hide for local walks not to pay.

    memory_bandwidth: bytes per second. speeds: communication_seconds()'s.
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
    per_step = communication_seconds(reductions, **speeds) / inner_steps
    for method in (LOCAL, LOCAL_BF16):
        if reductions and method in found:
            average = [c for c in found[method].collectives if c.across]
            seconds = communication_seconds(average, **speeds)
            hidden = per_step - (seconds + optimizer[method] - optimizer[SYNCHRONIZED]) / inner_steps
            yield (
                f"\n{method}: faster than synchronized unless backward passes hide more than {_short(hidden * 1e3)} of "
                f"the {_short(per_step * 1e3)} ms that each one's reduction across replicas takes"
                if hidden > 0
                else f"\n{method}: slower than synchronized"
            )


def _short(value: float) -> str:
    """Three digits, more before the decimal point."""
    return "0" if value == 0 else f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


# The measurement

WIDTH, LAYERS = 512, 4  # sizes that shards divide and that fill flat memory without gaps
INNER_STEPS = 3
RANKS = (1, 2, 4)


class CountedCollectives(TorchDispatchMode):
    """Counts what is given to collectives inside the block, by kind and number of ranks: [bytes, calls].

    All of them pass PyTorch's dispatcher, the ones that DDP's reducer starts in C++ too. One this class does not know
    is counted under its own name. Those of one rank, which send nothing, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor's own rules turn it into operations that come back here
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            ranks = max(_ranks_of(value) for value in args)
            if ranks > 1:
                name = func._schema.name.partition("::")[2]
                kinds = {"reduce_scatter": "reduce_scatter", "reduce": "all_reduce", "gather": "all_gather"}
                kind = next((kind for part, kind in kinds.items() if part in name), name)
                count = self.found[kind, ranks]
                count[0] += max(_bytes_of(value) for value in (*args, result))
                count[1] += 1
        return result


def _ranks_of(value: Any) -> int:
    """How many a process group has, or one that is given by its name; 0 for other arguments."""
    if isinstance(value, torch.ScriptObject) and value._type().name() == "ProcessGroup":
        return dist.ProcessGroup.unbox(value).size()
    if isinstance(value, str) and value in {group.group_name for group in dist.distributed_c10d._world.pg_map}:
        return dist.distributed_c10d._resolve_process_group(value).size()
    return 0


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0


def written() -> int | None:
    """Bytes that this process has written, to sockets too, as its kernel counts them; None where it does not tell."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar")), None)


def live() -> int:
    """Bytes in the memory of all tensors that were made since `gc.freeze()`, each counted once."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not issubclass(type(t), DTensor)]
    storages = [t.untyped_storage() for t in found]
    end, total = 0, 0
    for start, stop in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


class Measured(NamedTuple):
    """Of one cycle on one rank, in bytes. collectives: [bytes, calls] by kind and ranks. sent: with gloo's messages
    about messages; None where the kernel does not tell. memory: at the peak, of tensors, without what gathers one block
    after another; None for torch's AdamW below float32, which has no master."""

    collectives: dict[tuple[str, int], list[float]]
    sent: int | None
    memory: int | None


def measure(layouts: list[tuple[int, torch.dtype]]) -> list[dict[str, Measured]]:
    """What each method does in a cycle, for each number of shards and dtype; called on each rank.

    Leaves what exists to `gc.freeze()`, so as to look at the tensors of one method only.
    """
    ranks = dist.get_world_size()
    return [
        {method: _measure(method, shards, dtype) for method in modelled(ranks, shards, dtype)}
        for shards, dtype in layouts
    ]


def modelled(ranks: int, shards: int, dtype: torch.dtype) -> dict[str, Cost]:
    """What `measure` should find."""
    sizes = {"parameters": LAYERS * WIDTH**2, "blocks": LAYERS, "tensors": LAYERS}
    return costs(ranks=ranks, shards=shards, dtype=dtype, inner_steps=INNER_STEPS, **sizes)


def by_kind(collectives: list[Collective]) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0])
    for c in collectives:
        found[c.kind, c.ranks][0] += c.bytes
        found[c.kind, c.ranks][1] += c.calls
    return dict(found)


def compared(run: Callable[..., list[Any]]) -> Iterator[dict[str, Any]]:
    """Model beside measurement: a row for each number of ranks, layout, dtype and method.

    run: calls a function with arguments on a number of ranks, and returns what it has returned on each.
    """
    for ranks in RANKS:
        layouts = [(n, dtype) for n in RANKS if n <= ranks for dtype in (torch.float32, torch.bfloat16)]
        results = run(ranks, measure, layouts)
        for i, (shards, dtype) in enumerate(layouts):
            for method, cost in modelled(ranks, shards, dtype).items():
                model = Measured(by_kind(cost.collectives), round(sent_by_gloo(cost.collectives)), round(cost.memory))
                yield {
                    "ranks": ranks,
                    "shards": shards,
                    "dtype": str(dtype).removeprefix("torch."),
                    "method": method,
                    "model": model,
                    "measured": [result[i][method] for result in results],
                }


def sent_by_gloo(collectives: list[Collective]) -> float:
    """Bytes: gloo reduces the whole tensor on all ranks where only parts are asked for."""
    kinds = {"reduce_scatter": "all_reduce"}
    return sum(sent(kinds.get(c.kind, c.kind), c.ranks, c.bytes) for c in collectives)


def _measure(method: str, shards: int, dtype: torch.dtype) -> Measured:
    gc.collect()
    gc.freeze()
    model, optimizer = _training(method, shards, dtype)
    micro_batch = torch.ones(1, WIDTH, dtype=next(model.parameters()).dtype)
    most = 0

    def cycle() -> None:
        nonlocal most
        for k in range(INNER_STEPS):
            last = k == INNER_STEPS - 1
            with _reducing(model, method, last):
                model(micro_batch).sum().backward()
            most = max(most, live())
            if isinstance(optimizer, NexusAdamW) or last:
                if not isinstance(optimizer, NexusAdamW):
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                # Else DDP, which looks for gradients in its buckets, would not find them there in no_sync(), and copy.
                optimizer.zero_grad(set_to_none=isinstance(optimizer, NexusAdamW) or shards > 1)

    cycle()
    cycle()  # DDP has its final buckets now
    dist.barrier()
    start = written()
    with CountedCollectives() as counted:
        cycle()
    end = written()
    has_master = isinstance(optimizer, NexusAdamW) or dtype == torch.float32
    return Measured(
        dict(counted.found),
        None if start is None or end is None else end - start,
        most if has_master else None,
    )


def _training(method: str, shards: int, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    replicas, walks = dist.get_world_size() // shards, method in (LOCAL, LOCAL_BF16)
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if method != WIDE:  # which has float32 weights, gathered or computed with in bfloat16
        model.to(dtype)
    if shards > 1:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if method == WIDE else MixedPrecisionPolicy()
        for module in (*model, model):
            over = mesh["shard"] if walks or replicas == 1 else mesh
            fully_shard(module, mesh=over, reshard_after_forward=True, mp_policy=policy)
    elif not walks:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    params = list(model.parameters())
    if method in (ADAMW, WIDE, UNSHARDED):
        return model, torch.optim.AdamW(params)
    options: dict[str, Any] = {"displacement_group": mesh["replicate"].get_group()} if walks else {}
    if method == LOCAL_BF16:
        options["displacement_dtype"] = torch.bfloat16
    return model, NexusAdamW(params, inner_steps=INNER_STEPS, **options)


def _reducing(model: nn.Module, method: str, last: bool) -> contextlib.AbstractContextManager[None]:
    """What AdamW puts off to the last micro-batch."""
    if method in (ADAMW, WIDE, UNSHARDED):
        if isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext() if last else model.no_sync()
        assert isinstance(model, FSDPModule)
        (model.set_requires_gradient_sync if method == UNSHARDED else model.set_requires_all_reduce)(last)
    return contextlib.nullcontext()


def figures(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the most ranks, as replicas: measured bytes and memory of local walks, as a multiple of others'."""
    found = {
        (row["dtype"], row["method"]): row["measured"][0]
        for row in rows
        if row["ranks"] == RANKS[-1] and row["shards"] == 1
    }
    made = {}
    for name, dtype, method, base in (
        ("float32: bytes of a cycle, local walks / AdamW's", "float32", LOCAL, ADAMW),
        ("float32: bytes of a cycle, local walks / synchronized", "float32", LOCAL, SYNCHRONIZED),
        ("bfloat16: bytes of a cycle, local walks / AdamW's", "bfloat16", LOCAL, ADAMW),
        ("bfloat16: bytes of a cycle, local walks in bfloat16 / AdamW's", "bfloat16", LOCAL_BF16, ADAMW),
        ("bfloat16: bytes of a cycle, local walks / AdamW's, float32 gradients", "bfloat16", LOCAL, WIDE),
    ):
        given = [sum(size for size, _ in found[dtype, m].collectives.values()) for m in (method, base)]
        made[name] = {"value": given[0] / given[1]}
    for dtype, method in (("float32", LOCAL), ("bfloat16", LOCAL), ("bfloat16", LOCAL_BF16)):
        more = found[dtype, method].memory - found[dtype, SYNCHRONIZED].memory
        made[f"{dtype}: bytes per parameter that {method.partition(', ')[2]} hold beside synchronized"] = {
            "value": more / (LAYERS * WIDTH**2)
        }
    return made


def _measured_and_shown(out: Path | None) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from processes import on_ranks

    result = started(argparse.Namespace(threads=1, rounds=1))
    rows = []
    title = f"one cycle, K = {INNER_STEPS}, {LAYERS * WIDTH**2:,} parameters, gloo"
    print(f"\n{title}: model, measured\n{'ranks, shards, dtype, method':58}{'given':>24}{'sent':>24}{'memory':>24}")
    for row in compared(on_ranks):
        model, measured = row["model"], row["measured"]
        shown = f"{row['ranks']} {row['shards']} {row['dtype']:9} {row['method']}"
        given = [sum(size for size, _ in m.collectives.values()) for m in (model, measured[0])]
        sides = (given, (model.sent, measured[0].sent), (model.memory, measured[0].memory))
        cells = "".join(f"{a:12,.0f}" + (f"{b:12,.0f}" if b is not None else f"{'–':>12}") for a, b in sides)
        agree = all(m.collectives == model.collectives for m in measured)
        print(f"{shown:58}{cells}{'' if agree else '  COLLECTIVES DIFFER'}")
        rows.append(row)
    result["figures"] = figures(rows)
    for name, figure in result["figures"].items():
        print(f"  {name}: {figure['value']:.4f}")
    for row in rows:
        row["model"], row["measured"] = _as_json(row["model"]), [_as_json(m) for m in row["measured"]]
    result["sections"].append({"title": title, "rows": rows})
    write(result, out)


def _as_json(measured: Measured) -> dict[str, Any]:
    collectives = {
        f"{kind} over {ranks}": {"bytes": size, "calls": calls}
        for (kind, ranks), (size, calls) in sorted(measured.collectives.items())
    }
    return {**measured._asdict(), "collectives": collectives}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--parameters", type=float, default=1e9)
    add("--ranks", type=int, default=8)
    add(
        "--shards", type=int, default=1, help="1: replicas (DDP); as many as ranks: FSDP; between: FSDP in each replica"
    )
    add("--inner-steps", type=int, default=4, help="K, micro-batches in a cycle")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters; bfloat16 with a master")
    add("--memory-bandwidth", type=float, default=3350, help="GB/s")
    add("--network-bandwidth", type=float, default=50, help="GB/s that a rank can send")
    add("--shard-bandwidth", type=float, help="GB/s within the shards of a replica; as the network's if not given")
    add("--latency", type=float, default=20, help="microseconds of each collective, whatever its size")
    add("--blocks", type=int, default=1, help="modules under fully_shard")
    add("--tensors", type=int, default=1, help="parameters of the model, counted as tensors")
    add("--measure", action="store_true", help="compare with bytes measured on 1, 2 and 4 processes of this machine")
    add("--out", type=Path, help="write what was measured there too, as JSON")
    options = parser.parse_args(arguments)
    if options.measure:
        _measured_and_shown(options.out)
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
        inner_steps=options.inner_steps,
        memory_bandwidth=options.memory_bandwidth * 1e9,
        network_bandwidth=options.network_bandwidth * 1e9,
        shard_bandwidth=(options.shard_bandwidth or options.network_bandwidth) * 1e9,
        latency=options.latency / 1e6,
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
