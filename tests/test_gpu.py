"""What only a GPU shows of the backends "cuda" and "triton": `pytest -m gpu`. Needs torch, triton and pytest, nothing
else; a backend that cannot run here is skipped.

Function by function the kernels equal reference.py on the same device bit for bit. Only these roundings may differ:
sums of float64 (norms, ‖D‖²) are taken in another order, and βᵗ, a power in PyTorch, is a power of another library or
exp2(t·log2 β), which is a few units of float64 in 1 − βᵗ for each 1/(1 − β). float32 scalars hide both, so whole runs
below float64 are compared bit for bit too (fixed seeds; a scalar that falls on the border of two float32 values is one
in 10⁷). In float64 they show: see `close_in_float64`.
"""

from __future__ import annotations

import copy
import gc
import shutil
from pathlib import Path

import inside
import pytest
import torch
from conftest import DTYPES, assert_same, exact, values
from kernel_tables import (
    LOW,
    OFFSETS,
    SIZES,
    check_conversions,
    compare,
    make_table,
    sq_norm,
)
from torch import nn

import nexus_fused.table
from nexus_fused import Nexus, NexusAdamW, backends, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # of whatever torch the machine with the GPU has
]

CUDA = torch.device("cuda", 0)
FUSED = ["cuda", "triton"]  # the one that None takes first
SHAPES = [(300, 257), (129,), (0, 4), (1,), (64, 33), (40000,)]
BETA_UNITS = 1e-14  # what 20 units of float64 in 1 − βᵗ do to an update of length 1
FUNCTIONS = ["inner_step", "outer_step", "end_walk", "adamw", "gradients"]


@pytest.fixture(params=FUSED)
def backend(request):
    """The name of one that runs here; the test is skipped where it does not."""
    reason = backends.why_not(request.param, CUDA)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def only(*names):
    """Other backends than all of FUSED."""
    return pytest.mark.parametrize("backend", names, indirect=True)


def fresh_gradient(p, generator, dtype=None):
    """A new random gradient, the same on every device and, rounded, for every dtype (None: the parameter's)."""
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, dtype or p.dtype)


def make_params(dtypes, device=CUDA):
    """Parameters of SHAPES for each dtype."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
        for dtype in dtypes
        for shape in SHAPES
    ]


def build(dtypes, backend, device=CUDA, **options):
    """These parameters in three groups, and their optimizer with K = 4."""
    params = make_params(dtypes, device)
    groups = [
        {"params": params[0::3]},
        {"params": params[1::3], "lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        {"params": params[2::3], "inner_lr": 0.02, "eps": 1e-6, "normalize_displacement": False},
    ]
    defaults = {"lr": 1e-2, "betas": (0.9, 0.99), "inner_lr": 0.05, "inner_steps": 4}
    return params, NexusAdamW(groups, backend=backend, **{**defaults, **options})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def contents_of(optimizer):
    """Weights and state, in order; of a remainder its bits."""
    params = params_of(optimizer)
    state = [(name, optimizer.state[p][name].clone()) for p in params for name in sorted(optimizer.state[p])]
    return [p.detach().clone() for p in params] + [
        values.view(torch.int16) if name == "remainder" else values for name, values in state
    ]


def train(optimizer, params, steps, *, missing=False, nan_at=(), grad_dtype=None):
    """Micro-batches with new gradients at new addresses; what is missing differs from step to step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(params):
            gradient = fresh_gradient(p, generator, grad_dtype)
            if step in nan_at and i == 1:
                gradient[-1] = float("nan")
            p.grad = None if missing and (i + step) % 3 == 0 else gradient
        optimizer.step()
    optimizer.zero_grad()


def close_in_float64(left, right):
    """Whole runs in float64: units of γ/n and of βᵗ. Where the steps of a walk cancel, units are a larger part of what
    is left of D, and AdamW divides by √v: an element moves by lr·2⁻⁵²·max|D|/|D| differently, 1e-13 where D is 1e-5 of
    it."""
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-11, atol=1e-11)


def compare_with_the_reference(make, backend, irregular):
    """Three and a half cycles of what `make` makes for each of both; the last is ended early."""
    results, optimizers = [], []
    for which in (backend, "reference"):
        params, optimizer = make(which)
        train(optimizer, params, 14, missing=irregular, nan_at=(1, 7) if irregular else ())
        optimizer.outer_step()
        results.append(contents_of(optimizer))
        optimizers.append(optimizer)
    compare_metrics(*optimizers)
    for left, right in zip(*results, strict=True):
        # One norm over all parameters: with float64 among them the others still see it rounded to float32.
        (close_in_float64 if left.dtype == torch.float64 else assert_same)([left], [right])


def compare_metrics(left, right):
    a, b = left.metrics(), right.metrics()
    for name in ("skipped_inner_steps", "skipped_outer_steps"):
        assert a[name] == b[name]
    assert a["lost_fraction"] == pytest.approx(b["lost_fraction"], abs=1e-4)
    assert a["alignment"] == pytest.approx(b["alignment"], rel=1e-6, abs=1e-9, nan_ok=True)
    assert a["grad_norms"] == pytest.approx(b["grad_norms"], rel=1e-10, nan_ok=True)


# The kernels


def test_the_reference_scales_on_a_gpu_as_on_a_cpu():
    """γ·g/n needs exact powers of two from PyTorch's frexp, ldexp and pow; everything below rests on it."""
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for exponent in range(-140, 120, 7):
        factor = torch.tensor(1.2345678901234567 * 2.0**exponent, dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            on_cpu = reference.scaled_gradient(g, factor, dtype)
            assert_same([on_cpu], [reference.scaled_gradient(g.to(CUDA), factor.to(CUDA), dtype).cpu()])


def compare_all(name, dtype, *functions, **table):
    for function in functions or FUNCTIONS:
        compare(function, name, dtype, device=CUDA, tolerance=BETA_UNITS, **table)


def compare_norms(name, table):
    torch.testing.assert_close(sq_norm(name, table), reference.sq_norm(table), rtol=1e-12, atol=0)


@pytest.mark.parametrize("storage", LOW, ids=str)
def test_every_conversion(backend, storage):
    """Is the reference's."""
    check_conversions(backend, storage, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestKernelParity:
    @pytest.mark.parametrize("offsets", OFFSETS)
    def test_sizes_and_alignments(self, backend, dtype, offsets):
        """Of all sizes in one table: on a GPU a test is hundreds of launches, whatever their size."""
        sizes = [*SIZES, 5, *reversed(SIZES)]
        compare_norms(backend, make_table(dtype, sizes, offsets=offsets, device=CUDA))
        for touched in ((), range(len(sizes)), range(0, len(sizes), 2)):
            compare_all(backend, dtype, sizes=sizes, offsets=offsets, touched=touched)

    def test_many_chunks(self, backend, dtype):
        compare_all(backend, dtype, sizes=[1_000_003, 3, 200_000], touched=(0, 2), flatten=True)

    def test_displacements_in_full_precision(self, backend, dtype):
        kept_in = {"displacement_dtype": torch.float32}
        for flatten in (False, True):
            compare_all(backend, dtype, sizes=[20_003, 3, 200], touched=(0, 2), flatten=flatten, **kept_in)

    @pytest.mark.parametrize("offsets", OFFSETS)
    def test_gradients_of_any_dtype(self, backend, dtype, offsets):
        """Wherever they lie: their alignment is one of 16 bytes, and their elements are of another size."""
        sizes = [20_003, 3, 0, 200]
        for grad_dtype in DTYPES:
            made = {"sizes": sizes, "offsets": offsets, "grad_dtype": grad_dtype}
            compare_norms(backend, make_table(dtype, device=CUDA, **made))
            compare_all(backend, dtype, touched=(0, 2), **made)

    def test_local_walks(self, backend, dtype):
        """θ is kept beside w: written by the first inner step, read at the end."""
        for touched in ((), (0,), (0, 1, 2, 3)):
            table = {"sizes": [50, 20_003, 7000, 80], "touched": touched, "anchor": True}
            compare_all(backend, dtype, "inner_step", "end_walk", "adamw", gradients=(1, 2), **table)
            compare_all(backend, dtype, "adamw", moved=(1, 3), **table)
            compare_all(backend, dtype, "adamw", moved=(1, 3), last_gradient=False, gradients=(), **table)

    @pytest.mark.parametrize("kept_in", [torch.bfloat16, torch.float32], ids=str)
    def test_tables_without_moments(self, backend, dtype, kept_in):
        """As others' optimizers have them; a move is lost there that leaves a parameter below float32 where it was."""
        for touched in ((), (0, 2)):
            table = {"sizes": [70_001, 3, 200, 0], "touched": touched, "keeps": (), "displacement_dtype": kept_in}
            compare_all(backend, dtype, "inner_step", "end_walk", "gradients", **table)
            compare_all(backend, dtype, "gradients", moved=(1, 2), offsets=(0, 1), **table)

    @pytest.mark.parametrize("groups", [3, 20])
    def test_sums_of_several_groups(self, backend, dtype, groups):
        """Of a few and of many, for which the CUDA kernels have different ways."""
        table = {"sizes": [7, 0, 20_000, 5] * 6, "touched": (0, 1, 2, 7), "groups": groups}
        compare_all(backend, dtype, "outer_step", "adamw", "gradients", **table)

    def test_nothing_but_empty(self, backend, dtype):
        assert sq_norm(backend, make_table(dtype, [0, 0], device=CUDA)) == 0
        compare_all(backend, dtype, sizes=[0, 0])

    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_who_takes_part(self, backend, dtype, amsgrad):
        for touched in ((), (0,), (0, 1), (0, 1, 2, 3)):
            compare_all(backend, dtype, sizes=[50, 60, 7000, 80], touched=touched, gradients=(1, 2), amsgrad=amsgrad)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_skipped_step(self, backend, dtype, bad):
        for touched in ((), (0,), (0, 1)):
            compare_all(backend, dtype, sizes=[4000, 9], touched=touched, bad=bad)


# The optimizer

SETTINGS = [{}, {"amsgrad": True, "displacement_dtype": torch.float32}, {"maximize": True}]


class TestOptimizerParity:
    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    @pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
    @pytest.mark.parametrize("irregular", [False, True], ids=["all gradients", "missing and NaN gradients"])
    def test_reference_on_the_same_device(self, backend, dtypes, options, irregular):
        """Three and a half cycles; the last is ended early."""
        compare_with_the_reference(lambda which: build(dtypes, which, **options), backend, irregular)

    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_reference_on_a_cpu(self, backend, options):
        """In float64, so that no rounding to float32 hides a difference of the formula."""
        results = []
        for device, which in ((CUDA, backend), (torch.device("cpu"), "reference")):
            params, optimizer = build([torch.float64], which, device, **options)
            train(optimizer, params, 14, missing=True, nan_at=(4,))
            optimizer.outer_step()
            results.append(contents_of(optimizer))
        close_in_float64(*results)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradients_of_another_dtype(self, backend, dtype):
        """They are read as they are."""
        results = []
        for which in (backend, "reference"):
            params, optimizer = build([dtype], which)
            for p in params:
                p.grad_dtype = None
            train(optimizer, params, 10, missing=True, grad_dtype=torch.bfloat16)
            train(optimizer, params, 4, grad_dtype=torch.float32)
            results.append(contents_of(optimizer))
        assert_same(*results)


@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
@pytest.mark.parametrize("irregular", [False, True], ids=["all gradients", "missing and NaN gradients"])
def test_nexus_before_another_optimizer(backend, dtypes, options, irregular):
    """As with the reference on the same device, which hands the same gradients to torch.optim.AdamW."""

    def made(which):
        params = make_params(dtypes)
        groups = [{"params": params[0::2]}, {"params": params[1::2], "lr": 3e-3}]
        return params, Nexus(torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, **options), inner_lr=0.05, backend=which)

    compare_with_the_reference(made, backend, irregular)


def test_two_runs_give_the_same_bits(backend):
    results = []
    for _ in range(2):
        params, optimizer = build(DTYPES, backend, amsgrad=True)
        train(optimizer, params, 10, missing=True, nan_at=(4,))
        results.append(contents_of(optimizer))
    assert_same(*results)


def test_resuming_in_mid_cycle_gives_the_same_bits(backend):
    straight, optimizer = build(DTYPES, backend)
    train(optimizer, straight, 6)
    halves, first = build(DTYPES, backend)
    train(first, halves, 6)
    resumed, second = build(DTYPES, backend)
    with torch.no_grad():
        for p, q in zip(resumed, halves, strict=True):
            p.copy_(q)
    second.load_state_dict(first.state_dict())
    for params, each in ((straight, optimizer), (resumed, second)):
        train(each, params, 6)
    assert_same(contents_of(optimizer), contents_of(second))


# The host


@pytest.fixture
def no_synchronization():
    """Call it: from then on, whatever makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["float", "tensor", "tensor on the device"])
def test_the_host_never_waits(no_synchronization, backend, kind, offload):
    """Whole cycles and outer_step(), with new gradients and a new lr in each step and a loss scale on the device."""
    lr = 1e-2 if kind == "float" else torch.tensor(1e-2, device="cpu" if kind == "tensor" else CUDA)
    params, optimizer = build(
        [torch.float32, torch.bfloat16], backend, lr=lr, capturable=kind == "tensor on the device", offload=offload
    )
    if kind == "tensor on the device":  # schedulers of some versions read it
        schedule = lambda: optimizer.param_groups[0]["lr"].mul_(0.9)  # noqa: E731
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)).step
    scale, overflow = torch.full((), 1024.0, device=CUDA), torch.zeros((), device=CUDA)
    kept = []
    for step in range(15):
        if step == 4:  # after one cycle: buffers are there, kernels compiled
            no_synchronization()
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, device=CUDA)
        kept.append([p.grad for p in params])  # so that the next ones lie elsewhere
        optimizer.grad_scale, optimizer.found_inf = scale, overflow
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        optimizer.zero_grad()
        schedule()
    optimizer.outer_step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)
    assert optimizer.metrics()["skipped_inner_steps"] == 0


def test_overflow_on_the_device_skips_the_step(backend):
    params, optimizer = build([torch.float32], backend)
    train(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.ones((), device=CUDA)
    train(optimizer, params, 1)
    assert_same(before, params)
    assert optimizer.metrics()["skipped_inner_steps"] == 1


def test_addresses_that_change_make_no_difference(monkeypatch, backend):
    """New memory for each gradient, None before it, or always the same memory; the table is uploaded only when an
    address changed, and once per step then."""
    uploads = []
    upload = nexus_fused.table.upload
    monkeypatch.setattr(nexus_fused.table, "upload", lambda *args: (uploads.append(1), upload(*args)))
    results = []
    for fixed in (True, False):
        generator = torch.Generator().manual_seed(2)
        params, optimizer = build([torch.bfloat16], backend)
        for p in params:
            p.grad = torch.zeros_like(p)
        kept = []
        for step in range(13):
            for p in params:
                if fixed:
                    p.grad.copy_(fresh_gradient(p, generator))
                else:
                    p.grad = None
                    p.grad = fresh_gradient(p, generator)
                    kept.append(p.grad)
            uploads.clear()
            optimizer.step()
            if step >= 4:
                assert len(uploads) == (0 if fixed else 1)
        results.append(contents_of(optimizer))
    assert_same(*results)


def test_launches(backend):
    """Of kernels, copies not counted: as many for two dtypes as twice for one."""
    inner, outer = {"cuda": (2, 2), "triton": (3, 4)}[backend]
    counts = {}
    for dtypes in ([torch.float32], [torch.float32, torch.bfloat16]):
        params, optimizer = build(dtypes, backend)
        for p in params:
            p.grad = torch.randn(p.shape, device=CUDA).to(p.dtype)
        for _ in range(4):
            optimizer.step()
        kernels_of(optimizer.zero_grad)  # a first profile may lose events
        for p in params:
            p.grad = torch.randn(p.shape, device=CUDA).to(p.dtype)
        counts[len(dtypes)] = [kernels_of(optimizer.step) for _ in range(4)]
    if not any(counts[1]):
        pytest.skip("torch.profiler sees no kernels here")
    for n, names in counts.items():
        assert max(map(len, names[:3])) <= inner * n, names
        assert len(names[3]) <= outer * n, names


def kernels_of(function):
    """bench.gpu's count. The folder is searched only here: in it, nexus_fused would be found instead of what is
    installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)
        from bench.gpu import kernel_launches
    return kernel_launches(function)


@only("triton")
def test_nothing_is_compiled_twice(monkeypatch, backend):
    """Hyperparameters, position, number of groups and parameters, sizes, who has a gradient: all at run time."""
    import triton

    compiled = []
    params, optimizer = build([torch.float32], backend)
    train(optimizer, params, 5, missing=True, nan_at=(1,))
    optimizer.outer_step()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs["repr"]))
    for group in optimizer.param_groups:
        group.update(lr=1.0, inner_lr=1.0, eps=1.0, weight_decay=0.0, betas=(0.5, 0.5), maximize=True)
    train(optimizer, params, 9, missing=True)
    for shapes, inner_steps in ([(1,)], 1), ([(16,)] * 40, 2), ([(70_000,), (16384,)], 16), ([(3, 5)] * 7, 17):
        params = [nn.Parameter(torch.randn(shape, device=CUDA)) for shape in shapes]
        optimizer = NexusAdamW([{"params": [p]} for p in params], inner_steps=inner_steps, backend=backend)
        train(optimizer, params, inner_steps)
        train(optimizer, params, 1)
        optimizer.outer_step()
    assert not compiled


# Memory, streams, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_than_int32_elements(backend, dtype):
    """A parameter of 2³¹ + 4099 elements moves as a small one made of pieces of it.

    Its gradients are small integers, so that sums of squares are exact in any order; a second small parameter has the
    few powers of two whose squares make up what the pieces lack, and thus both norms are the same number.
    """
    free_memory()
    if torch.cuda.mem_get_info(CUDA)[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    n, piece = 2**31 + 4099, 2**26
    edges = [0, 2**30, 2**31 - 16384, 2**31, n - 3000]
    ranges = [slice(max(0, edge - 2500), min(n, edge + 3000)) for edge in edges]
    generator = torch.Generator(CUDA).manual_seed(0)
    big = torch.empty(n, dtype=dtype, device=CUDA)
    for start in range(0, n, piece):
        big[start : start + piece].normal_(generator=generator)
    small = nn.Parameter(torch.cat([big[r] for r in ranges]))
    filler = nn.Parameter(torch.zeros(64, dtype=dtype, device=CUDA))
    big = nn.Parameter(big)
    options = {"lr": 1e-2, "inner_lr": 1.0, "inner_steps": 2, "weight_decay": 0.1, "backend": backend}
    theirs, ours = NexusAdamW([small, filler], **options), NexusAdamW([big], **options)
    big.grad = torch.empty_like(big)
    for _ in range(4):
        squares = 0
        for start in range(0, n, piece):
            part = big.grad[start : start + piece]
            part.copy_(torch.randint(-3, 4, part.shape, generator=generator, device=CUDA))
            squares += int(part.float().square().sum(dtype=torch.float64))
        small.grad = torch.cat([big.grad[r] for r in ranges])
        lacking = squares - int(small.grad.float().square().sum(dtype=torch.float64))
        digits = [lacking >> 2 * i & 3 for i in range(21)]  # base 4: squares of powers of two
        values = [2.0**i for i, digit in enumerate(digits) for _ in range(digit)]
        assert sum(v * v for v in values) == lacking
        filler.grad = torch.tensor(values + [0.0] * (64 - len(values)), device=CUDA).to(dtype)
        theirs.step()
        ours.step()
        assert_same([small.detach()], [torch.cat([big.detach()[r] for r in ranges])])
    assert ours.metrics()["grad_norms"] == theirs.metrics()["grad_norms"]
    for name, left in theirs.state[small].items():
        right = ours.state[big][name]
        right = right if name == "step" else torch.cat([right[r] for r in ranges])
        assert_same(*[[t.view(torch.int16) if name == "remainder" else t] for t in (left, right)])


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "bytes_at_peak"),
    [(torch.float32, torch.float32, 18), (torch.float32, torch.bfloat16, 16), (torch.bfloat16, torch.bfloat16, 16)],
    ids=str,
)
def test_memory_of_a_cycle(backend, dtype, grad_dtype, bytes_at_peak, offload):
    """Per parameter, at the peak: a weight of 4 bytes, its gradient, two moments of 4, D of 2. With `offload` the
    moments are elsewhere."""
    bytes_at_peak -= 8 * offload
    free_memory()
    numel, n = 4 * 2**20, 4
    before = torch.cuda.memory_allocated(CUDA)
    params = [nn.Parameter(torch.ones(numel, dtype=dtype, device=CUDA)) for _ in range(n)]
    optimizer = NexusAdamW(params, backend=backend, offload=offload)
    for p in params:
        p.grad_dtype = grad_dtype
    torch.cuda.reset_peak_memory_stats(CUDA)
    for _ in range(9):
        for p in params:
            p.grad = torch.ones(numel, dtype=grad_dtype, device=CUDA)
        optimizer.step()
        optimizer.zero_grad()
    most = torch.cuda.max_memory_allocated(CUDA) - before
    # Beside it tables, sums of chunks and scalars, and what the allocator rounds up: 512 bytes a tensor.
    assert bytes_at_peak * n * numel <= most <= bytes_at_peak * n * numel + 2**18


def test_a_stream_with_work_in_flight(backend):
    """Forward, backward and step on a stream of their own, each gradient late, give the default stream's bits."""
    results = []
    side = torch.cuda.Stream(CUDA)
    for stream in (torch.cuda.default_stream(CUDA), side):
        params, optimizer = build([torch.float32, torch.bfloat16], backend)
        inputs = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(p) for p in params]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for step in range(9):
                if stream is side:
                    torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
                # Elementwise, since matrix products may differ between streams.
                sum((p * x * (step + 1)).sin().float().sum() for p, x in zip(params, inputs, strict=True)).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(contents_of(optimizer))
        torch.cuda.synchronize()
    assert_same(*results)


@pytest.mark.parametrize("numel", [1, 16385, 1_000_003, 10_000_001])
def test_sums_beside_another_streams_work(backend, numel):
    """The last block to arrive adds up what the others wrote: the same sum from grids of any size, while products on
    another stream take and leave the processors."""
    table = make_table(torch.float32, [numel], device=CUDA)
    run, other, a = backends.resolve(backend, None, CUDA), torch.cuda.Stream(), torch.randn(2048, 2048, device=CUDA)
    first, wrong = None, torch.zeros((), dtype=torch.int64, device=CUDA)
    for i in range(300):
        if i % 30 == 0:
            with torch.cuda.stream(other):
                a @ a
        norm = run.sq_norm(table).clone()
        first = norm if first is None else first
        wrong += (norm != first).sum()
    assert wrong == 0


def test_the_host_far_ahead(backend):
    """Learning rates and addresses of several steps are on their way at once, from pinned memory that is used again."""
    results = []
    for ahead in (False, True):
        params, optimizer = build([torch.float32, torch.bfloat16], backend)
        generator = torch.Generator(CUDA).manual_seed(0)
        for step in range(41):
            if ahead:
                torch.cuda._sleep(10_000_000)  # cycles: about 5 ms
            for i, p in enumerate(params):
                gradient = torch.randn(p.shape, generator=generator, device=CUDA).to(p.dtype)
                p.grad = None if (i + step) % 3 == 0 else gradient
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step % 7)
            optimizer.step()
            if not ahead:
                torch.cuda.synchronize()
        results.append([*contents_of(optimizer), torch.tensor(optimizer.metrics()["grad_norms"])])
    assert_same(*results)


def test_parameters_can_be_sent_to_another_process(backend):
    """By CUDA IPC, as torch.multiprocessing and weight synchronization do; only where they stayed where they were: what
    lies within flat memory has no handle of its own."""
    from torch.multiprocessing.reductions import reduce_tensor

    params = [nn.Parameter(torch.randn(1000, device=CUDA)) for _ in range(3)]
    NexusAdamW(params, backend=backend, flatten=False)
    for p in params:
        reduce_tensor(p.detach())


# Moments in host memory

everywhere = only(*FUSED, "reference")


class TestOffload:
    @staticmethod
    def late(optimizer, params):
        """Takes three steps and an outer one that the device begins some 0.1 s from now; returns its gradients."""
        train(optimizer, params, 3)
        for p in params:
            p.grad = torch.ones_like(p)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles
        optimizer.step()
        return [p.grad for p in params]

    @everywhere
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_same_results(self, backend, amsgrad):
        results = []
        for offload in (False, True):
            params, optimizer = build(DTYPES, backend, amsgrad=amsgrad, offload=offload)
            train(optimizer, params, 10, missing=True, nan_at=(4,))
            with optimizer.outer_weights():
                shown = [p.detach().clone() for p in params]
            results.append([value.cpu() for value in (*shown, *contents_of(optimizer))])
            for name, value in optimizer.state[params[0]].items():
                on_host = offload and name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                assert (value.device.type, value.is_pinned()) == (("cpu", True) if on_host else ("cuda", False)), name
        assert_same(*results)

    @everywhere
    def test_saving_waits(self, backend):
        results = []
        for offload in (False, True):
            params, optimizer = build([torch.float32], backend, offload=offload)
            kept = self.late(optimizer, params)
            entries = optimizer.state_dict()["state"].values()
            results.append([entry[name].cpu().clone() for entry in entries for name in ("exp_avg", "exp_avg_sq")])
            del kept
        assert_same(*results)

    @everywhere
    def test_loading_waits(self, backend):
        params, optimizer = build([torch.float32], backend, offload=True)
        train(optimizer, params, 4)
        saved = copy.deepcopy(optimizer.state_dict())
        kept = self.late(optimizer, params)
        optimizer.load_state_dict(saved)
        torch.cuda.synchronize()
        for entry, own in zip(saved["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
            assert_same([own["exp_avg"], own["exp_avg_sq"]], [entry["exp_avg"], entry["exp_avg_sq"]])
        del kept

    def test_memory_that_is_let_go(self, backend):
        """Pinned memory of an optimizer that is gone is given to nobody before its last outer step is done."""
        params, optimizer = build([torch.float32], backend, offload=True)
        train(optimizer, params, 4)
        kept = self.late(optimizer, params)
        sizes = [b.numel for t in inside.tables(optimizer) for b in t.buckets for _ in ("exp_avg", "exp_avg_sq")]
        del optimizer
        gc.collect()
        others = [torch.full((size,), 7.0, pin_memory=True) for size in sizes]
        torch.cuda.synchronize()
        assert all(bool((other == 7).all()) for other in others)
        del kept


# Steps captured into CUDA graphs


class Training:
    """Cycles of forward and backward passes on inputs that lie in memory of their own, with a step after each: eagerly
    or captured. The learning rate lies on the device, so that a graph's replays follow it, and γ with it."""

    def __init__(self, backend, **options):
        options = {"lr": torch.tensor(1e-2, device=CUDA), "capturable": True, **options}
        self.params, self.optimizer = build([torch.float32, torch.bfloat16], backend, **options)
        self.inputs = self.new_inputs()

    def new_inputs(self):
        """Those of each micro-batch."""
        return [[torch.zeros_like(p, requires_grad=False) for p in self.params] for _ in range(4)]

    def prepare(self, seed):
        """What comes before a cycle: new inputs, a scheduled learning rate."""
        generator = torch.Generator().manual_seed(seed)
        for inputs in self.inputs:
            for x in inputs:
                x.copy_(fresh_gradient(x, generator))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(1e-2 / (1 + seed))

    def step(self, k):
        self.optimizer.zero_grad(set_to_none=True)
        # Elementwise, since matrix products may differ between streams.
        sum((p * x).sin().float().sum() for p, x in zip(self.params, self.inputs[k], strict=True)).backward()
        self.optimizer.step()

    def cycle(self):
        for k in range(4):
            self.step(k)

    def warm_up(self):
        """A cycle on a side stream, as torch recommends before a capture."""
        side = torch.cuda.Stream(CUDA)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.cycle()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self):
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.cycle()
        return graph

    def results(self):
        return contents_of(self.optimizer)


def two_after_a_cycle(backend, **options):
    """A training that is going to be captured and its twin, which never is."""
    pair = Training(backend, **options), Training(backend, **options)
    for training in pair:
        training.prepare(0)
        training.warm_up()
    return pair


def assert_equal_training(captured, eager):
    """After one more cycle of both, eagerly."""
    for training in (captured, eager):
        training.prepare(100)
        training.cycle()
    assert_same(captured.results(), eager.results())
    assert captured.optimizer.metrics() == eager.optimizer.metrics()


class TestGraphs:
    @everywhere
    @pytest.mark.parametrize("offload", [False, True])
    def test_replays_equal_eager_steps(self, backend, offload):
        """With new inputs and learning rates at each replay, eager cycles in between, and metrics of either."""
        captured, eager = two_after_a_cycle(backend, offload=offload)
        graph = captured.capture()
        for seed, replayed in enumerate((True, True, False, True, False, False, True), start=1):
            for training in (captured, eager):
                training.prepare(seed)
            graph.replay() if replayed else captured.cycle()
            eager.cycle()
            assert captured.optimizer.metrics() == eager.optimizer.metrics()
            assert captured.optimizer.at_boundary
        assert_same(captured.results(), eager.results())
        assert_equal_training(captured, eager)

    @only(*FUSED)
    def test_eager_steps_at_the_addresses_that_were_captured(self, backend):
        """Gradients that lie ready in memory of their own; the graph has not run when eager steps read them."""
        captured, eager = two_after_a_cycle(backend)
        generator = torch.Generator().manual_seed(5)
        for training in (captured, eager):
            for p in training.params:
                p.grad = torch.zeros_like(p)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(4):
                captured.optimizer.step()
        for replayed in (False, True, False):
            for p, q in zip(captured.params, eager.params, strict=True):
                gradient = fresh_gradient(p, generator)
                p.grad.copy_(gradient)
                q.grad.copy_(gradient)
            for _ in range(4):
                eager.optimizer.step()
                if not replayed:
                    captured.optimizer.step()
            if replayed:
                graph.replay()
            assert_same(captured.results(), eager.results())

    @only(*FUSED)
    def test_two_graphs(self, backend):
        """Alive at the same time, each with inputs and gradients of its own, replayed in any order."""
        captured, eager = two_after_a_cycle(backend)
        graphs, inputs = [], []
        for seed in (1, 2):
            inputs.append([captured.new_inputs(), eager.new_inputs()])
            captured.inputs, eager.inputs = inputs[-1]
            graphs.append(captured.capture())
            for training in (captured, eager):
                training.prepare(seed)
                training.cycle()
        for seed, which in enumerate((0, 1, 1, 0, None, 1, 0), start=3):
            captured.inputs, eager.inputs = inputs[which or 0]
            for training in (captured, eager):
                training.prepare(seed)
            captured.cycle() if which is None else graphs[which].replay()
            eager.cycle()
        assert_same(captured.results(), eager.results())
        assert_equal_training(captured, eager)

    @only(*FUSED)
    @pytest.mark.parametrize("step_is_captured", [False, True])
    def test_backward_passes(self, backend, step_is_captured):
        """inner_steps=None: a graph of one pass, replayed several times in a cycle, eager ones in between."""
        ends = []
        for captured in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).cuda()
            options = {"lr": 1e-2, "inner_lr": 0.05, "inner_steps": None, "capturable": True, "backend": backend}
            optimizer = NexusAdamW(model.parameters(), **options)
            inputs = torch.randn(4, 8, device="cuda")

            def run_pass(model=model, inputs=inputs):
                model(inputs).square().mean().backward()

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run_pass()
                optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
            calls = {"pass": run_pass, "step": optimizer.step}
            for name in ("pass", "step") if step_is_captured else ("pass",):
                if captured:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        calls[name]()
                    calls[name] = graph.replay
            for passes in (4, 2, 0, 1, 3):
                for i in range(passes):
                    inputs.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * passes + i)))
                    run_pass() if i == 2 else calls["pass"]()
                assert optimizer.cycle_position == passes
                calls["step"]()
            metrics = optimizer.metrics()
            ends.append([*values(model.parameters()), torch.tensor(metrics["grad_norms"])])
        assert_same(*ends)

    @everywhere
    def test_refused_without_capturable(self, backend):
        captured, eager = two_after_a_cycle(backend)
        captured.optimizer.param_groups[1]["capturable"] = False
        self.refused(captured, "capturable is False in parameter group 1")
        assert_equal_training(captured, eager)

    @everywhere
    def test_refused_in_mid_cycle(self, backend):
        captured, eager = two_after_a_cycle(backend)
        for training in (captured, eager):
            training.step(0)
        self.refused(captured, "in mid-cycle, after 1 of 4 inner steps: begin the capture at a boundary")
        for training in (captured, eager):
            for k in range(1, 4):
                training.step(k)
        assert_equal_training(captured, eager)

    @everywhere
    def test_refused_before_a_first_cycle(self, backend):
        captured, eager = Training(backend), Training(backend)
        for p in captured.params:
            p.grad = torch.ones_like(p)
        self.refused(captured, r"run at least one whole cycle \(4 steps\) before the capture")
        assert_equal_training(captured, eager)

    @everywhere
    def test_ended_in_mid_cycle(self, backend):
        """The next step tells; what was captured has not run, and training goes on from before it."""
        captured, eager = two_after_a_cycle(backend)
        captured.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            captured.step(0)
            captured.step(1)
        with pytest.raises(RuntimeError, match="ended in mid-cycle, after 2 of 4 inner steps"):
            captured.step(0)
        assert captured.optimizer.at_boundary
        assert_equal_training(captured, eager)
        graph = captured.capture()
        for training in (captured, eager):
            training.prepare(7)
        graph.replay()
        eager.cycle()
        assert_equal_training(captured, eager)

    @staticmethod
    def refused(training, message):
        """step() raises while it is captured; leaving `torch.cuda.graph` ends the capture, also then."""
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            training.optimizer.step()
        assert not torch.cuda.is_current_stream_capturing()


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
def test_another_current_device(backend):
    results = []
    for current in (0, 1):
        with torch.cuda.device(current):
            params, optimizer = build([torch.float32], backend, torch.device("cuda", 1))
            train(optimizer, params, 9)
            results.append(contents_of(optimizer))
    assert_same(*results)


@needs_two
def test_parameters_on_two_devices(backend):
    """The norm is one over both."""
    results = []
    for devices in ((0, 0), (0, 1)):
        params = [p for d in devices for p in build([torch.float32], backend, torch.device("cuda", d))[0]]
        params = [nn.Parameter(p.detach()) for p in params]
        optimizer = NexusAdamW(params, lr=1e-2, inner_lr=0.05, backend=backend)
        train(optimizer, params, 9)
        results.append([t.cpu() for t in contents_of(optimizer)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_devices_do_not_disturb_each_other(backend):
    """Two cycles on one device stand for two devices: each takes the norm over both tables, whoever goes first."""
    results = []
    for split in (False, True):
        params, optimizer = build([torch.float32, torch.float64], backend)
        if split:
            inside.split_work(optimizer)
        train(optimizer, params, 9)
        results.append(contents_of(optimizer))
    assert_same(*results)


# Which backend runs


def test_cuda_runs_where_it_was_built():
    """Where a machine has a CUDA compiler. Else all of its tests would be skipped, and nobody would notice."""
    kernels = pytest.importorskip("nexus_fused._C")
    if torch.version.hip is not None or not (kernels.CUDA_TARGETS or shutil.which("nvcc")):
        pytest.skip("no GPU of NVIDIA's, or no CUDA compiler")
    assert kernels.CUDA_TARGETS, "nvcc is there, but nexus_fused was built without its CUDA kernels"
    reason = backends.why_not("cuda", CUDA)
    if torch.cuda.get_device_capability(CUDA) < (8, 0) or "update the driver" in (reason or ""):
        pytest.skip(reason)
    assert reason is None


@pytest.mark.filterwarnings("error::UserWarning:nexus_fused")
def test_none_means_cuda_and_else_triton(monkeypatch):
    running = [name for name in FUSED if backends.why_not(name, CUDA) is None]
    for name in running:
        _, optimizer = build([torch.float32], None)
        assert inside.backends_of(optimizer) == [name]
        monkeypatch.setattr(f"nexus_fused.{name}.why_not_on", lambda device, dtype, displacement_dtype: "not here")


def test_cpu_tensors_are_refused(backend):
    with pytest.raises(RuntimeError, match=r"its kernels run on a GPU .* backend='(cpu|reference)' would run"):
        build([torch.float32], backend, torch.device("cpu"))


def test_grad_scaler(backend):
    """torch's own, with a scale that is a power of two and an overflow: as if the gradients were not scaled."""
    results = []
    for scaled in (False, True):
        params, optimizer = build([torch.float32], backend)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=scaled)
        generator = torch.Generator().manual_seed(4)
        for step in range(6):
            loss = sum((p * fresh_gradient(p, generator)).sum() for p in params)
            scaler.scale(loss).backward()
            if step == 2:
                params[1].grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update(2.0**10)
            optimizer.zero_grad()
        results.append(contents_of(optimizer))
        assert optimizer.metrics()["skipped_inner_steps"] == 1
    assert_same(*results)


# One GPU as a group of processes


@pytest.fixture
def group():
    """The default process group, of this process alone, on NCCL."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("this PyTorch has no NCCL")
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp2(backend, group, offload):
    """Sharded over one rank, with evaluations in mid-cycle: as if it were not. With `offload` the parts of the state's
    DTensors lie in host memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results = []
    for shard in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 33), nn.LayerNorm(33), nn.Linear(33, 8)).to(CUDA)
        if shard:
            mesh = init_device_mesh("cuda", (1,))
            for layer in module:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
        options = {"lr": 1e-2, "inner_lr": 0.05, "inner_steps": 3, "backend": backend}
        optimizer = NexusAdamW(module.parameters(), offload=offload and shard, **options)
        generator, seen = torch.Generator().manual_seed(1), []
        for _ in range(8):
            batch = torch.randn(4, 64, generator=generator).to(CUDA)
            module(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with optimizer.outer_weights(), torch.no_grad():
                seen.append(module(batch))
        parts = [*module.parameters(), *(optimizer.state[p]["exp_avg"] for p in module.parameters())]
        parts = [p.to_local() if shard else p for p in parts]
        assert all(part.is_pinned() == (offload and shard) for part in parts[-6:])
        optimizer.load_state_dict(optimizer.state_dict())
        results.append([p.detach().to(CUDA, copy=True) for p in parts] + seen)
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestWalksOfOneRank:
    """D is averaged over one rank, by NCCL."""

    @staticmethod
    def trained(backend, dtype, **options):
        params, optimizer = build([dtype], backend, **options)
        train(optimizer, params, 11, missing=True, nan_at=(4,))
        return optimizer

    def test_offload(self, backend, group, dtype):
        """The anchor is on the host too."""
        ours, theirs = (
            self.trained(backend, dtype, displacement_group=group, offload=offload) for offload in (True, False)
        )
        assert ours.state[params_of(ours)[0]]["anchor"].is_pinned()
        assert_same(*([values.cpu() for values in contents_of(each)] for each in (ours, theirs)))

    @pytest.mark.parametrize("displacement_dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_reference(self, backend, group, dtype, displacement_dtype):
        options = {"displacement_group": group, "displacement_dtype": displacement_dtype}
        ours, theirs = (self.trained(which, dtype, **options) for which in (backend, "reference"))
        assert_same(contents_of(ours), contents_of(theirs))
        assert ours.metrics()["skipped_inner_steps"] == 1

    def test_norm_group(self, backend, group, dtype):
        alone, one_of_one = self.trained(backend, dtype), self.trained(backend, dtype, norm_group=group)
        assert_same(contents_of(alone), contents_of(one_of_one))

    def test_one_walk_is_its_own_mean(self, backend, group, dtype):
        """In float32 D comes back from memory as it was: moments are equal. θ is exact where there is an anchor, and
        else w + D, which may be two units in the last place off, in each of two cycles and in the walk under way."""
        alone, local = (
            self.trained(backend, dtype, displacement_dtype=torch.float32, displacement_group=of)
            for of in (None, group)
        )
        for p, q in zip(params_of(alone), params_of(local), strict=True):
            for name in ("step", "exp_avg", "exp_avg_sq", "displacement"):
                assert_same([alone.state[p][name]], [local.state[q][name]])
            torch.testing.assert_close(exact(alone, p), exact(local, q), rtol=2**-20, atol=2**-22)


def test_ddp(backend, group):
    from torch.nn.parallel import DistributedDataParallel

    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 33), nn.LayerNorm(33), nn.Linear(33, 8)).to(CUDA)
        run = DistributedDataParallel(module) if parallel else module
        optimizer = NexusAdamW(run.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=3, backend=backend)
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            run(torch.randn(4, 64, generator=generator).to(CUDA)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in module.parameters()])
    assert_same(*results)
