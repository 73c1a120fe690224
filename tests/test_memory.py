"""How much memory the optimizer takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

MIB = 2**20

SCRIPT = """
import resource, sys, torch
from nexus_fused import NexusAdamW
dtype, flatten = getattr(torch, sys.argv[1]), sys.argv[2] == "True"

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def peak():  # since the last reset
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def reset():
    open("/proc/self/clear_refs", "w").write("5")

warm_up = [torch.nn.Parameter(torch.zeros(10, dtype=dtype))]
NexusAdamW(warm_up, flatten=flatten)
params = [torch.nn.Parameter(torch.full((4096, 8192), 0.5, dtype=dtype)) for _ in range(6)]  # 192 Mi elements, pieces
# so large that malloc gives each back to the system at once
before = resident()
reset()
optimizer = NexusAdamW(params, flatten=flatten)
print(peak() - before)
for _ in range(5):
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "state"), [("float32", 12), ("bfloat16", 16)])
@pytest.mark.parametrize("flatten", [True, False])
def test_resident_memory(dtype, state, flatten):
    """float32: m, v and the anchor, 12 bytes per parameter; bfloat16: master and walk instead of the anchor, 16.

    Construction: at most one bucket of 512 MiB beyond parameters and state. 24 MiB for allocators and code.
    """
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype, str(flatten)], capture_output=True, text=True, check=True
    ).stdout.split()
    elements = 6 * 4096 * 8192
    construction, after = (int(line) for line in output)
    assert construction <= elements * state + 512 * MIB + 24 * MIB
    assert elements * state - 24 * MIB <= after <= elements * state + 24 * MIB
