"""NexusAdamW in a loop of your own under torchrun, with DistributedDataParallel; here two processes on a CPU.

    torchrun --nproc-per-node 2 docs/trainers/torchrun.py --precision bf16 --accumulate

With --accumulate (inner_steps=None) step() comes after K backward passes, as for AdamW. Each process walks on its own,
inside no_sync(), and D is averaged once in a cycle. Without it inner_steps=K, and gradients are averaged in each step.
What to watch for then:
* step() after every backward(), without DDP.no_sync(): all processes take each step of the walk together, on the mean
  of their gradients, and stay equal bit for bit.
* Build the optimizer from the model that DDP wraps (or from DDP's own parameters(), which are the same).
* A scheduler stepped after each step() counts micro-batches, K to a cycle; so does GradScaler's growth_interval.
* With GradScaler (--precision fp16) leave unscale_() and clipping out: the walk is normalized whatever the scale is.
* Save from one process, anywhere in a cycle. Weights to publish are saved inside outer_weights().
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nexus_fused import NexusAdamW

K = 4
MICRO_BATCHES = 6 * K
SAVE_AFTER = 2 * K + 2  # in mid-cycle


def micro_batch(index: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * rank + index))
    return x, x.sum(1, keepdim=True).sin()


def train(
    checkpoint: Path, *, resume: bool = False, precision: str = "fp32", accumulate: bool = False
) -> tuple[nn.Module, NexusAdamW, float]:
    """Trains, or goes on from `checkpoint`; call it in every process. `precision` is "fp32", "bf16" or "fp16".

    Returns the model, its optimizer and the loss of θ when it is saved (NaN after resuming).
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    save_after, per_step = (2 * K, K) if accumulate else (SAVE_AFTER, 1)
    optimizer = NexusAdamW(
        model.parameters(),
        lr=1e-2,
        inner_lr=0.05,
        inner_steps=None if accumulate else K,
        displacement_group=dist.group.WORLD if accumulate and dist.get_world_size() > 1 else None,
    )
    warmup = 2 * K // per_step  # two cycles
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=warmup)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
    autocast = torch.autocast(
        "cpu", torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32"
    )
    loss_of_theta = float("nan")
    for index in range(save_after if resume else 0, MICRO_BATCHES):
        x, y = micro_batch(index, dist.get_rank())
        with ddp.no_sync() if accumulate else contextlib.nullcontext():
            with autocast:
                loss = nn.functional.mse_loss(ddp(x), y)
            scaler.scale(loss).backward()
        if (index + 1) % per_step == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
        if index + 1 == save_after and not resume:
            if dist.get_rank() == 0:
                torch.save({name: part.state_dict() for name, part in stateful.items()}, checkpoint)
            dist.barrier()
            with optimizer.outer_weights(), torch.no_grad():
                x, y = micro_batch(MICRO_BATCHES, rank=0)
                loss_of_theta = float(nn.functional.mse_loss(model(x), y))
    return model, optimizer, loss_of_theta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--accumulate", action="store_true", help="inner_steps=None, a step() after K backward passes")
    parser.add_argument("--out", type=Path, help="folder that receives what each process ends with")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        checkpoint = Path(folder[0]) / "checkpoint.pt"
        options: dict[str, Any] = {"precision": args.precision, "accumulate": args.accumulate}
        model, optimizer, loss = train(checkpoint, **options)
        resumed, resumed_optimizer, _ = train(checkpoint, resume=True, **options)
        dist.barrier()  # before the folder goes
    print(f"process {rank}: loss of θ {loss:.4f}, alignment {optimizer.metrics()['alignment']:.2f}")
    if args.out:
        ends = [(m.state_dict(), o.state_dict()) for m, o in ((model, optimizer), (resumed, resumed_optimizer))]
        torch.save({"unbroken": ends[0], "resumed": ends[1]}, args.out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
