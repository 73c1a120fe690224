"""NexusAdamW under Lightning's Trainer.

    python docs/trainers/lightning_trainer.py

What to watch for:
* inner_steps=None with Trainer(accumulate_grad_batches=K) needs nothing else: steps, schedules and checkpoints are
  AdamW's. (A batch at the end of an epoch that Lightning steps early is a shorter cycle.)
* inner_steps=K: Trainer(accumulate_grad_batches=1), the default; with more, a warning says so at the first step().
* With it, a scheduler with "interval": "step" is stepped per micro-batch: count its length in micro-batches.
* gradient_clip_val is never needed; under "16-mixed" Lightning refuses it for an optimizer that, like this one or
  torch's fused AdamW, handles the loss scale itself.
* Validation and test in mid-cycle: the callback below shows θ meanwhile.
* Checkpoints may fall anywhere in a cycle, and ckpt_path= goes on bit for bit. (After a mid-epoch checkpoint, Lightning
  does not fast-forward the data by itself: your loader has to.) In mid-cycle the saved model is a
  point of the walk; every_n_train_steps a multiple of K makes it θ, what ModelCheckpoint's best model should be.
* Where training ends in mid-cycle, the weights are a point of the walk: the callback below applies the partial cycle.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from nexus_fused import NexusAdamW

K = 4
EPOCHS, MICRO_BATCHES_PER_EPOCH = 4, 6  # so that every other epoch ends in mid-cycle


class ShowOuterWeights(lightning.Callback):
    """Validation sees θ; training then goes on where it was. A partial cycle at the end of training is applied."""

    def __init__(self) -> None:
        self._shown = contextlib.ExitStack()

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for optimizer in trainer.optimizers:  # none where trainer.validate() was called
            self._shown.enter_context(optimizer.outer_weights())

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._shown.close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._shown.close()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.outer_step()


class Regression(lightning.LightningModule):
    """inner_steps: K, or None with Trainer(accumulate_grad_batches=K)."""

    def __init__(self, inner_steps: int | None = K) -> None:
        super().__init__()
        self.inner_steps = inner_steps
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_index: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = NexusAdamW(self.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=self.inner_steps)
        length = int(self.trainer.estimated_stepping_batches)  # micro-batches, where accumulate_grad_batches is 1
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_loader(batches: int, seed: int) -> torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.randn(16 * batches, 8, generator=torch.Generator().manual_seed(seed))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())
    return torch.utils.data.DataLoader(data, batch_size=16)


def train(
    folder: str, *, resume_from: str | None = None, inner_steps: int | None = K, **options: Any
) -> lightning.Trainer:
    """Trains, or goes on from the checkpoint `resume_from`; `options` are the Trainer's. One checkpoint per epoch."""
    lightning.seed_everything(0, verbose=False)
    every_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "callbacks": [ShowOuterWeights(), every_epoch],
    }
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(default_root_dir=folder, **{**defaults, **quiet, **options})
    loaders = make_loader(MICRO_BATCHES_PER_EPOCH, seed=1), make_loader(2, seed=2)
    trainer.fit(Regression(inner_steps), *loaders, ckpt_path=resume_from)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder, precision="bf16-mixed")
        train(folder, precision="bf16-mixed", resume_from=f"{folder}/epoch=2.ckpt")  # saved in mid-cycle
    optimizer = trainer.optimizers[0]
    print(f"loss of θ {trainer.callback_metrics['val_loss']:.4f}, alignment {optimizer.metrics()['alignment']:.2f}")


if __name__ == "__main__":
    main()
