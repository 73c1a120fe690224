"""The contenders of `python -m bench` as pytest-benchmark's tests: `pytest bench`.

Good for profiles, histories and comparisons between commits. For ratios between contenders use `python -m bench`,
which runs them in turn.
"""

from __future__ import annotations

import math

import pytest
import torch

from .contenders import GPT2_50M, MANY_SMALL, check_parity, cycles, kernels, steps_on_small, triad

DTYPES = [torch.float32, torch.bfloat16]
KERNELS = ["sq_norm", "inner_step, first", "inner_step, middle", "outer_step"]
NAMES = {
    "cycle": {
        torch.float32: [
            "nexus_fused",
            "AdamW, accumulation, clipping",
            "foreach Nexus, second model",
            "Nexus(torch AdamW(fused=True))",
            "nexus_fused reference",
        ],
        torch.bfloat16: ["nexus_fused", "AdamW, float32 master and accumulation", "nexus_fused reference"],
    },
    "kernel": dict.fromkeys(DTYPES, KERNELS),
}
CASES = [(kind, dtype, name) for kind, by_dtype in NAMES.items() for dtype, names in by_dtype.items() for name in names]


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    check_parity(MANY_SMALL, torch.float32)  # no time without it
    check_parity(GPT2_50M[:14], torch.bfloat16)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "dtype", "name"), CASES, ids=str)
def test_50m(benchmark, kind, dtype, name):
    contender = next(c for c in (cycles if kind == "cycle" else kernels)(GPT2_50M, dtype) if c.name == name)
    benchmark.group = f"{kind}, 50M parameters, {dtype}"
    benchmark.extra_info["bytes_per_parameter"] = contender.bytes
    benchmark.pedantic(contender.run, rounds=10, warmup_rounds=2)


def test_triad(benchmark):
    benchmark.group = "triad, 50M elements of float32"
    benchmark.extra_info["bytes_per_parameter"] = 12
    benchmark.pedantic(triad(sum(math.prod(shape) for shape in GPT2_50M)).run, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("side", [0, 1], ids=["nexus_fused", "torch AdamW(fused=True)"])
def test_2000_parameters(benchmark, side):
    benchmark.group = "four step(), 2,000 parameters of 64 elements"
    benchmark.pedantic(steps_on_small()[side].run, rounds=20, warmup_rounds=2)
