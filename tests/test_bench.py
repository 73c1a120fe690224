"""The benchmarks run through: bench.gpu with the kernels on CPU tensors, nothing published without parity;
bench.training."""

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
<testcase classname="tests.test_gpu.TestKernelParity" name="test_a[float64]">{of_parity}</testcase>
<testcase classname="tests.test_gpu" name="test_b"><failure message="no">no</failure></testcase>
<testcase classname="tests.test_gpu" name="test_c"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def bench(out, *options, program=("-m", "bench.gpu")):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *program, "--device", "cpu", "--quick", "--compile-limit", "0", "--out", out, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())


WITH_CUDA = """
import sys
sys.path[:0] = ["", "tests"]
import cuda_on_cpu
cuda_on_cpu.install()
from bench.gpu import main
sys.exit(main())
"""


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_figures(tmp_path, backend):
    """Where the CUDA kernels cannot run, their reason stands in place of their figures."""
    if backend not in BACKENDS:
        pytest.skip("needs the CUDA kernels on CPU tensors")
    report = tmp_path / "tests.xml"
    report.write_text(XML.format(of_parity=""))
    options = ["--tests", report, "--sanitizers", "memcheck=passed", "racecheck=timed out"]
    if backend == "cuda":
        options += ["--backends", "cuda"]
    program = ("-m", "bench.gpu") if backend == "triton" else ("-c", WITH_CUDA)
    status, result = bench(tmp_path / "folder" / "gpu.json", *options, program=program)
    assert (status, result["errors"]) == (0, {})
    assert {"device", "driver", "cuda", "torch", "triton", "python", "commit", "rounds"} <= result.keys()
    assert result["tests"] == {
        "passed": 2,
        "failed": 1,
        "skipped": 1,
        "failures": ["tests.test_gpu::test_b"],
        "skips": {"needs two GPUs": 1},
        "parity": True,
    }
    assert result["sanitizers"] == {"memcheck": "passed", "racecheck": "timed out"}
    assert result["backends"][backend] is None
    if backend == "triton":
        assert result["backends"]["cuda"]
    assert result["parity"] == {f"{backend}, torch.float32": True, f"{backend}, torch.bfloat16": True}
    figures = result["figures"]
    without_goal = 0
    for part, count, goals in (
        ("bandwidth / copy's", 8, 8),
        ("whole cycle / AdamW's cycle", 3, 2 if backend == "cuda" else 1),
        ("time added to training / AdamW's", 2, 1 if backend == "cuda" else 0),
        ("foreach Nexus / ours", 4, 2),
        ("kernels that step() starts", 2, 2),
        ("host time of step()", 3, 3),
    ):
        found = [figure for name, figure in figures.items() if part in name and name.startswith(backend)]
        assert len(found) == count
        without_goal += count - goals
        for figure in found:
            if figure["median"] is None:  # no GPU to count kernels or capture graphs on, torch.compile is not tried
                assert figure["reason"]
            else:
                assert figure["quartile1"] <= figure["median"] <= figure["quartile3"]
    assert sum("goal" in figure and "met" in figure for figure in figures.values()) == len(figures) - without_goal


def test_no_figures_without_parity(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(XML.format(of_parity="<failure/>"))
    status, result = bench(tmp_path / "gpu.json", "--tests", report)
    assert (status, result["figures"], result["tests"]["failed"]) == (1, {}, 2)
    assert "parity" in result["errors"]["figures"]


def test_training(monkeypatch, tmp_path):
    """bench.training on a smaller model: all figures are there, and both of ours train to the same bits."""
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
    assert len(result["figures"]) == 4
    assert all(0 < f["quartile1"] <= f["median"] <= f["quartile3"] for f in result["figures"].values())
    for row in result["sections"][0]["rows"]:
        assert 0 < row["milliseconds"]["hooks"] < row["milliseconds"]["optimizer"] < row["milliseconds"]["cycle"]
