"""What of the Triton backend shows without a GPU, beside parity: launches, uploads, offsets, errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same, build, run, set_grads, values
from test_parity import contents, make_cycle, make_table, run_function
from torch import nn

from nexus_fused import NexusAdamW, hyperparameters
from nexus_fused import table as tables
from nexus_fused.cycle import MicroBatch
from nexus_fused.table import CHUNK_ELEMENTS, COLUMNS

if "triton" not in BACKENDS:
    pytest.skip("needs Triton in its interpreter", allow_module_level=True)

from nexus_fused.triton_kernels import elements, inner_step, outer_step, scalars, sq_norm


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels started, in their order."""
    names = []

    def count(kernel, programs, *args, **constants):
        names.append(kernel.__name__)
        elements.launch(kernel, programs, *args, **constants)

    for module in (sq_norm, inner_step, outer_step, scalars):
        monkeypatch.setattr(module, "launch", count)
    return names


@pytest.fixture
def uploads(monkeypatch):
    """What was copied to the device: the shape of each copy of rows."""
    copied = []

    def count(tensor, target):
        copied.extend([tuple(tensor.shape)] * (tensor.shape[-1] == len(COLUMNS)))
        target.copy_(tensor)

    monkeypatch.setattr(tables, "upload", count)
    return copied


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


def test_table_is_uploaded_only_when_an_address_changes(uploads):
    params, optimizer = build((5, 3), (7,), (9,), backend="triton", inner_steps=3)
    unused = params.pop()  # has no gradient, ever
    assert unused.grad is None
    set_grads(params, 0)
    optimizer.step()
    assert uploads == [(3, len(COLUMNS))]
    for _ in range(8):
        optimizer.step()
    assert len(uploads) == 1
    kept = [p.grad for p in params]
    for step in range(2, 8):
        kept.append(params[0].grad)
        params[0].grad = params[0].grad.clone()
        optimizer.step()
        assert len(uploads) == step
    params[1].grad = None  # does not move on, but has moved: who is touched must be told
    optimizer.step()
    assert len(uploads) == 8


def test_hyperparameters_are_uploaded_only_when_they_change(monkeypatch):
    copied = []
    monkeypatch.setattr("nexus_fused.cycle.upload", lambda tensor, target: (copied.append(1), target.copy_(tensor)))
    params, optimizer = build((5, 3), backend="triton")
    run(optimizer, params, 5)
    assert len(copied) == 1
    optimizer.param_groups[0]["lr"] *= 0.5
    run(optimizer, params, 2)
    assert len(copied) == 2


def test_hyperparameters_on_a_device(monkeypatch):
    """Learning rates that lie on a device, here played by CPU tensors that are not read, give the same bits."""
    read = hyperparameters.number
    results = []
    for on_device in (False, True):
        if on_device:  # as a tensor elsewhere: not read
            monkeypatch.setattr(
                hyperparameters,
                "number",
                lambda value, name, **limits: value if name.startswith("lr ") else read(value, name, **limits),
            )
        params, optimizer = build((5, 3), backend="triton", lr=torch.tensor(0.02, dtype=torch.float64))
        for step in range(8):
            optimizer.param_groups[0]["lr"].fill_(0.02 / (step + 1))
            run(optimizer, params, 1, first_seed=step)
        results.append(values(params))
    assert_same(*results)


def test_an_outer_step_leaves_the_norm_alone():
    """Other devices may read it later: each finishes the cycle by itself."""
    table, cycle = make_table(torch.float32, [50, 3 * CHUNK_ELEMENTS], touched=(0, 1)), make_cycle("triton")
    norm = cycle.backend.sq_norm(table)
    before = norm.clone()
    run_function("outer_step", table, cycle, MicroBatch([norm], 0))
    assert_same([norm], [before])


def test_chunks_are_balanced():
    """A large parameter is cut into many programs, a small one is one, an empty one none."""
    sizes = [5 * CHUNK_ELEMENTS + 1, 3, 0, CHUNK_ELEMENTS, 1]
    table = make_table(torch.float32, sizes)
    _, row_of_chunk, starts, _ = table.on_device()
    assert row_of_chunk.tolist() == [0] * 6 + [1] + [3] + [4]
    assert starts.tolist() == [[0, 0], [5, 9]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_one_gradient_as_in_the_table(dtype, offset):
    """sum_squares_kernel gives the partial sums of sq_norm_kernel, of every chunk and alignment."""
    table, backend = (
        make_table(dtype, [0, 5, 3 * CHUNK_ELEMENTS + 17, 2048], offset=offset),
        make_cycle("triton").backend,
    )
    expected = backend.sq_norm(table).clone()
    table.partials.fill_(float("nan"))
    for segment in table.segments:
        backend.sum_squares(table, segment, segment.param.grad)
    assert_same([backend.sq_norm(table, summed=True)], [expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_int32(dtype):
    """A chunk that starts 2^31 + 2^14 elements into its segment, at an address that makes this ours: as if at 0."""
    far = 2**31 + CHUNK_ELEMENTS
    results = []
    for offset in (0, far):
        table, cycle = make_table(dtype, [1500], touched=(0,)), make_cycle("triton")
        rows = table.rows[0]
        for column, name in enumerate(COLUMNS):
            size = dtype.itemsize if name in ("weight", "grad") else 4
            size = dtype.itemsize if name == "walk" and dtype == torch.float32 else size
            if name in ("weight", "grad", "theta", "walk", "exp_avg", "exp_avg_sq"):
                rows[column] -= offset * size
            elif name == "chunk":
                rows[column] = -(offset // CHUNK_ELEMENTS)
            elif name == "length":
                rows[column] += offset
        norm = cycle.backend.sq_norm(table)
        run_function("inner_step", table, cycle, MicroBatch([norm], 0))
        run_function("outer_step", table, cycle, MicroBatch([norm], 1))
        tensors, sums = contents(table, cycle)
        results.append([norm.clone(), *tensors, *sums])
    assert results[0][0] > 0
    assert_same(*results)


def test_more_groups_than_a_block():
    """The cycle's scalars go through blocks of 32 groups."""
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3)) for _ in range(70)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1), "maximize": i % 3 == 0} for i, p in enumerate(params)]
        optimizer = NexusAdamW(groups, backend=backend)
        run(optimizer, params, 9)
        results.append([*values(params), *(s["step"] for s in optimizer.state_dict()["state"].values())])
    assert_same(*results)


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
    monkeypatch.setattr(triton, "_try_out", fail)
    assert "no C compiler" in triton.why_not_on(torch.device("cuda", 0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_tried_out(monkeypatch, launched, dtype):
    """So that nothing is compiled, or fails, in the middle of a step; here in the interpreter."""
    from nexus_fused import triton

    variants = set()
    for module in (outer_step, scalars):
        counted = module.launch

        def record(kernel, programs, *args, counted=counted, **constants):
            flags = [constants[name] for name in ("AMSGRAD", "HAS_NORM", "FIRST", "LAST") if name in constants]
            variants.add((kernel.__name__, *flags, args.count(None) if kernel is scalars.advance_kernel else None))
            counted(kernel, programs, *args, **constants)

        monkeypatch.setattr(module, "launch", record)
    triton._try_out.__wrapped__(torch.device("cpu"), dtype)
    assert set(launched) == {
        "sum_squares_kernel", "sq_norm_kernel", "advance_kernel", "inner_step_kernel", "outer_step_kernel",
        "finish_kernel",
    }  # fmt: skip
    assert variants == {
        *(("outer_step_kernel", amsgrad, None) for amsgrad in (False, True)),
        *(("finish_kernel", *ends, None) for ends in ((True, False), (False, True), (True, True))),
        *(("advance_kernel", True, missing) for missing in (0, 1, 2)),
        ("advance_kernel", False, 2),
    }


def test_cpu_tensors_are_refused_outside_the_interpreter():
    """backend='triton' says what is missing and which backend would run, before anything is modified."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = """
import torch, nexus_fused
p = torch.nn.Parameter(torch.zeros(3))
address = p.data_ptr()
try:
    nexus_fused.NexusAdamW([p], backend="triton")
except RuntimeError as error:
    print(error)
assert p.data_ptr() == address
assert next(iter(nexus_fused.NexusAdamW([p])._cycles.values())).backend.__name__ == "nexus_fused.cpu"
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "its kernels run on a GPU" in output.stdout
    assert "On cpu, backend='cpu' would run" in output.stdout
    report = [sys.executable, "-m", "nexus_fused"]
    output = subprocess.run(report, capture_output=True, text=True, check=True, env=environment)
    assert torch.cuda.is_available() or "triton     missing: its kernels run on a GPU" in output.stdout
