"""A Lightning module and its Trainer, with AdamW."""

import lightning
import torch
from torch import nn


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)}


def main() -> tuple[torch.optim.Optimizer, torch.nn.Module]:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(256, 8)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())
    trainer = lightning.Trainer(
        max_epochs=4, accumulate_grad_batches=4, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Regression()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    return trainer.optimizers[0], module


if __name__ == "__main__":
    main()
