"""What of the Triton backend shows without a GPU, beside parity: launches, uploads, offsets, errors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import inside
import pytest
import torch
from conftest import BACKENDS, DTYPES, build, run
from torch import nn

from nexus_fused import NexusAdamW

if "triton" not in BACKENDS:
    pytest.skip("needs Triton in its interpreter", allow_module_level=True)

from nexus_fused.triton_kernels import displace, elements, inner_step, outer_step, scalars, sq_norm


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels started, in their order."""
    names = []

    def count(kernel, programs, *args, **constants):
        names.append(kernel.__name__)
        elements.launch(kernel, programs, *args, **constants)

    for module in (sq_norm, inner_step, displace, outer_step, scalars):
        monkeypatch.setattr(module, "launch", count)
    return names


def test_launches(launched):
    """3 for an inner step and 4 for an outer one, for each (device, dtype)."""
    params, optimizer = build((5, 3), (7,), backend="triton", inner_steps=3)
    run(optimizer, params, 3)
    inner = ["sq_norm_kernel", "advance_kernel", "inner_step_kernel"]
    assert launched == [*inner, *inner, "sq_norm_kernel", "advance_kernel", "outer_step_kernel", "finish_kernel"]
    launched.clear()
    both = [*params, nn.Parameter(torch.randn(4, dtype=torch.bfloat16))]
    optimizer = NexusAdamW(both, backend="triton", inner_steps=3)
    run(optimizer, both, 3)
    assert len(launched) == 2 * 5 + 7


def test_an_error_names_kernel_and_signature():
    class Broken:
        __name__ = "broken_kernel"

        def __getitem__(self, grid):
            raise ValueError("PTXAS said no")

    with pytest.raises(RuntimeError, match=r"broken_kernel\(torch.float32, int, BLOCK=8\) on cpu: PTXAS said no"):
        elements.launch(Broken(), 1, torch.zeros(3), 5, BLOCK=8)


def test_a_triton_that_cannot_start_is_explained(monkeypatch):
    """The smallest kernel is tried when the optimizer is built, and its error is the reason."""
    from nexus_fused import triton

    def fail(*args, **kwargs):
        raise RuntimeError("Triton could not compile outer_step_kernel: no C compiler")

    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    inside.replace_try_out(monkeypatch, fail)
    assert "no C compiler" in triton.why_not_on(torch.device("cuda", 0), torch.float32)
    inside.replace_try_out(monkeypatch, lambda *args: None)
    inside.replace_try_out(monkeypatch, fail, displaced=True)
    assert triton.why_not_on(torch.device("cuda", 0), torch.float32) is None
    assert "no C compiler" in triton.why_not_on(torch.device("cuda", 0), torch.float32, displaced=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_tried_out(monkeypatch, launched, dtype):
    """So that nothing is compiled, or fails, in the middle of a step; here in the interpreter."""
    variants = set()
    for module in (outer_step, scalars):
        counted = module.launch

        def record(kernel, programs, *args, counted=counted, **constants):
            shown = "AMSGRAD", "DISPLACED", "HAS_NORM", "FIRST", "LAST"
            flags = [constants[name] for name in shown if name in constants]
            variants.add((kernel.__name__, *flags, args.count(None) if kernel is scalars.advance_kernel else None))
            counted(kernel, programs, *args, **constants)

        monkeypatch.setattr(module, "launch", record)
    inside.try_out(torch.device("cpu"), dtype)
    assert set(launched) == {
        "sq_norm_kernel", "advance_kernel", "inner_step_kernel", "outer_step_kernel",
        "finish_kernel",
    }  # fmt: skip
    assert variants == {
        *(("outer_step_kernel", amsgrad, False, None) for amsgrad in (False, True)),
        *(("finish_kernel", *ends, None) for ends in itertools.product((True, False), repeat=2)),
        *(("advance_kernel", True, missing) for missing in (0, 1, 2)),
        ("advance_kernel", False, 2),
    }
    known = set(variants)
    inside.try_out(torch.device("cpu"), dtype, displaced=True)
    assert "displace_kernel" in launched
    assert variants - known == {("outer_step_kernel", amsgrad, True, None) for amsgrad in (False, True)}


def test_cpu_tensors_are_refused_outside_the_interpreter():
    """backend='triton' says what is missing and which backend would run, before anything is modified."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    code = """
import inside, nexus_fused, torch
p = torch.nn.Parameter(torch.zeros(3))
address = p.data_ptr()
try:
    nexus_fused.NexusAdamW([p], backend="triton")
except RuntimeError as error:
    print(error)
assert p.data_ptr() == address
assert inside.backends_of(nexus_fused.NexusAdamW([p])) == ["cpu"]
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "its kernels run on a GPU" in output.stdout
    assert "On cpu, backend='cpu' would run" in output.stdout
    report = [sys.executable, "-m", "nexus_fused"]
    output = subprocess.run(report, capture_output=True, text=True, check=True, env=environment)
    assert torch.cuda.is_available() or "triton     missing: its kernels run on a GPU" in output.stdout
