"""How far the loss of a point of the walk is from that of θ: the figures of docs/migrating.md.

    python docs/recipes/walk_or_theta.py    # about three minutes; downloads the demo's text where it is not there yet

Trains the demo's model with `inner_steps=K`. Before the last inner step of some cycles it evaluates the weights as they
are, and inside `outer_weights()`. Prints the mean over seeds of the difference, held-out bits per byte, and of each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nexus_fused.demo import cache_folder, data, train
from nexus_fused.demo.model import SIZES

STEPS, LR, INNER_LR = 300, 4e-3, 0.2
LOOKS = (25, 50, 100, 200, 290)  # cycles, from 0


def differences(training: data.Texts, held_out: data.Texts, seed: int) -> Iterator[float]:
    """Yield what the walk's loss is more than θ's, at each look of one run."""
    k = len(training)
    settings = train.Settings(SIZES["tiny"], "Nexus", seed, LR, INNER_LR, STEPS)
    model, optimizer = train.build(settings, k)
    batches = train.micro_batches(training, settings)

    def loss() -> float:
        return sum(train.bits_per_byte(model, held_out[name], 64, "cpu", "float32") for name in training) / k

    for cycle in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(cycle, STEPS, LR)
        for position in range(k):
            model(next(batches)[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if cycle in LOOKS and position == k - 2:
                of_walk = loss()
                with optimizer.outer_weights():
                    yield of_walk - loss()


def main() -> None:
    torch.set_num_threads(1)
    training, held_out, _ = data.load(cache_folder(), 6.0)
    by_seed = [list(differences(training, held_out, seed)) for seed in range(4)]
    for cycle, found in zip(LOOKS, zip(*by_seed, strict=True), strict=True):
        print(f"cycle {cycle:3}: {sum(found) / len(found):+.3f}   ", *(f"{value:+.3f}" for value in found), flush=True)


if __name__ == "__main__":
    main()
