"""A loop under Lightning Fabric, which accumulates gradients, with AdamW."""

import torch
from lightning.fabric import Fabric
from torch import nn


def main() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model, optimizer = fabric.setup(model, optimizer)
    for _ in range(12):
        for _ in range(4):
            x = torch.randn(16, 8)
            fabric.backward(nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()) / 4)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, model


if __name__ == "__main__":
    main()
