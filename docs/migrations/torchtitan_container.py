"""A container of optimizers as torchtitan has it, one for each part of a model, with AdamW."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful


class OptimizersContainer(Stateful):
    def __init__(self, model_parts: list[nn.Module], **kwargs: Any) -> None:
        self.model_parts = model_parts
        self.optimizers = [torch.optim.AdamW(part.parameters(), **kwargs) for part in model_parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(self.model_parts[0], self.optimizers, options=flat)


def main() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizers = OptimizersContainer([model], lr=1e-2, weight_decay=0.1)
    for _ in range(12):
        optimizers.zero_grad()
        for _ in range(4):
            x = torch.randn(16, 8)
            (nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
    assert "state.0.weight.exp_avg" in optimizers.state_dict()
    return optimizers.optimizers[0], model


if __name__ == "__main__":
    main()
