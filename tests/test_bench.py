"""The benchmarks run through: bench.gpu in Triton's interpreter, nothing published without parity; bench.training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
XML = """<testsuites><testsuite>
<testcase classname="tests.test_gpu.TestKernelParity" name="test_a[float32]"/>
<testcase classname="tests.test_gpu.TestKernelParity" name="test_a[float64]">{of_parity}</testcase>
<testcase classname="tests.test_gpu" name="test_b"><failure message="no">no</failure></testcase>
<testcase classname="tests.test_gpu" name="test_c"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def bench(out, *options):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--compile-limit", "0", "--out", out]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())


def test_figures(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(XML.format(of_parity=""))
    status, result = bench(tmp_path / "folder" / "gpu.json", "--tests", report)
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
    assert result["parity"] == {"torch.float32": True, "torch.bfloat16": True}
    figures = result["figures"]
    for part, count in (
        ("bandwidth / copy's", 8),
        ("whole cycle / AdamW's cycle", 1),
        ("foreach Nexus / ours", 4),
        ("kernels that step() starts", 2),
        ("host time of step()", 2),
    ):
        found = [figure for name, figure in figures.items() if part in name]
        assert len(found) == count
        for figure in found:
            if figure["median"] is None:  # no GPU to count kernels on, and torch.compile is not tried
                assert figure["reason"]
            else:
                assert figure["quartile1"] <= figure["median"] <= figure["quartile3"]
    assert sum("goal" in figure and "met" in figure for figure in figures.values()) == len(figures) - 2


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
