"""What of the CUDA backend shows without a GPU, beside parity: launches, sums, what it reads, errors."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same, assert_snapshot, build, run, set_grads, snapshot
from kernel_tables import make_cycle, make_table, run_function
from torch import nn

from nexus_fused import _C, NexusAdamW, backends, cuda
from nexus_fused.cycle import MicroBatch
from nexus_fused.table import CHUNK_ELEMENTS

if "cuda" not in BACKENDS:
    pytest.skip("needs the CUDA kernels on CPU tensors: a C++ compiler and pybind11", allow_module_level=True)

kernels = cuda._C
why_not_on = kernels.why_not_on  # as it was before these tests let the backend run on CPU tensors
GPU = torch.device("cuda", 0)
DEFAULT = torch.float32, torch.bfloat16  # of parameters and displacements


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine whose PyTorch sees a GPU of NVIDIA's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.device("cpu"))
    yield
    kernels.set_versions(13000, 13000)
    kernels.set_error(0)


def test_launches():
    """2 for a step, inner or outer, for each (device, dtype)."""
    params, optimizer = build((5, 3), (7,), backend="cuda", inner_steps=3)
    before = kernels.launches()
    run(optimizer, params, 6)
    assert kernels.launches() - before == 12
    both = [*params, nn.Parameter(torch.randn(4, dtype=torch.bfloat16))]
    optimizer = NexusAdamW(both, backend="cuda", inner_steps=3)
    before = kernels.launches()
    run(optimizer, both, 3)
    assert kernels.launches() - before == 12


def test_launches_of_a_walk_that_ends_apart():
    """Its end, and AdamW or what others' optimizers take."""
    for function in ("adamw", "gradients"):
        table, cycle = make_table(torch.float32, [50, 0, 7], touched=[0]), make_cycle("cuda")
        before = kernels.launches()
        run_function(function, table, cycle, MicroBatch([cuda.sq_norm(table)], 2))
        assert kernels.launches() - before == 1 + 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_does_not_depend_on_alignment(dtype):
    """Aligned gradients are read 16 bytes at a time, others one by one; a thread adds up the same elements."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(2 * CHUNK_ELEMENTS + 1003, generator=generator).to(dtype)
    norms = []
    for offset in range(5):
        shifted = torch.empty(len(memory) + offset, dtype=dtype)[offset:].copy_(memory)
        table = make_table(torch.float32, [len(memory)])
        table.segments[0].param.grad = shifted
        table.read_gradients(use=True)
        norms.append(cuda.sq_norm(table).clone())
    assert_same(norms[1:], norms[:1] * 4)


def test_norms_of_many_tables_and_other_backends():
    """More than the kernels take, and partial sums, are added up before; their sum is one for all."""
    table, cycle = make_table(torch.float32, [50]), make_cycle("cuda")
    norms = [torch.full((), float(i), dtype=torch.float64) for i in range(20)] + [torch.ones(5, dtype=torch.float64)]
    cycle.backend.inner_step([table], cycle, MicroBatch(norms, 2))
    assert cycle.grad_norms[2] == torch.tensor(195.0, dtype=torch.float64).sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.bool], ids=str)
def test_a_scalers_attributes_of_any_dtype(dtype):
    params, optimizer = build((5, 3), backend="cuda")
    optimizer.grad_scale = torch.ones(1, dtype=dtype) if dtype == torch.bool else torch.full((1,), 2, dtype=dtype)
    for found in (0, 1):
        optimizer.found_inf = torch.full((), found, dtype=dtype)
        run(optimizer, params, 2)
    optimizer.outer_step()
    metrics = optimizer.metrics()
    assert metrics["skipped_inner_steps"] == 2
    assert all(norm > 0 for norm in metrics["grad_norms"])


# Why it cannot run


def test_without_a_cuda_compiler(monkeypatch):
    monkeypatch.setattr(_C, "CUDA_TARGETS", "")
    monkeypatch.setattr(cuda, "_C", _C)
    assert "built without a CUDA compiler: install NVIDIA's CUDA toolkit" in why_not_on(GPU, *DEFAULT)


def test_without_a_gpu(monkeypatch):
    assert "PyTorch sees none" in why_not_on(GPU, *DEFAULT)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "use backend='triton'" in why_not_on(GPU, *DEFAULT)


def test_on_a_gpu(with_gpu):
    assert why_not_on(GPU, *DEFAULT) is None
    assert "a parameter is on cpu: move the model" in why_not_on(torch.device("cpu"), *DEFAULT)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (0, "there is no NVIDIA driver"),
        (12080, r"the NVIDIA driver knows CUDA 12.8, older than the CUDA 13.0 .*: update the driver"),
    ],
)
def test_old_driver(with_gpu, monkeypatch, driver, reason):
    """Explicit: RuntimeError with the remedy. Else Triton is taken."""
    kernels.set_versions(driver, 13000)
    monkeypatch.setattr(cuda, "why_not_on", lambda device, *dtypes: why_not_on(GPU, *dtypes))
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run: {reason}"):
        NexusAdamW([nn.Parameter(torch.zeros(3))], backend="cuda")
    others = {"triton": None}
    monkeypatch.setattr(
        backends, "why_not", lambda name, *a, **_: others[name] if name in others else why_not_on(GPU, *DEFAULT)
    )
    assert backends.chosen(GPU) == "triton"
    assert backends.resolve(None, None, GPU).__name__ == "nexus_fused.triton"


def test_driver_of_the_same_major_version(with_gpu):
    kernels.set_versions(13000, 13020)
    assert why_not_on(GPU, *DEFAULT) is None


def test_old_gpu(with_gpu):
    kernels.set_error(1)
    expected = "the GPU has compute capability 7.5, and these kernels were built for tests: use backend='triton'"
    assert why_not_on(GPU, *DEFAULT) == expected


def test_the_first_that_runs_is_the_last_asked(monkeypatch):
    """Triton's answer takes seconds, a C compiler and Python.h."""
    asked = []
    monkeypatch.setattr(backends, "why_not", lambda name, *_, **__: asked.append(name))
    for backend in (None, "cuda"):
        assert backends.resolve(backend, None, GPU).__name__ == "nexus_fused.cuda"
    assert asked == ["cuda", "cuda"]


def test_the_fastest_comes_first(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_, **__: None)
    assert backends.chosen(GPU) == "cuda"
    assert backends.chosen(torch.device("cpu")) == "cpu"
    assert backends.chosen(torch.device("xpu")) == "triton"


def test_an_error_at_launch_names_kernel_and_device(with_gpu):
    params, optimizer = build((5, 3), backend="cuda")
    run(optimizer, params, 5)
    before = snapshot(optimizer)
    set_grads(params, 0)
    kernels.set_error(3)
    with pytest.raises(RuntimeError, match=r"kernel sq_norm could not be started on cuda:0: .*\(cudaErrorOfTest\)"):
        optimizer.step()
    kernels.set_error(0)
    assert_snapshot(optimizer, before)
