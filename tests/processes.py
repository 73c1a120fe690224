"""Runs a function on several ranks: processes of this machine, joined by gloo."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# One process imports torch, the ranks are forked from it: it has started no threads that a fork would lose.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint.state_dict",
        "torch._dynamo",  # which fully_shard imports at its first call
        "nexus_fused",
    ]
)


def on_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
    """What `function(*args)` returns on each of `n` ranks; AssertionError with the traceback of the first that fails.

    function: of a module's top level. timeout: seconds that a collective may take.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_context.Process(target=_rank, args=(i, n, folder, timeout, function, args)) for i in range(n)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(10 * timeout)
        hanging = [i for i, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        results, errors = [], [f"rank {i} hung" for i in hanging]
        for i, rank in enumerate(ranks):
            if i not in hanging:
                if rank.exitcode != 0:
                    errors.append(_read(folder, i) or f"rank {i} died with exit code {rank.exitcode}")
                elif not os.path.exists(os.path.join(folder, str(i))):
                    errors.append(f"no result of rank {i}")
                else:
                    results.append(torch.load(io.BytesIO(_read(folder, i, "rb")), weights_only=False))
        assert not errors, "\n".join(errors)
        return results


def _read(folder: str, rank: int, mode: str = "r") -> Any:
    path = os.path.join(folder, str(rank))
    if not os.path.exists(path):
        return None
    with open(path, mode) as file:
        return file.read()


def _rank(i: int, n: int, folder: str, timeout: float, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(i), WORLD_SIZE=str(n), LOCAL_RANK=str(i))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=i,
            world_size=n,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(*args)
        torch.save(result, os.path.join(folder, str(i)))
        dist.barrier()  # who leaves first would break the others' connections
    except BaseException:
        with open(os.path.join(folder, str(i)), "w") as file:
            file.write(f"on rank {i}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
