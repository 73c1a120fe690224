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
NAME = re.compile(r"(sq_norm|inner_step|end_walk|gradients|outer_step)_kernel(?:I(\w+?)EEv)?")
DTYPES = {"BFloat16": "bfloat16", "Float16": "float16", "FullPrecisionIf": "float32", "FullPrecisionId": "float64"}
THREADS, REGISTERS = 256, 65536  # of a block, of a multiprocessor


def readable(mangled):
    """Kernel, dtypes of parameters and displacements, "amsgrad"."""
    kernel, arguments = NAME.search(mangled).groups(default="")
    dtypes = [DTYPES[found] for found in re.findall("|".join(DTYPES), arguments)]
    dtypes *= 2 if len(dtypes) == 1 else 1  # the same type is not written out twice
    return " ".join([kernel, *dtypes, *["amsgrad"] * ("Lb1" in arguments)])


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
        # Four values of 2 bytes may be one of 8, as a row's addresses are.
        wide, half = r"v4\.[buf]32|v2\.[buf]64", r"v2\.[buf]32|v4\.[buf]16|(?<!v2\.)[bu]64"
        for access, form in {"ld16": wide, "st16": wide, "ld8": half, "st8": half}.items():
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
        """On the aligned path every array is read and written 16 bytes at a time, or 8 where four elements have no more
        (beside those that the kernel for float64 has: addresses); so are gradients of every dtype."""
        # w, D, G, the anchor or a moment. Twice, as gradients may be misaligned; for a batch and for the rest.
        read = {"inner_step": "wD", "end_walk": "wDs", "gradients": "D", "outer_step": "wDss"}
        written = {"inner_step": "wDs", "end_walk": "wD", "gradients": "G", "outer_step": "wss"}
        of_made = compiled[target]
        assert len(of_made) == 1 + 3 * 7 + 2 * 7  # dtypes; with amsgrad too
        assert of_made["sq_norm"]["ld16"] == 4 * (4 + 1)  # dtypes; a batch and the rest
        for key, f in of_made.items():
            if "float64" in key or key == "sq_norm":
                continue
            kernel, dtype, of_displacement, *amsgrad = key.split()
            wide = {"w": dtype == "float32", "D": of_displacement == "float32", "s": True}
            wide["G"] = wide["w"]
            if kernel == "gradients" and not wide["w"] and not wide["D"]:  # eight of two bytes
                wide["G"] = wide["D"] = True
            copies = {"inner_step": 6, "gradients": 1}.get(kernel, 2)
            others = of_made[" ".join([kernel, "float64", "float64", *amsgrad])]
            for access, names in {"ld": read[kernel], "st": written[kernel]}.items():
                whole = sum(wide[name] for name in names) + len(amsgrad)
                half = sum((2 if name == "w" else 1) for name in names if not wide[name])
                # Of a gradient, once: one load of float32 and two of float64; one each of bfloat16 and float16.
                given = access == "ld" and kernel != "gradients"
                gradients = {16: 3 * copies // 2, 8: 2 * copies // 2} if given else {16: 0, 8: 0}
                assert f[f"{access}16"] >= copies * whole + gradients[16], (key, access)
                beside = others[f"{access}8"] - gradients[8] // 2
                assert f[f"{access}8"] >= copies * half + gradients[8] + beside, (key, access)

    def test_no_register_is_idle(self, compiled, target):
        """A block more on a multiprocessor: three of an outer step, four of an inner one or of the end of a walk, for
        which 80 and 64 do."""
        for key, f in compiled[target].items():
            if "float64" not in key and ("amsgrad" not in key or "16" not in key.split()[1]):
                most = {"outer_step": 80, "sq_norm": 32}.get(key.split()[0], 64)
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
