"""What an installed package must be."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import inside
import pytest
import torch

import nexus_fused
from nexus_fused import backends

ROOT = Path(__file__).parent.parent


def test_report_of_this_machine():
    """`python -m nexus_fused` names every backend, and for a missing one the reason."""
    output = subprocess.run([sys.executable, "-m", "nexus_fused"], capture_output=True, text=True, check=True).stdout
    assert nexus_fused.__version__ in output
    assert torch.__version__ in output
    for name, reason in backends.available().items():
        if name == "cuda" and not torch.cuda.is_available():
            reason = "these tests let it run on CPU tensors"
        assert re.search(rf"{name} +({'available' if reason is None else 'missing: .+'})", output)
    expected = "none" if backends.available()["cpu"] else "avx512|avx2|baseline"
    assert re.search(rf"instructions .*({expected})", output)


@pytest.fixture
def not_installed(monkeypatch):
    """No other package of this name is found."""
    monkeypatch.setattr(backends, "sys", types.SimpleNamespace(path=[]))


def test_missing_extension_is_explained(monkeypatch, not_installed):
    """Without compiled kernels the reference runs, and says what to do; an explicit backend raises."""
    monkeypatch.setitem(sys.modules, "nexus_fused._C", None)
    parameter = [torch.nn.Parameter(torch.zeros(3))]
    assert "install a C++ compiler" in str(backends.available()["cpu"])
    with pytest.warns(UserWarning, match=r"runs its reference on cpu.*install a C\+\+ compiler"):
        optimizer = nexus_fused.NexusAdamW(parameter)
    assert inside.backends_of(optimizer) == ["reference"]
    for options in ({"backend": "cpu"}, {"fused": True}):
        with pytest.raises(RuntimeError, match=r"install a C\+\+ compiler"):
            nexus_fused.NexusAdamW(parameter, **options)


class TestWhyThereIsNoExtension:
    """A compiler is not to blame where something else is."""

    @pytest.fixture
    def source(self, tmp_path):
        """A clone of the repository, in which nothing was built."""
        copied = shutil.copytree(ROOT / "nexus_fused", tmp_path / "clone" / "nexus_fused", ignore=self.built)
        (copied.parent / "csrc").mkdir()
        return copied

    @staticmethod
    def built(_, names):
        return [name for name in names if name.startswith("_C.") and name != "_C.pyi"]

    @staticmethod
    def said_in(folder, *paths):
        """The line about the CPU kernels that `python -m nexus_fused` prints in a folder.

        -S: without what an editable install puts before all paths.
        """
        everything = [*paths, Path(torch.__file__).parents[1]]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, everything)), "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-S", "-m", "nexus_fused"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return re.search(r"^  cpu +(.*)$", done.stdout, re.MULTILINE)[1]

    def test_the_source_hides_the_installed_package(self, source, tmp_path):
        """README's command in a clone, after `pip install .`."""
        extension = pytest.importorskip("nexus_fused._C")
        installed = shutil.copytree(source, tmp_path / "site-packages" / "nexus_fused")
        shutil.copy(extension.__file__, installed)
        said = self.said_in(source.parent, installed.parent)
        assert f"source in {source}, which hides the package installed in {installed}: run from another folder" in said
        assert f"(in {source.parent}: pip install -e .)" in said
        assert "compiler" not in said
        assert self.said_in(tmp_path, installed.parent) == "available"

    def test_a_source_that_was_not_installed(self, source, not_installed):
        said = backends.how_to_get_the_extension(source / "backends.py")
        assert said.startswith("install a C++ compiler (such as g++) if there is none, and then the source that Python")
        assert said.endswith(f"(in {source.parent}: pip install -e .)")

    def test_built_for_another_python(self, source, not_installed):
        (source / "_C.cpython-39-x86_64-linux-gnu.so").touch()
        said = backends.how_to_get_the_extension(source / "backends.py")
        assert said.startswith("_C.cpython-39-x86_64-linux-gnu.so was built for another Python: with this one install")

    def test_it_does_not_load(self, source):
        """It lacks a library here, for example."""
        (source / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no extension")
        said = self.said_in(source.parent)
        assert "nexus_fused._C is installed but does not load (" in said
        assert "compiler" not in said

    def test_triton_does_not_load(self, source, tmp_path):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "triton.py").write_text("raise ImportError('libcuda.so.1')")
        command = "from nexus_fused import __main__; __main__.main()"
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{source.parent}"}
        done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
        assert "triton is installed but does not load (libcuda.so.1): provide what it asks for" in done.stdout, (
            done.stderr
        )


def test_remedies_name_what_a_user_has():
    """The package is on no index, and without --no-deps pip may exchange torch."""
    sources = [*(ROOT / "nexus_fused").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert len(sources) > 20
    for source in sources:
        for command in re.findall(r"pip install [^`\n]*", source.read_text()):
            assert not re.search(r"\bnexus[_-]fused\b", command), f"{source}: {command}"


@pytest.mark.parametrize("threads", [1, 3])
def test_one_thread_without_openmp_is_said(monkeypatch, threads):
    extension = pytest.importorskip("nexus_fused._C")
    monkeypatch.setattr(extension, "OPENMP", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = pytest.warns(UserWarning, match="runs on one thread where PyTorch uses 3: .*libomp-dev.* --no-deps")
    with said if threads > 1 else contextlib.nullcontext():
        nexus_fused.NexusAdamW([torch.nn.Parameter(torch.zeros(3))], backend="cpu")


def test_missing_triton_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in str(backends.available()["triton"])
    with pytest.raises(RuntimeError, match=r"pip install triton.* backend='cpu' would run"):
        nexus_fused.NexusAdamW([torch.nn.Parameter(torch.zeros(3))], backend="triton")


def test_one_openmp_runtime():
    """Two would keep two pools of threads that fight for the cores."""
    code = (
        "import torch, nexus_fused._C; "
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("reads /proc")
    pytest.importorskip("nexus_fused._C")
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) <= 1


def test_triton_kernels_are_ours_alone():
    """Installed as nexus_fused.triton_kernels: the top-level name belongs to a distribution of the Triton project."""
    assert importlib.util.find_spec("nexus_fused.triton_kernels") is not None
    site_packages = [Path(p) for p in sys.path if p.endswith("site-packages")]
    assert not any((p / "triton_kernels" / "__init__.py").exists() for p in site_packages)


def test_no_module_imports_in_a_circle():
    folder = ROOT / "nexus_fused"
    modules = {path.stem: path.read_text() for path in folder.glob("*.py")}
    imports = {}
    for name, text in modules.items():
        found = re.findall(r"^\s*from \. import (.+)$", text, re.MULTILINE)
        named = {word.split()[0] for line in found for word in line.split(",")}
        imports[name] = (named | set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE))) & modules.keys()
    while imports:
        free = [name for name, needed in imports.items() if not needed & imports.keys()]
        assert free, f"a circle among {', '.join(imports)}"
        imports = {name: needed for name, needed in imports.items() if name not in free}
