"""Nexus before Muon: Muon steps the matrices of the hidden layers, AdamW the rest, and one walk serves both.

    python docs/recipes/muon.py

What to watch for:
* torch.optim.Muon takes 2-D parameters only. Embeddings, norms, biases and the output layer are AdamW's: split_matrices
  puts them there, and the output layer, which looks like any other, is named. Where it is tied to the embedding:
  head=None.
* adjust_lr_fn="match_rms_adamw" makes Muon's steps about as long as AdamW's, so that one learning rate serves both.
* Call only Nexus's step(), after every micro-batch: without accumulation, without clipping.
* A scheduler around Nexus sees the groups of both. It steps with each micro-batch, as Nexus does.
* Both scale their steps by the gradient itself, so D/Γ needs no learning rate of its own: keep those found without it.
* Keep parameters in float32, and compute in bfloat16 under autocast: of parameters in bfloat16 the model sees the steps
  of the walk only where they are not smaller than their rounding.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_fused import Nexus, split_matrices

K = 4
MICRO_BATCHES = 40 * K
SAVE_AFTER = 20 * K + 2  # in mid-cycle
WORDS, CONTEXT, DIM = 32, 4, 48


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.widen = nn.Linear(DIM, 4 * DIM)
        self.narrow = nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.narrow(self.widen(self.norm(x)).relu())
        return y


class Model(nn.Module):
    """Predicts a word from the CONTEXT before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM)
        self.mix = nn.Linear(CONTEXT * DIM, DIM)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """The mean loss, in nats, of int64 windows (batch, CONTEXT + 1)."""
        logits = self.head(self.layers(self.mix(self.words(words[:, :-1]).flatten(1))))
        return nn.functional.cross_entropy(logits, words[:, -1])


def micro_batch(index: int) -> Tensor:
    """Windows of one of K languages in turn, each with a rule of its own for the next word."""
    generator = torch.Generator().manual_seed(index)
    language = index % K
    words = [torch.randint(WORDS, (32, 1), generator=generator)]
    for _ in range(CONTEXT):
        words.append((words[-1] * (2 * language + 3) + language) % WORDS)
    return torch.cat(words, dim=1)


def build(model: Model) -> Nexus:
    matrices, rest = split_matrices(model, head=model.head)
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return Nexus(muon, adamw, inner_lr=0.05, inner_steps=K)


@torch.no_grad()
def loss_of_theta(model: Model, optimizer: Nexus) -> float:
    """The mean over the K languages, of words not trained on."""
    with optimizer.outer_weights():
        return float(torch.stack([model(micro_batch(MICRO_BATCHES + language)) for language in range(K)]).mean())


def train(path: Path, *, resume: bool = False) -> tuple[Model, Nexus, list[float]]:
    """Trains, or goes on from the checkpoint at `path`. Returns the model, its optimizer and the losses of θ."""
    torch.manual_seed(1 if resume else 0)  # what is loaded counts, not what the model began with
    model = Model()
    optimizer = build(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (MICRO_BATCHES + 1))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    done = 0
    if resume:
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = SAVE_AFTER
    losses = [loss_of_theta(model, optimizer)]
    for index in range(done, MICRO_BATCHES):
        model(micro_batch(index)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (index + 1) % (8 * K) == 0:
            losses.append(loss_of_theta(model, optimizer))
        if index + 1 == SAVE_AFTER and not resume:
            torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    return model, optimizer, losses


def main() -> None:
    torch.set_num_threads(1)  # the model is so small that threads only wait for each other
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        _, optimizer, losses = train(path)
        train(path, resume=True)
    print("loss of θ every 8 cycles:", *(f"{loss:.3f}" for loss in losses))
    print(f"alignment {optimizer.metrics()['alignment']:.2f}")


if __name__ == "__main__":
    main()
