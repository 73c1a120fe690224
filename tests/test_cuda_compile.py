"""What nvcc says of the CUDA kernels: no spills, 16-byte accesses, no contraction, register counts.

`python tests/test_cuda_compile.py` writes the counts of this nvcc into registers.json.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import sample, selected

HERE = Path(__file__).parent
ROOT = HERE.parent
TARGETS = ["sm_80", "sm_90", "sm_100"]
NVCC = shutil.which("nvcc")
NAME = re.compile(
    r"(sq_norm|inner_step|displace|outer_step)_kernel"
    r"(?:I\w*?(\d+BFloat16|\d+Float16|FullPrecisionI[fd]))?(?:\w*?Lb([01])ELb([01]))?"
)
THREADS, REGISTERS = 256, 65536  # of a block, of a multiprocessor


def readable(mangled):
    kernel, dtype, amsgrad, displaced = NAME.search(mangled).groups()
    dtypes = {"FullPrecisionIf": "float32", "FullPrecisionId": "float64"}
    dtype = dtypes.get(dtype, (dtype or "").lstrip("0123456789").lower())
    options = "amsgrad" if amsgrad == "1" else "", "displaced" if displaced == "1" else ""
    return " ".join(filter(None, (kernel, dtype, *options)))


def flags():
    """As CMakeLists.txt compiles them."""
    options = re.search(
        r"target_compile_options\(cuda_kernels PRIVATE (.*)\)", (ROOT / "csrc/CMakeLists.txt").read_text()
    )
    return [*options.group(1).split(), "-std=c++17", '-DNEXUS_CUDA_TARGETS="test"']


def compile_for(target, folder):
    command = [NVCC, *flags(), f"-arch={target}", "-Xptxas=-v", "--keep", "--keep-dir", folder, "-cubin"]
    return subprocess.Popen(
        [*command, "-o", folder / "cuda.cubin", ROOT / "csrc/cuda.cu"], stderr=subprocess.PIPE, text=True, cwd=folder
    )


def figures(report, ptx):
    """{kernel: registers, bytes spilled and on the stack, accesses of 16 and of 8 bytes, contracted products}."""
    made = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, *numbers in entry.findall(report):
        stack, stores, loads, registers = map(int, numbers)
        made[readable(name)] = {"registers": registers, "spilled": stores + loads, "stack": stack}
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL):
        # Four values of 2 bytes are stored as one of 8, as counts are, whose number float32's kernel shows.
        wide, half = r"v4\.[buf]32|v2\.[buf]64", r"v2\.[buf]32|v4\.[buf]16"
        for access, form in {"ld16": wide, "st16": wide, "ld8": half, "st8": rf"{half}|[bu]64"}.items():
            made[readable(name)][access] = len(re.findall(rf"{access[:2]}\.global[.\w]*\.(?:{form})", body))
        made[readable(name)]["contracted"] = len(re.findall(r"fma\.rn\.f32", body))
    return made


def compile_all(folder, targets=TARGETS):
    """{target: figures}, the targets compiled at the same time."""
    running = {}
    for target in targets:
        (folder / target).mkdir()
        running[target] = compile_for(target, folder / target)
    reports = {target: process.communicate()[1] for target, process in running.items()}
    assert all(process.returncode == 0 for process in running.values()), reports
    return {t: figures(report, (folder / t / "cuda.ptx").read_text()) for t, report in reports.items()}


def version():
    return (
        "nvcc " + re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]
    )


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    if NVCC is None:
        pytest.skip("needs nvcc")
    return compile_all(tmp_path_factory.mktemp("nvcc"), selected(request, "target"))


@pytest.mark.parametrize("target", sample(TARGETS, "sm_90"))
class TestCompiled:
    def test_nothing_is_spilled(self, compiled, target):
        """Nor is anything else in a thread's local memory, such as an array with an index known only at run time."""
        assert {kernel: f for kernel, f in compiled[target].items() if f["spilled"] or f["stack"]} == {}

    def test_two_blocks_fit_on_a_multiprocessor(self, compiled, target):
        assert all(2 * THREADS * f["registers"] <= REGISTERS for f in compiled[target].values())

    def test_accesses_are_wide(self, compiled, target):
        """On the aligned path of each array at least one load and store of 16 bytes; where a thread has 16 bytes of
        float32 state, 8 of a weight or gradient of 2 bytes (more such accesses than in the kernel for float32)."""
        arrays = {"sq_norm": (1, 0), "inner_step": (2, 2), "displace": (3, 1)}  # loads, stores
        arrays["outer_step"] = 5, 3
        assert len(compiled[target]) == 4 + 4 + 4 + 12  # dtypes; with amsgrad, and displaced too
        for key, f in compiled[target].items():
            kernel, dtype, *options = key.split()
            loads, stores = arrays[kernel]
            if "16" in dtype and stores:
                full = compiled[target][" ".join([kernel, "float32", *options])]
                assert f["ld8"] > full["ld8"], key
                assert f["st8"] > full["st8"], key
                loads -= 1
            assert f["ld16"] >= loads + ("amsgrad" in key), key
            assert f["st16"] >= stores - (kernel == "inner_step" and "16" in dtype) + ("amsgrad" in key), key

    def test_no_register_is_idle(self, compiled, target):
        """A block more on a multiprocessor: three of an outer step, five of an inner one, for which 80 and 48 do."""
        for key, f in compiled[target].items():
            if "float64" not in key and "displaced" not in key:
                most = {"outer_step": 80, "inner_step": 48, "displace": 48}.get(key.split()[0], 32)
                assert f["registers"] <= most, key

    def test_products_and_sums_round_apart(self, compiled, target):
        """A contracted multiply-add would not equal the reference."""
        assert not any(f["contracted"] for f in compiled[target].values())

    def test_registers(self, compiled, target):
        """As in registers.json for this nvcc: a jump means fewer threads in flight on a multiprocessor."""
        table = json.loads((HERE / "registers.json").read_text())
        if version() not in table:
            pytest.skip(f"registers.json has {', '.join(table)}")
        assert {key: f["registers"] for key, f in compiled[target].items()} == table[version()][target]


if __name__ == "__main__":
    path = HERE / "registers.json"
    table = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        made = compile_all(Path(folder))
    table[version()] = {t: {key: f["registers"] for key, f in of_target.items()} for t, of_target in made.items()}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    json.dump(made, sys.stdout, indent=1)
