"""NexusAdamW in a loop of your own under torchrun, with DistributedDataParallel; here two processes on a CPU.

    torchrun --nproc-per-node 2 docs/trainers/torchrun.py --precision bf16

What to watch for:
* step() after every backward(), without DDP.no_sync(): all processes take each step of the walk together, on the mean
  of their gradients, and stay equal bit for bit.
* Build the optimizer from the model that DDP wraps (or from DDP's own parameters(), which are the same).
* A scheduler stepped after each step() counts micro-batches, K to a cycle; so does GradScaler's growth_interval.
* With GradScaler (--precision fp16) leave unscale_() and clipping out: the walk is normalized whatever the scale is.
* Save from one process, anywhere in a cycle. Weights to publish are saved inside outer_weights().
"""

from __future__ import annotations

import argparse
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


def train(checkpoint: Path, *, resume: bool = False, precision: str = "fp32") -> tuple[nn.Module, NexusAdamW, float]:
    """Trains, or goes on from `checkpoint`; call it in every process. `precision` is "fp32", "bf16" or "fp16".

    Returns the model, its optimizer and the loss of θ at SAVE_AFTER micro-batches (NaN after resuming).
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = NexusAdamW(model.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=K)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=2 * K)  # a warm-up of two cycles
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
    for index in range(SAVE_AFTER if resume else 0, MICRO_BATCHES):
        x, y = micro_batch(index, dist.get_rank())
        with autocast:
            loss = nn.functional.mse_loss(ddp(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        if index + 1 == SAVE_AFTER and not resume:
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
    parser.add_argument("--out", type=Path, help="folder that receives what each process ends with")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        checkpoint = Path(folder[0]) / "checkpoint.pt"
        model, optimizer, loss = train(checkpoint, precision=args.precision)
        resumed, resumed_optimizer, _ = train(checkpoint, precision=args.precision, resume=True)
        dist.barrier()  # before the folder goes
    print(f"process {rank}: loss of θ {loss:.4f}, alignment {optimizer.metrics()['alignment']:.2f}")
    if args.out:
        ends = [(m.state_dict(), o.state_dict()) for m, o in ((model, optimizer), (resumed, resumed_optimizer))]
        torch.save({"unbroken": ends[0], "resumed": ends[1]}, args.out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
