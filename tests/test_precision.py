"""How exact a walk is: G against sums in float64, and θ after a walk against θ before."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, exact
from torch import nn

from nexus_fused import NexusAdamW

N = 200_000
EXACT = [name for name in BACKENDS if name not in ("triton", "cuda")]  # equal to these bit for bit: test_parity.py


def heavy_tailed(seed):
    """Gradients of which few elements hold most of the norm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, generator=generator) * torch.exp(1.5 * torch.randn(N, generator=generator))


def weights(size, dtype):
    generator = torch.Generator().manual_seed(9)
    return nn.Parameter((size * (1 + 0.5 * torch.randn(N, generator=generator))).to(dtype))


def walk(param, *, step, steps=4, kept=None, backend="cpu", **options):
    """One cycle whose inner steps move an element by `step` (root mean square); returns G, D/Γ, and its exact value."""
    inner_lr = step * N**0.5
    options = {"betas": (0.0, 0.999), "inner_lr": inner_lr, "inner_steps": steps, **options}  # exp_avg is G
    optimizer = NexusAdamW([param], displacement_dtype=kept, backend=backend, **options)
    total, largest = torch.zeros(N, dtype=torch.float64), torch.zeros(N)
    for k in range(steps):
        param.grad = heavy_tailed(k).to(param.dtype)
        total += param.grad.double() / param.grad.double().norm()
        largest = largest.maximum((inner_lr * total).abs().float())
        optimizer.step()
    return optimizer, total / steps, largest


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("size", [0.02, 1.0])
@pytest.mark.parametrize("step", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kept", "allowed"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)], ids=str)
def test_the_gradient_of_adamw_is_exact_at_any_length_of_the_walk(backend, size, step, dtype, kept, allowed):
    """θ − w in float32 would be wrong by 0.02 % at steps of 1e-6 and by half and more at 1e-9."""
    param = weights(size, dtype)
    optimizer, expected, _ = walk(param, step=step, kept=kept, backend=backend)
    G = optimizer.state[param]["exp_avg"].double()
    assert float((G - expected).norm() / expected.norm()) <= allowed


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("size", [0.02, 1.0])
@pytest.mark.parametrize("step", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize(("steps", "rms"), [(4, 0.5), (32, 0.7)])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32], ids=str)
def test_theta_comes_back(backend, size, step, steps, rms, kept):
    """With a learning rate of 0: to within units in the last place of the larger of θ and the largest D of the walk."""
    param = weights(size, torch.float32)
    theta = param.detach().clone()
    optimizer, _, largest = walk(
        param, step=step, steps=steps, kept=kept, backend=backend, lr=0, inner_lr_follows_lr=False
    )
    longest = theta.abs().maximum(largest)
    if kept == torch.float32:  # w = θ − D is rounded too, which may be longer than both: D in bfloat16 has zeros there
        longest = theta.abs() + largest
    unit = torch.ldexp(torch.full((N,), 2.0**-24), torch.frexp(longest).exponent)
    units = (exact(optimizer, param).double() - theta.double()).abs() / unit
    assert float(units.square().mean().sqrt()) <= rms
    if steps == 4:
        assert float(units.max()) <= 2
        assert float((units > 1).double().mean()) < 1e-3
