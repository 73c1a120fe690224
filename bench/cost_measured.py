"""What a cycle really sends and holds: bench.cost's model beside bytes counted on 1, 2 and 4 processes (gloo).

No times, so other load on the machine does not matter: `python -m bench.cost --measure [--out FILE]`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_fused import NexusAdamW

from .__main__ import started, write
from .cost import ADAMW, LOCAL, LOCAL_F32, SYNCHRONIZED, UNSHARDED, WIDE, Cost, costs, sent

WIDTH, LAYERS = 512, 2  # sizes that shards divide and that fill flat memory without gaps
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
    """Bytes in the memory of all tensors that were made since `gc.freeze()`, each counted once.

    To be called under a TorchDispatchMode: all tensors then have Python objects, which the garbage collector finds. The
    least of some looks, since gloo's threads let go of a collective's tensor some time after it is done.
    """
    looks = []
    for _ in range(4):
        time.sleep(0.01)
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not issubclass(type(t), DTensor)]
        storages = [t.untyped_storage() for t in found]
        end, total = 0, 0
        for start, stop in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        looks.append(total)
        del found, storages
    return min(looks)


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


def as_measured(cost: Cost) -> Measured:
    """What a measurement of this cost should find with gloo, which reduces the whole tensor on all ranks where only
    parts are asked for."""
    collectives: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0])
    by_gloo = 0.0
    for c in cost.collectives:
        collectives[c.kind, c.ranks][0] += c.bytes
        collectives[c.kind, c.ranks][1] += c.calls
        by_gloo += sent("all_reduce" if c.kind == "reduce_scatter" else c.kind, c.ranks, c.bytes)
    return Measured(dict(collectives), round(by_gloo), round(cost.memory))


def compared() -> Iterator[dict[str, Any]]:
    """Model beside measurement: a row for each number of ranks, layout, dtype and method.

    equal: whether collectives are the model's on all ranks. measured: of rank 0; sent and memory the most of all ranks.
    """
    for ranks in RANKS:
        layouts = [(n, dtype) for n in RANKS if n <= ranks for dtype in (torch.float32, torch.bfloat16)]
        results = on_ranks(ranks, measure, layouts)
        for i, (shards, dtype) in enumerate(layouts):
            for method, cost in modelled(ranks, shards, dtype).items():
                model = as_measured(cost)
                measured: list[Measured] = [result[i][method] for result in results]
                yield {
                    "ranks": ranks,
                    "shards": shards,
                    "dtype": str(dtype).removeprefix("torch."),
                    "method": method,
                    "model": model,
                    "measured": Measured(
                        measured[0].collectives,
                        _most([m.sent for m in measured]),
                        _most([m.memory for m in measured]),
                    ),
                    "equal": all(m.collectives == model.collectives for m in measured),
                }


def _most(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _measure(method: str, shards: int, dtype: torch.dtype) -> Measured:
    gc.collect()
    gc.freeze()
    with CountedCollectives() as counted:
        model, optimizer = _training(method, shards, dtype)
        for _ in range(2 if shards == 1 else 1):  # then there is all state, and DDP has its final buckets
            _cycle(model, optimizer, method)
        dist.barrier()
        counted.found.clear()
        start = written()
        memory = _cycle(model, optimizer, method)
        end = written()
    has_master = isinstance(optimizer, NexusAdamW) or dtype == torch.float32
    return Measured(
        dict(counted.found),
        None if start is None or end is None else end - start,
        memory if has_master else None,
    )


def _cycle(model: nn.Module, optimizer: torch.optim.Optimizer, method: str) -> int:
    """Trains; returns the most bytes that were alive after a backward pass."""
    ours, most = isinstance(optimizer, NexusAdamW), 0
    micro_batch = torch.ones(1, WIDTH, dtype=next(model.parameters()).dtype)
    for k in range(INNER_STEPS):
        last = k == INNER_STEPS - 1
        with _reducing(model, method, last):
            model(micro_batch).sum().backward()
        most = max(most, live())
        if ours or last:
            if not ours:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            # Else DDP, which looks for gradients in its buckets, would not find them there in no_sync(), and copy them.
            in_buckets = isinstance(model, DistributedDataParallel) and not ours
            optimizer.zero_grad(set_to_none=not in_buckets)
    return most


def _training(method: str, shards: int, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    replicas, walks = dist.get_world_size() // shards, method in (LOCAL, LOCAL_F32)
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
    if method == LOCAL_F32:
        options["displacement_dtype"] = torch.float32
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
        (row["dtype"], row["method"]): row["measured"]
        for row in rows
        if row["ranks"] == RANKS[-1] and row["shards"] == 1
    }
    made = {}
    for name, dtype, method, base in (
        ("float32: bytes of a cycle, local walks / AdamW's", "float32", LOCAL, ADAMW),
        ("float32: bytes of a cycle, local walks / synchronized", "float32", LOCAL, SYNCHRONIZED),
        ("float32: bytes of a cycle, local walks, D in float32 / AdamW's", "float32", LOCAL_F32, ADAMW),
        ("bfloat16: bytes of a cycle, local walks / AdamW's", "bfloat16", LOCAL, ADAMW),
        ("bfloat16: bytes of a cycle, local walks, D in float32 / AdamW's", "bfloat16", LOCAL_F32, ADAMW),
        ("bfloat16: bytes of a cycle, local walks / AdamW's, float32 gradients", "bfloat16", LOCAL, WIDE),
    ):
        given = [sum(size for size, _ in found[dtype, m].collectives.values()) for m in (method, base)]
        made[name] = {"value": given[0] / given[1]}
    for dtype in ("float32", "bfloat16"):
        more = found[dtype, LOCAL].memory - found[dtype, SYNCHRONIZED].memory
        made[f"{dtype}: bytes per parameter that local walks hold beside synchronized"] = {
            "value": more / (LAYERS * WIDTH**2)
        }
    return made


def show(out: Path | None) -> None:
    result = started(argparse.Namespace(threads=1, rounds=1))
    rows = []
    title = f"one cycle, K = {INNER_STEPS}, {LAYERS * WIDTH**2:,} parameters, gloo"
    print(f"\n{title}: model, measured\n{'ranks, shards, dtype, method':58}{'given':>24}{'sent':>24}{'memory':>24}")
    for row in compared():
        model, measured = row["model"], row["measured"]
        shown = f"{row['ranks']} {row['shards']} {row['dtype']:9} {row['method']}"
        given = [sum(size for size, _ in m.collectives.values()) for m in (model, measured)]
        sides = (given, (model.sent, measured.sent), (model.memory, measured.memory))
        cells = "".join(f"{a:12,.0f}" + (f"{b:12,.0f}" if b is not None else f"{'–':>12}") for a, b in sides)
        print(f"{shown:58}{cells}{'' if row['equal'] else '  COLLECTIVES DIFFER'}")
        rows.append(row)
    result["figures"] = figures(rows)
    for name, figure in result["figures"].items():
        print(f"  {name}: {figure['value']:.4f}")
    for row in rows:
        row.update(model=as_json(row["model"]), measured=as_json(row["measured"]))
    result["sections"].append({"title": title, "rows": rows})
    write(result, out)


def as_json(measured: Measured) -> dict[str, Any]:
    collectives = {
        f"{kind} over {ranks}": {"bytes": size, "calls": calls}
        for (kind, ranks), (size, calls) in sorted(measured.collectives.items())
    }
    return {**measured._asdict(), "collectives": collectives}
