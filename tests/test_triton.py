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
from kernel_tables import give_gradients, make_cycle, make_table
from torch import nn

from nexus_fused import NexusAdamW

if "triton" not in BACKENDS:
    pytest.skip("needs Triton in its interpreter", allow_module_level=True)

from nexus_fused.triton_kernels import elements


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels started, in their order, with what their variants differ in."""
    names, launch = [], elements.launch

    def count(kernel, programs, *args, **constants):
        flags = {name: constants[name] for name in ("AMSGRAD", "HAS_NORM", "FIRST", "LAST") if name in constants}
        names.append((kernel.__name__, *flags.values(), *["no scale"] * args.count(None)))
        launch(kernel, programs, *args, **constants)

    monkeypatch.setattr(elements, "launch", count)
    return names


def test_launches(launched):
    """3 for an inner step and 4 for an outer one, for each (device, dtype)."""
    params, optimizer = build((5, 3), (7,), backend="triton", inner_steps=3)
    run(optimizer, params, 3)
    inner = ["sq_norm_kernel", "advance_kernel", "inner_step_kernel"]
    outer = ["sq_norm_kernel", "advance_kernel", "outer_step_kernel", "finish_kernel"]
    assert [name for name, *_ in launched] == [*inner, *inner, *outer]
    launched.clear()
    both = [*params, nn.Parameter(torch.randn(4, dtype=torch.bfloat16))]
    optimizer = NexusAdamW(both, backend="triton", inner_steps=3)
    run(optimizer, both, 3)
    assert len(launched) == 2 * 5 + 7


def test_launches_of_gradients(launched):
    """2 for each table, whatever it has."""
    table, cycle = make_table(torch.bfloat16, [50, 0, 7], touched=(0, 1), keeps=()), make_cycle("triton")
    give_gradients(table, cycle)
    assert [name for name, *_ in launched] == ["gradients_kernel", "add_kernel"]


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
    dtypes = torch.float32, torch.bfloat16
    assert "no C compiler" in triton.why_not_on(torch.device("cuda", 0), *dtypes)
    inside.replace_try_out(monkeypatch, lambda *args: None)
    assert triton.why_not_on(torch.device("cuda", 0), *dtypes) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_tried_out(launched, dtype):
    """So that nothing is compiled, or fails, in the middle of a step; here in the interpreter."""
    inside.try_out(torch.device("cpu"), dtype, torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert set(launched) == {
        ("sq_norm_kernel",), ("inner_step_kernel",), ("end_walk_kernel",), ("gradients_kernel",), ("add_kernel",),
        *(("outer_step_kernel", amsgrad) for amsgrad in (False, True)),
        *(("finish_kernel", *ends) for ends in itertools.product((True, False), repeat=2)),
        *(("advance_kernel", True, *["no scale"] * missing) for missing in (0, 1, 2)),
        ("advance_kernel", False, "no scale", "no scale"),
    }  # fmt: skip


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
