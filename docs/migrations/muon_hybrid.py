"""A loop with two optimizers that step one after the other, as Muon hybrids have it."""

import torch
from torch import nn


def main() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    matrices = [model[2].weight]
    others = [p for p in model.parameters() if p is not matrices[0]]
    adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(matrices, lr=1e-2)
    optimizers = [adamw, muon]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    for step in range(12):
        for _ in range(4):
            x = torch.randn(16, 8)
            (nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()) / 4).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / 12)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return optimizers[0], model


if __name__ == "__main__":
    main()
