"""A loop under torchrun with DistributedDataParallel, which reduces every backward pass, with AdamW."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(12):
        for _ in range(4):
            x = torch.randn(16, 8, generator=generator)
            (nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, model


if __name__ == "__main__":
    main()
