"""The benchmarks run through: bench.gpu with the kernels on CPU tensors, no backend timed without parity, whatever the
tests say; bench.gpu_sweep's variants fit the kernels; bench.training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
XML = """<testsuites><testsuite>
<testcase classname="tests.test_gpu.TestKernelParity" name="test_a[float32]"/>
<testcase classname="tests.test_gpu.TestKernelParity" name="test_a[float64]"/>
<testcase classname="tests.test_gpu" name="test_b"><failure message="assert 1 == 2&#10;where">no</failure></testcase>
<testcase classname="tests.test_gpu" name="test_d"><error>no such fixture</error></testcase>
<testcase classname="tests.test_gpu" name="test_c"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def bench(out, *options, program=("-m", "bench.gpu")):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *program, "--device", "cpu", "--quick", "--compile-limit", "0", "--seconds", "3600"]
    command += ["--out", out, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())


WITH_CUDA = """
import sys
sys.path[:0] = ["", "tests"]
import cuda_on_cpu
cuda_on_cpu.install()
from bench import gpu
{}
sys.exit(gpu.main())
"""


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_figures(tmp_path, backend):
    """Measured whatever the tests say, which stand beside them. Where the CUDA kernels cannot run, their reason stands
    in place of their figures."""
    if backend not in BACKENDS:
        pytest.skip("needs the CUDA kernels on CPU tensors")
    report = tmp_path / "tests.xml"
    report.write_text(XML)
    options = ["--tests", report, "--commit", "abc"]
    if backend == "cuda":
        options += ["--backends", "cuda"]
    program = ("-m", "bench.gpu") if backend == "triton" else ("-c", WITH_CUDA.format(""))
    status, result = bench(tmp_path / "folder" / "gpu.json", *options, program=program)
    assert (status, result["errors"]) == (0, {})
    assert {"device", "memory_free", "cuda", "nvcc", "targets", "torch", "triton", "python", "rounds"} <= result.keys()
    assert result["commit"] == "abc"
    assert result["tests"] == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failures": {"tests.test_gpu::test_b": "assert 1 == 2", "tests.test_gpu::test_d": "no such fixture"},
        "skips": {"needs two GPUs": 1},
    }
    assert result["backends"][backend] is None
    if backend == "triton":
        assert result["backends"]["cuda"]
    assert result["parity"] == {f"{backend}, torch.float32": True, f"{backend}, torch.bfloat16": True}
    figures = result["figures"]
    without_goal = 0
    for part, count, goals in (
        ("bandwidth / copy's", 10, 10),
        ("whole cycle / AdamW's cycle", 3, 3),
        ("whole cycle / AdamW, _foreach_add_'s cycle", 1, 1),
        ("whole cycle / AdamW's captured cycle", 1, 0),
        (": training / AdamW's", 2, 0),
        ("time added to training / AdamW's", 2, 2),
        ("misaligned", 2, 0),
        ("outer step with offload", 1, 0),
        ("foreach Nexus / ours", 4, 2),
        ("kernels that step() starts", 2, 2),
        ("host time of step()", 3, 3),
    ):
        found = [figure for name, figure in figures.items() if part in name and name.startswith(backend)]
        assert len(found) == count, part
        without_goal += count - goals
        for figure in found:
            if figure["median"] is None:  # no GPU to count kernels or capture graphs on, torch.compile is not tried
                assert figure["reason"]
            else:
                assert figure["quartile1"] <= figure["median"] <= figure["quartile3"]
    assert sum("goal" in figure and "met" in figure for figure in figures.values()) == len(figures) - without_goal


def test_a_backend_without_parity_is_not_timed(tmp_path):
    if "cuda" not in BACKENDS:
        pytest.skip("needs the CUDA kernels on CPU tensors")
    fail = "gpu.check_parity = lambda shapes, dtype, backend, device: 1 / (backend == 'triton')"
    only = "gpu.SECTIONS = {gpu.launches: 1}"
    program = ("-c", WITH_CUDA.format(f"{fail}\n{only}"))
    status, result = bench(tmp_path / "gpu.json", program=program)
    assert status == 1
    assert result["parity"] == {
        f"{b}, torch.{d}": b == "triton" for b in ("cuda", "triton") for d in ("float32", "bfloat16")
    }
    assert all(name.startswith("triton") for name in result["figures"])
    assert result["figures"]
    assert "ZeroDivisionError" in result["errors"]["parity of cuda, torch.float32"]


def test_a_section_ends_in_time(monkeypatch):
    """After three rounds that count, once its time is up."""
    monkeypatch.syspath_prepend(ROOT)
    from bench.contenders import Contender, time_in_turn

    runs = []
    contenders = [Contender("a", lambda: runs.append(1), 0)]
    assert len(time_in_turn(contenders, 100, until=0)["a"]) == 3
    assert len(time_in_turn(contenders, 7)["a"]) == 7


def test_variants_fit_the_kernels(monkeypatch):
    """Each text that bench.gpu_sweep replaces stands in the source, once."""
    monkeypatch.syspath_prepend(ROOT)
    pytest.importorskip("nexus_fused._C")
    from bench import gpu_sweep

    source = (ROOT / "csrc" / "cuda.cu").read_text()
    for patches, _ in gpu_sweep.CUDA.values():
        assert (gpu_sweep.patched(patches, source) != source) == bool(patches)


def test_training(monkeypatch, tmp_path):
    """bench.training on a smaller model: all figures are there."""
    pytest.importorskip("nexus_fused._C")
    monkeypatch.syspath_prepend(ROOT)
    from bench import training

    for name, value in {"VOCABULARY": 50, "WIDTH": 64, "LAYERS": 1, "TOKENS": 8}.items():
        monkeypatch.setattr(training, name, value)
    out = tmp_path / "training.json"
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["bench.training", "--rounds", "3", "--threads", threads, "--out", str(out)])
    training.main()
    result = json.loads(out.read_text())
    assert {"processor", "threads", "torch", "commit", "rounds"} <= result.keys()
    assert len(result["figures"]) == 2
    assert all(0 < f["quartile1"] <= f["median"] <= f["quartile3"] for f in result["figures"].values())
    for row in result["sections"][0]["rows"]:
        assert 0 < row["milliseconds"]["accumulating"] < row["milliseconds"]["optimizer"] < row["milliseconds"]["cycle"]
