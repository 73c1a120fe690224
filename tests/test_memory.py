"""How much memory a training step takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

MIB = 2**20

SCRIPT = """
import resource, sys, torch
from nexus_fused import NexusAdamW
dtype, grad_dtype = (getattr(torch, name) for name in sys.argv[1:3])
flatten, displacement_dtype = sys.argv[3] == "True", getattr(torch, sys.argv[4])

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def peak():  # since the last reset
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def reset():
    open("/proc/self/clear_refs", "w").write("5")

def train(params, optimizer):
    for p in params:
        p.grad = torch.full_like(p, 1e-3, dtype=grad_dtype)
    for _ in range(5):
        optimizer.step()

def make(n, *shape):
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for _ in range(n)]
    for p in params:
        p.grad_dtype = grad_dtype
    return params

def build(params):
    return NexusAdamW(params, flatten=flatten, displacement_dtype=displacement_dtype)

warm_up = make(1, 10)
train(warm_up, build(warm_up))
before = resident()
params = make(6, 4096, 8192)  # 192 Mi elements, in pieces so large that malloc gives each back to the system at once
reset()
optimizer = build(params)
print(peak() - before)
reset()
train(params, optimizer)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "flatten", "displacement_dtype", "bytes_at_peak"),
    [
        ("float32", "float32", True, "bfloat16", 18),
        ("float32", "bfloat16", True, "bfloat16", 16),
        ("bfloat16", "bfloat16", True, "bfloat16", 16),
        ("float32", "float32", False, "float32", 20),
        ("bfloat16", "bfloat16", False, "bfloat16", 16),
    ],
)
def test_resident_memory(dtype, grad_dtype, flatten, displacement_dtype, bytes_at_peak):
    """At the peak of a cycle: a weight of 4 bytes (below float32: a parameter and a remainder), its gradient, two
    moments of 4, and D. As much as AdamW in float32 or with a float32 master, 16, and D where gradients are float32.

    Construction: parameters, moments and remainders, and at most one bucket of 512 MiB. 24 MiB for allocators and code.
    """
    command = [sys.executable, "-c", SCRIPT, dtype, grad_dtype, str(flatten), displacement_dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    elements = 6 * 4096 * 8192
    construction, training = (int(line) for line in output)
    assert construction <= elements * (4 + 8) + 512 * MIB + 24 * MIB
    assert elements * bytes_at_peak - 24 * MIB <= training <= elements * bytes_at_peak + 24 * MIB
    sizes = [getattr(torch, name).itemsize for name in (grad_dtype, displacement_dtype)]
    assert bytes_at_peak == 4 + 8 + sum(sizes)
