"""NexusAdamW under Lightning Fabric.

    python docs/trainers/lightning_fabric.py

What to watch for:
* The loop is yours: with inner_steps=K call step() after every backward(), with None after the last of several. Use
  fabric.no_backward_sync() in neither.
* fabric.setup() wraps the optimizer and passes everything on: outer_weights(), outer_step() and metrics() work.
* fabric.save() and fabric.load() may fall anywhere in a cycle. They hold what you put into the state: a scheduler, and
  under "16-mixed" the GradScaler, which you then hand over in MixedPrecision(..., scaler=...).
* fabric.clip_gradients() is never needed; under "16-mixed" Fabric refuses it for an optimizer that, like this one or
  torch's fused AdamW, handles the loss scale itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from nexus_fused import NexusAdamW

K = 4
MICRO_BATCHES = 6 * K
SAVE_AFTER = 2 * K + 2  # in mid-cycle


def micro_batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(index))
    return x, x.sum(1, keepdim=True).sin()


def train(
    folder: str, *, resume: bool = False, inner_steps: int | None = K, **options: Any
) -> tuple[nn.Module, NexusAdamW, float]:
    """Trains, or goes on from the checkpoint in `folder`; `options` (precision, plugins) are Fabric's.

    inner_steps: K, a step() after each micro-batch, or None, the loop that accumulates K of them.
    Returns the model, its optimizer and the loss of θ at SAVE_AFTER micro-batches (NaN after resuming).
    """
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    fabric.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    nexus = NexusAdamW(model.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=inner_steps)
    per_step = K if inner_steps is None else 1
    steps = MICRO_BATCHES // per_step
    scheduler = torch.optim.lr_scheduler.OneCycleLR(nexus, max_lr=1e-2, total_steps=steps, cycle_momentum=False)
    model, optimizer = fabric.setup(model, nexus)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "done": 0}
    if resume:
        fabric.load(Path(folder) / "fabric.ckpt", state)
    loss_of_theta = float("nan")
    for index in range(state["done"], MICRO_BATCHES):
        x, y = micro_batch(index)
        fabric.backward(nn.functional.mse_loss(model(x), y))
        if (index + 1) % per_step == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        state["done"] = index + 1
        if index + 1 == SAVE_AFTER and not resume:
            fabric.save(Path(folder) / "fabric.ckpt", state)
            with optimizer.outer_weights(), torch.no_grad():
                x, y = micro_batch(MICRO_BATCHES)
                loss_of_theta = float(nn.functional.mse_loss(model(x), y))
    return model, nexus, loss_of_theta


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, nexus, loss = train(folder, precision="bf16-mixed")
        train(folder, precision="bf16-mixed", resume=True)
    print(f"loss of θ {loss:.4f}, alignment {nexus.metrics()['alignment']:.2f}")


if __name__ == "__main__":
    main()
