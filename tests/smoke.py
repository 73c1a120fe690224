"""Trains a small model with an installed nexus_fused: run by hand or by CI on a fresh install, not by pytest.

python tests/smoke.py [--expect-backend cpu|reference]
"""

import argparse
import sys
from pathlib import Path

import torch

import nexus_fused
from nexus_fused import NexusAdamW, backends

MICRO_BATCHES = 8  # two cycles of four inner steps


def train() -> float:
    """Runs the AdamW loop; returns the last loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    before = [p.detach().clone() for p in model.parameters()]
    opt = NexusAdamW(model.parameters(), lr=1e-2, inner_lr=1e-2, inner_steps=4)
    x = torch.randn(MICRO_BATCHES, 32, 8)
    for micro_batch in x:
        loss = (model(micro_batch) - micro_batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert torch.isfinite(loss), f"the loss is {loss.item()}"
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.isfinite(p).all(), "a weight is not finite"
        assert not torch.equal(p, old), "a weight did not change"
    return loss.item()


def openmp_runtimes() -> set[str]:
    """Paths of the libgomp copies loaded into this process (Linux only)."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split()[-1] for line in lines if "libgomp" in line}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--expect-backend", choices=["cpu", "reference"])
    expected = parser.parse_args().expect_backend

    loss = train()
    missing = backends.available()["cpu"]  # None, or the reason
    backend = "cpu" if missing is None else "reference"
    folder = Path(nexus_fused.__file__).parent
    print(f"nexus_fused {nexus_fused.__version__} from {folder}, torch {torch.__version__}")
    print(f"trained {MICRO_BATCHES} micro-batches, loss {loss:.4f}, backend {backend}")
    if missing is not None:
        print(f"the cpu backend is missing: {missing}")

    if expected not in (None, backend):
        sys.exit(f"expected backend {expected}, but {backend} ran")
    # Two OpenMP runtimes would keep two thread pools that fight for the cores.
    runtimes = openmp_runtimes()
    assert len(runtimes) <= 1, f"several OpenMP runtimes are loaded: {runtimes}"


if __name__ == "__main__":
    main()
