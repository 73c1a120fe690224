"""What ahead-of-time compilation shows of the Triton kernels: 16-byte accesses, no spills, register counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sample, selected

triton = pytest.importorskip("triton")

TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """{target: {kernel: figures}}, compiled in processes where kernels are not interpreted, and without a cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(HERE / "compile_kernels.py")]
    targets = selected(request, "target")
    running = {t: subprocess.Popen([*command, t], stdout=subprocess.PIPE, env=environment) for t in targets}
    outputs = {target: process.communicate()[0] for target, process in running.items()}
    assert all(process.returncode == 0 for process in running.values())
    return {target: json.loads(output) for target, output in outputs.items()}


@pytest.mark.parametrize("target", sample(TARGETS, "cuda:90"))
class TestCompiled:
    def test_nothing_is_spilled(self, compiled, target):
        assert {kernel: f["spilled"] for kernel, f in compiled[target].items() if f["spilled"]} == {}

    def test_accesses_are_16_bytes_wide(self, compiled, target):
        """Each array on the aligned path: at least so many loads and stores in the code. What has 2 bytes beside state
        of 4 is 8 bytes for a thread; gradients have a path for each size, and 4 times 8 bytes are two loads."""
        arrays = {  # but for w, D and gradients
            "inner_step_kernel": (0, 1),  # anchor
            "end_walk_kernel": (1, 0),  # anchor
            "outer_step_kernel": (2, 2),  # moments
        }
        walking = self.walking(compiled[target])
        assert len(walking) == 1 + 7 * 5  # for each pair of dtypes two outer steps and each other kernel but the norm
        for key, f in walking.items():
            if key.startswith("sq_norm"):
                assert f["loads"] >= 4 + 4 + 2 + 2
                continue
            w, D = (f"{name}=fp32" in key or f"{name}=fp64" in key for name in ("STORAGE", "OF_D"))
            if key.startswith("gradients"):  # the wider of both
                assert f["loads"] >= (D or not w), key
                assert f["stores"] >= (w or not D), key
                continue
            loads, stores = arrays[key.split()[0]]
            assert f["loads"] >= loads + w + D + (3 if "STATE=fp32" in key else 1), key
            assert f["stores"] >= stores + w + (D and "outer_step" not in key), key

    def test_no_value_changes_hands_in_a_loop(self, compiled, target):
        """Of a block that is whole and aligned, whose loop comes before the one for what is left."""
        for key, f in self.walking(compiled[target]).items():
            assert len(f["conversions"]) >= 2, key
            assert not any(f["conversions"][::2]), key

    @staticmethod
    def walking(figures):
        """Those of kernels that walk over elements."""
        return {key: f for key, f in figures.items() if not key.startswith(("advance", "finish", "add"))}

    def test_products_and_sums_round_apart(self, compiled, target):
        """A contracted multiply-add would not equal the reference. (AMD's assembly has them inside divisions.)"""
        assert not any(f.get("contracted") for f in compiled[target].values())

    def test_barriers_survive(self, compiled, target):
        """Between reading a cycle's sums and setting them to zero: no test on a CPU would miss them."""
        if target.startswith("hip"):
            pytest.skip("counted in PTX")
        last = [f for key, f in compiled[target].items() if key.startswith("finish_kernel") and "LAST=True" in key]
        assert last
        assert all(f["barriers"] >= 3 for f in last)

    def test_registers_of_the_outer_step(self, compiled, target):
        """In float32 three programs of 256 threads fit on a multiprocessor."""
        if target.startswith("hip"):
            pytest.skip("AMD's compiler takes no limit")
        plain = {k: f for k, f in compiled[target].items() if "AMSGRAD=False" in k}
        assert len(plain) == 7
        assert all(f["registers"] <= 80 for f in plain.values())

    def test_registers(self, compiled, target):
        """As in registers.json for this Triton: a jump means fewer programs in flight on a multiprocessor."""
        table = json.loads((HERE / "registers.json").read_text())
        if triton.__version__ not in table:
            pytest.skip(f"registers.json has Triton {', '.join(table)}")
        assert {key: f["registers"] for key, f in compiled[target].items()} == table[triton.__version__][target]
