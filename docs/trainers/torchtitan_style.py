"""NexusAdamW the way torchtitan builds, steps and saves optimizers. torchtitan itself is not used here.

    python docs/trainers/torchtitan_style.py

torchtitan hands the parts of a model to a container that builds an optimizer for each, steps them together (without a
closure, after clipping) and gives torch.distributed.checkpoint one flat state, named after the parameters. In
torchtitan itself, subclass its OptimizersContainer so that the name "NexusAdamW" leads to the class.

What to watch for:
* One optimizer must see the whole model, since the walk's norm is one over all parameters: a pipeline's parts are
  refused here.
* inner_steps=None where training.global_batch_size is more than local_batch_size times the data-parallel degree, so
  that torchtitan accumulates. Its steps are cycles then.
* With inner_steps=K the two are equal, and its steps are micro-batches: training.steps, warmup, checkpoint and
  validation intervals, K to a cycle.
* training.max_norm clips: harmless, and wasted.
* A distributed checkpoint fills only what the state holds already: before loading one of mid-cycle, call
  materialize_displacements(), see `load`. Without it loading raises an error that says so. Intervals that are
  multiples of K need nothing.
* Validation in mid-cycle belongs inside outer_weights().
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from nexus_fused import NexusAdamW

K = 4
MICRO_BATCHES = 6 * K
SAVE_AFTER = 2 * K + 2  # in mid-cycle
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer(Stateful):
    """All optimizers of a model, here always one, with the methods that torchtitan's loop and checkpointer call."""

    def __init__(self, model_parts: list[nn.Module], optimizer: Callable[..., NexusAdamW], **kwargs: Any) -> None:
        if len(model_parts) > 1:
            raise ValueError("NexusAdamW takes one norm over the whole model: pipeline parallelism is not supported")
        self.model = model_parts[0]
        self.optimizers = [optimizer(self.model.parameters(), **kwargs)]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizers, options=FLAT)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizers, state_dict, options=FLAT)


class ModelState(Stateful):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict)


def build_optimizers(model_parts: list[nn.Module], **kwargs: Any) -> OptimizersContainer:
    return OptimizersContainer(model_parts, NexusAdamW, **kwargs)


def micro_batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(index))
    return x, x.sum(1, keepdim=True).sin()


def train(
    folder: str, *, resume: bool = False, save_after: int = SAVE_AFTER, inner_steps: int | None = K
) -> tuple[nn.Module, NexusAdamW, float]:
    """Trains, or goes on from the checkpoint in `folder`.

    inner_steps: K, or None, as where torchtitan accumulates: a global_batch_size of K times what one pass takes.
    Returns the model, its optimizer and the loss of θ at `save_after` micro-batches (NaN after resuming).
    """
    torch.manual_seed(1 if resume else 0)  # what is loaded counts, not what the model began with
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizers = build_optimizers([model], lr=1e-2, inner_lr=0.05, inner_steps=inner_steps)
    per_step = K if inner_steps is None else 1
    nexus = optimizers.optimizers[0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(nexus, lambda step: 1 - step * per_step / (MICRO_BATCHES + 1))
    states = {"model": ModelState(model), "optimizer": optimizers, "lr_scheduler": scheduler}
    if resume:
        load(states, nexus, folder)
    loss_of_theta = float("nan")
    for index in range(save_after if resume else 0, MICRO_BATCHES):
        if index % per_step == 0:
            optimizers.zero_grad()
        x, y = micro_batch(index)
        nn.functional.mse_loss(model(x), y).backward()
        if (index + 1) % per_step == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # torchtitan's; changes nothing
            optimizers.step()
            scheduler.step()
        if index + 1 == save_after and not resume:
            dcp.save(states, checkpoint_id=folder)
            with nexus.outer_weights(), torch.no_grad():
                x, y = micro_batch(MICRO_BATCHES)
                loss_of_theta = float(nn.functional.mse_loss(model(x), y))
    return model, nexus, loss_of_theta


def load(states: dict[str, Any], nexus: NexusAdamW, folder: str) -> None:
    """Loads a checkpoint of any position; those of mid-cycle hold displacements."""
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if any(key.endswith(".displacement") for key in saved):
        nexus.materialize_displacements()
    dcp.load(states, checkpoint_id=folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, nexus, loss = train(folder)
        train(folder, resume=True)
    print(f"loss of θ {loss:.4f}, alignment {nexus.metrics()['alignment']:.2f}")


if __name__ == "__main__":
    main()
