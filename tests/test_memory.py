"""How much memory a training step takes: at its peak, in a process of its own; and what `memory` says, all of it."""

from __future__ import annotations

import gc
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, sample

from nexus_fused import Nexus, NexusAdamW, __main__, memory
from nexus_fused.flat import STATE_DTYPE
from nexus_fused.table import hashed

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from bench.cost_measured import live  # noqa: E402

MIB = 2**20
F32, BF16 = torch.float32, torch.bfloat16

SCRIPT = """
import resource, sys, torch
from nexus_fused import NexusAdamW
dtype, grad_dtype = (getattr(torch, name) for name in sys.argv[1:3])
flatten, displacement_dtype = sys.argv[3] == "True", getattr(torch, sys.argv[4])
offload, on_host = sys.argv[5] == "True", 0  # bytes
if offload:  # the CPU plays a GPU, whose host pins memory
    import inside

    def pinned_zeros(numel, dtype):
        global on_host
        on_host += numel * dtype.itemsize
        return torch.zeros(numel, dtype=dtype).fill_(0)  # in memory at once, as pinned memory is

    class Patch:
        setattr = staticmethod(setattr)

    inside.offload_on_cpu(Patch, pinned_zeros, None)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def peak():  # since the last reset
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def reset():
    open("/proc/self/clear_refs", "w").write("5")

def train(params, optimizer):
    for p in params:
        p.grad = torch.full_like(p, 1e-3, dtype=grad_dtype)
    for _ in range(5):
        optimizer.step()

def make(n, *shape):
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for _ in range(n)]
    for p in params:
        p.grad_dtype = grad_dtype
    return params

def build(params):
    return NexusAdamW(params, flatten=flatten, displacement_dtype=displacement_dtype, offload=offload)

warm_up = make(1, 10)
train(warm_up, build(warm_up))
before, on_host = resident(), 0
params = make(6, 4096, 8192)  # 192 Mi elements, in pieces so large that malloc gives each back to the system at once
reset()
optimizer = build(params)
print(peak() - before)
reset()
train(params, optimizer)
print(peak() - before)
print(on_host)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "flatten", "displacement_dtype", "offload", "bytes_at_peak"),
    [
        ("float32", "float32", True, "bfloat16", False, 18),
        ("float32", "bfloat16", True, "bfloat16", False, 16),
        ("bfloat16", "bfloat16", True, "bfloat16", False, 16),
        ("float32", "float32", False, "float32", False, 20),
        ("bfloat16", "bfloat16", False, "bfloat16", False, 16),
        ("float32", "float32", True, "bfloat16", True, 10),
        ("float32", "bfloat16", True, "bfloat16", True, 8),
        ("bfloat16", "bfloat16", True, "bfloat16", True, 8),
    ],
)
def test_resident_memory(dtype, grad_dtype, flatten, displacement_dtype, offload, bytes_at_peak):
    """At the peak of a cycle: a weight of 4 bytes (below float32: a parameter and a remainder), its gradient, two
    moments of 4, and D. As much as AdamW in float32 or with a float32 master, 16, and D where gradients are float32.

    With `offload` the moments are pinned memory, which is taken off.

    Construction: parameters, moments and remainders, and at most one bucket of 512 MiB. 24 MiB for allocators and code.
    """
    command = [sys.executable, "-c", SCRIPT, dtype, grad_dtype, str(flatten), displacement_dtype, str(offload)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    elements = 6 * 4096 * 8192
    construction, training, on_host = (int(line) for line in output)
    training -= on_host
    assert construction <= elements * (4 + 8) + 512 * MIB + 24 * MIB
    assert elements * bytes_at_peak - 24 * MIB <= training <= elements * bytes_at_peak + 24 * MIB
    sizes = [getattr(torch, name).itemsize for name in (grad_dtype, displacement_dtype)]
    assert on_host == 8 * elements * offload
    assert bytes_at_peak == 4 + 8 * (not offload) + sum(sizes)


# The command


SHAPES = [(1000, 400), (300, 1000), (64,), (299_936,)]
ELEMENTS = 1_000_000
BESIDE = 8192  # bytes: padding, steps, partial sums, rows and scalars


@pytest.fixture(scope="module")
def frozen():
    hashed(torch.device("cpu"))  # one for the process, 128 KiB
    yield
    gc.unfreeze()


@pytest.fixture
def alone(frozen):
    """`live()` counts what is made from here on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make(dtype, gradients=None):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    for p in params:
        p.grad_dtype = gradients or dtype
    return params


def train(params, optimizer, steps):
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p, dtype=p.grad_dtype)
        optimizer.step()


def assert_held(expected):
    held = live()
    assert ELEMENTS * expected <= held <= ELEMENTS * expected + BESIDE, (held / ELEMENTS, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner_steps", [1, 4, 33])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("displacements", [None, F32])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("flatten", sample([True, False], True))
def test_nexus_adamw(dtype, inner_steps, amsgrad, displacements, local, flatten, alone, request):
    """Tensors that are alive in mid-cycle, while there are gradients; with K = 1, after a step."""
    group = request.getfixturevalue("process_group") if local else None
    params = make(dtype)
    options = {"amsgrad": amsgrad, "displacement_dtype": displacements, "displacement_group": group}
    optimizer = NexusAdamW(params, inner_steps=inner_steps, flatten=flatten, **options)
    train(params, optimizer, min(inner_steps, 2))
    counted = memory.nexus_adamw(dtype, inner_steps, amsgrad=amsgrad, displacements=displacements, local=local)
    assert counted.host == 0
    assert_held(counted.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_offload(dtype, amsgrad, alone):
    """Here both are the host's memory: the sum."""
    params = make(dtype)
    optimizer = NexusAdamW(params, amsgrad=amsgrad, offload=True)
    train(params, optimizer, 2)
    counted = memory.nexus_adamw(dtype, 4, amsgrad=amsgrad, offload=True)
    assert_held(counted.device + counted.host)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner_steps", [1, 4, 33])
@pytest.mark.parametrize("displacements", [None, F32])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nexus(dtype, inner_steps, displacements, momentum, alone):
    """In the middle of the second cycle; with K = 1, after a step, whose gradients are gone."""
    params = make(dtype)
    optimizer = Nexus(
        torch.optim.SGD(params, lr=0.1, momentum=momentum), inner_steps=inner_steps, displacement_dtype=displacements
    )
    train(params, optimizer, inner_steps + inner_steps // 2)
    counted = memory.nexus(dtype, inner_steps, dtype.itemsize if momentum else 0, displacements=displacements)
    assert_held(counted.device - counted.gradient * (inner_steps == 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradients", DTYPES, ids=str)
def test_gradients_of_another_dtype(dtype, gradients, alone):
    params = make(dtype, gradients)
    optimizer = NexusAdamW(params)
    train(params, optimizer, 3)
    assert_held(memory.nexus_adamw(dtype, 4, gradients=gradients).device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("master", [False, True])
def test_adamw(dtype, amsgrad, master, alone):
    """With a master: AdamW of float32 copies, whose gradients are gone once they are applied."""
    params = make(dtype)
    state = STATE_DTYPE[dtype]
    own = [torch.nn.Parameter(p.detach().to(state)) for p in params] if master and state != dtype else params
    optimizer = torch.optim.AdamW(own, amsgrad=amsgrad)
    train(own, optimizer, 1)
    if own is not params:
        for p, copy in zip(params, own, strict=True):
            p.grad, copy.grad = torch.ones_like(p), None
    assert_held(memory.adamw(dtype, master=master, amsgrad=amsgrad).device)


def sums(arguments, capsys):
    """What the command prints: bytes per parameter on the device and on the host of each row, and GiB of both."""
    __main__.main(["memory", *arguments])
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"(.+?) {2,}(.*)", line) for line in lines[4 : lines.index("", 4)]]
    cells = {row[1]: [float(cell.replace(",", "")) for cell in row[2].split()] for row in rows}
    assert all(sum(row[:4]) == row[4] for row in cells.values())
    return {name: row[4:] for name, row in cells.items()}


NEXUS_F32, OFFLOADED, LOCAL = (
    f"NexusAdamW, {option}" for option in ("displacement_dtype=torch.float32", "offload=True", "local walks")
)
OURS = ["NexusAdamW", NEXUS_F32, OFFLOADED, LOCAL, "Nexus(AdamW)"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", [16, 18, 20, 10, 22, 18]),
        ("--gradients bfloat16", [16, 16, 18, 8, 20, 18]),
        ("--dtype bfloat16", [8, 16, 18, 8, 20, 12]),
        ("--dtype float16", [8, 16, 18, 8, 20, 12]),
        ("--dtype float64", [32, 40, 40, 24, 48, 40]),
        ("--amsgrad", [20, 22, 24, 10, 26, 22]),
        ("--dtype bfloat16 --amsgrad", [10, 20, 22, 8, 24, 14]),
        ("--inner-steps 1", [16, 16, 16, 8, 18, 20]),
        ("--inner-steps 32", [16, 18, 20, 10, 22, 18]),
        ("--inner-steps 33", [16, 20, 20, 12, 24, 20]),
    ],
)
def test_sums(arguments, expected, capsys):
    found = sums(["1M", *arguments.split()], capsys)
    assert {name: row[0] for name, row in found.items() if "master" not in name} == dict(
        zip(["AdamW", *OURS], expected, strict=True)
    )
    moments = (16 if "float64" in arguments else 8) + 4 * ("amsgrad" in arguments)
    assert {name: row[2] for name, row in found.items() if row[2]} == {OFFLOADED: moments}


@pytest.mark.parametrize(("arguments", "expected"), [("", 16), ("--gradients float32", 18), ("--amsgrad", 20)])
def test_adamw_with_a_master(arguments, expected, capsys):
    """Below float32; above, weights are their own."""
    name = "AdamW, float32 master"
    assert sums(["1M", "--dtype", "bfloat16", *arguments.split()], capsys)[name][0] == expected
    assert name not in sums(["1M", *arguments.split()], capsys)


@pytest.mark.parametrize("state", ["4", "2", "0", "2.5"])
@pytest.mark.parametrize(("dtype", "walk"), [("float32", 2), ("bfloat16", 4)])
def test_in_front_of_another_optimizer(dtype, walk, state, capsys):
    found = sums(["1M", "--dtype", dtype, "--state-bytes", state], capsys)
    plain = 2 * getattr(torch, dtype).itemsize + float(state)
    assert [found[name][0] for name in ("another optimizer", "Nexus(another optimizer)")] == [plain, plain + walk]


@pytest.mark.parametrize("size", ["7e9", "7B", "7b", "7000000000", "7000M"])
@pytest.mark.parametrize("ranks", [1, 8, 1000])
def test_gib_of_a_rank(size, ranks, capsys):
    each = 7e9 / ranks / 2**30
    found = sums([size, "--ranks", str(ranks)], capsys)
    assert found.keys() == {"AdamW", *OURS}
    for device, gib, host, gib_on_host in found.values():
        assert [gib, gib_on_host] == pytest.approx([device * each, host * each], abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["memory"], "required: parameters"),
        *(
            (["memory", size], "argument parameters: must be a number")
            for size in ("B", "7X", "0", "nan", "inf", "1e999B")
        ),
        (["memory", "7B", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["memory", "7B", "--gradients", "int8"], "argument --gradients: invalid choice"),
        (["memory", "7B", "--inner-steps", "0"], "argument --inner-steps: must be a whole number of at least 1"),
        (["memory", "7B", "--ranks", "1.5"], "argument --ranks: must be a whole number of at least 1"),
        (["memory", "7B", "--state-bytes=-1"], "argument --state-bytes: must be a number of at least 0"),
        (["memroy"], "argument command: invalid choice: 'memroy' .*report.*memory"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(arguments)
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--help"], ["memory", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        __main__.main(arguments)
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("report", "memory") if len(arguments) == 1 else ("7e9, 7B or 350M", "--state-bytes", "--ranks", "K"):
        assert word in shown


def test_report_is_what_no_command_prints(capsys):
    __main__.main([])
    without = capsys.readouterr().out
    assert without.startswith("nexus_fused ")
    __main__.main(["report"])
    assert capsys.readouterr().out == without


PAGE = ROOT / "docs" / "memory.md"


def test_commands_of_the_page(capsys):
    shown = re.findall(r"```\n\$ python -m nexus_fused (.*?)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(shown) == PAGE.read_text().count("$ python -m nexus_fused") >= 2
    for arguments, output in shown:
        __main__.main(shlex.split(arguments))
        assert capsys.readouterr().out == output


def test_what_readme_says():
    """Both dtypes' bytes at the peak, ours against AdamW's, which keeps a float32 master in bfloat16."""
    sums = [(d, memory.nexus_adamw(d, 4).device, memory.adamw(d, master=True).device) for d in (torch.float32, BF16)]
    quoted = ", ".join(
        f"{ours} against {theirs} in {str(dtype).removeprefix('torch.')}" for dtype, ours, theirs in sums
    )
    assert f"| memory at the peak of a step, bytes per parameter | {quoted} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", ["docs/algorithm.md", "docs/memory.md"])
def test_tables_of_the_pages(path):
    """Bytes per parameter, a row for each dtype."""
    lines = (ROOT / path).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r"\| (parameters)? ?\| weight \| gradient \|", line))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first + 2 : lines.index("", first)]]
    assert len(rows) == 4
    for name, weight, gradient, moments, walk, device, *other in rows:
        gradients = BF16 if name.endswith("bfloat16 gradients") else None
        for dtype in (getattr(torch, word) for word in name.removesuffix(", bfloat16 gradients").split(", ")):
            own = memory.nexus_adamw(dtype, 4, gradients=gradients)
            assert sum(map(int, re.findall(r"\d+", weight))) == own.weight
            assert [int(gradient), int(moments), int(walk), int(device)] == [*own[1:4], own.device]
            for cell in filter(None, other):
                assert int(cell.split()[0].rstrip(",")) == memory.adamw(dtype, master=True).device
