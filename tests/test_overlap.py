"""overlap_norm=True gives the same bits as without it, whatever happens to a gradient between its hook and `step()`."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from conftest import BACKENDS, DTYPES, assert_same, make_params, set_grads, values
from torch import nn

from nexus_fused import NexusAdamW, backends, overlap
from nexus_fused.table import CHUNK_ELEMENTS

FUSED = [name for name in BACKENDS if name != "reference"]
SHAPES = [(5, 3), (0,), (2, CHUNK_ELEMENTS // 2 + 100), (7,)]

pytestmark = pytest.mark.skipif(not FUSED, reason="needs a fused backend")


@pytest.fixture(params=FUSED)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    if "cpu" in FUSED:
        monkeypatch.setattr("nexus_fused.cpu.SMALLEST_HOOKED", 0)


@pytest.fixture
def calls(monkeypatch, backend):
    """What was asked of the backend: "one" for a gradient's sums, "all" for a table's, "add" for the addition alone."""
    module, names = backends.resolve(backend, None, torch.device("cpu")), []
    sq_norm, sum_squares = module.sq_norm, module.sum_squares

    def count_norm(table, *, summed=False):
        names.append("add" if summed else "all")
        return sq_norm(table, summed=summed)

    def count_sums(*args):
        names.append("one")
        sum_squares(*args)

    monkeypatch.setattr(module, "sq_norm", count_norm)
    monkeypatch.setattr(module, "sum_squares", count_sums)
    return names


def build(backend, dtype=torch.float32, shapes=SHAPES, **kwargs):
    """Parameters in two groups, one of them float64, and their optimizer."""
    params = [*make_params(*shapes, dtype=dtype), *make_params((6,), dtype=torch.float64, seed=1)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3}]
    return params, NexusAdamW(groups, **{"lr": 1e-2, "inner_lr": 0.05, "inner_steps": 2, "backend": backend, **kwargs})


def loss_of(params, seed):
    """A loss whose gradients are random, and depend on the parameters."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for p in params:
        wide = torch.complex128 if p.is_complex() else torch.float64
        x = torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype)
        product = p * x + 0.1 * p * p
        terms.append((product.real + product.imag if p.is_complex() else product).sum().double())
    return sum(terms)


def backward(params, seed, **kwargs):
    loss_of(params, seed).backward(**kwargs)


def outcome(params, optimizer):
    """All that training can tell."""
    state = optimizer.state_dict()["state"]
    tensors = [entry[name] for entry in state.values() for name in sorted(entry)]
    return [*values(params), *tensors, torch.tensor(optimizer.metrics()["grad_norms"], dtype=torch.float64)]


def compare(backend, scenario, **kwargs):
    """Runs `scenario(params, optimizer)` with and without overlap; returns the optimizer with."""
    results = []
    for overlap_norm in (False, True):
        params, optimizer = build(backend, overlap_norm=overlap_norm, **kwargs)
        for seed in range(3):  # a whole cycle and one step: all buffers exist
            backward(params, seed)
            optimizer.step()
            optimizer.zero_grad()
        params, optimizer = scenario(params, optimizer) or (params, optimizer)
        for seed in range(100, 103):
            backward(params, seed)
            optimizer.step()
            optimizer.zero_grad()
        results.append(outcome(params, optimizer))
    assert_same(*results)
    return optimizer


def finish(params, optimizer):
    optimizer.step()
    optimizer.zero_grad()


# What may happen between hook and step().


def accumulated_twice(params, optimizer):
    backward(params, 5)
    backward(params[1:], 6)
    finish(params, optimizer)


def retained_graph(params, optimizer):
    loss = loss_of(params, 5)
    loss.backward(retain_graph=True)
    loss.backward()
    finish(params, optimizer)


def created_graph(params, optimizer):
    backward(params, 5, create_graph=True)
    backward(params[:2], 6, create_graph=True)
    finish(params, optimizer)


def clipped(params, optimizer):
    for foreach in (True, False):
        backward(params, 5)
        nn.utils.clip_grad_norm_(params, 0.1, foreach=foreach)
        finish(params, optimizer)
        backward(params, 6)
        nn.utils.clip_grad_value_(params, 0.1, foreach=foreach)
        finish(params, optimizer)


def one_edited(params, optimizer):
    backward(params, 5)
    params[2].grad.mul_(3)
    finish(params, optimizer)


def edited_through_detach(params, optimizer):
    backward(params, 5)
    params[0].grad.detach().view(-1)[0] = 7
    finish(params, optimizer)


def replaced(params, optimizer):
    backward(params, 5)
    params[2].grad = params[2].grad * 2
    params[0].grad = params[0].grad.clone().mul_(2)
    finish(params, optimizer)


def data_replaced(params, optimizer):
    backward(params, 5)
    params[2].grad.data = params[2].grad.detach() * 2
    finish(params, optimizer)


def by_hand(params, optimizer):
    set_grads(params, 5)
    finish(params, optimizer)
    backward(params, 6)
    optimizer.zero_grad()
    for seed in range(10):  # new tensors where the old ones were, of the same version
        set_grads(params, seed)
        finish(params, optimizer)


def missing(params, optimizer):
    for seed, which in enumerate([slice(0, 2), slice(2, 3), slice(0, 0), slice(3, 5), slice(0, 5), slice(1, 2)]):
        if params[which]:
            backward(params[which], seed)
        finish(params, optimizer)


def dropped(params, optimizer):
    backward(params, 5)
    optimizer.zero_grad()
    backward(params[1:3], 6)
    finish(params, optimizer)
    backward(params, 5)
    params[2].grad = None
    finish(params, optimizer)
    backward(params, 5)
    optimizer.zero_grad()
    finish(params, optimizer)


def kept_gradients(params, optimizer):
    backward(params, 5)
    optimizer.step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    backward(params[:3], 6)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()


def closure(params, optimizer):
    def run():
        optimizer.zero_grad()
        backward(params, 5)
        loss = loss_of(params, 6)
        loss.backward()
        return loss

    assert optimizer.step(run) > -1e9
    optimizer.zero_grad()


def group_added(params, optimizer):
    backward(params, 5)
    params.extend(make_params((9,), (3, 4), dtype=params[0].dtype, seed=3))
    optimizer.add_param_group({"params": params[-2:-1]})
    optimizer.step()  # the new ones have no gradient
    optimizer.zero_grad()
    backward(params, 6)
    optimizer.add_param_group({"params": params[-1:]})
    finish(params, optimizer)


def frozen_for_a_while(params, optimizer):
    params[0].requires_grad_(False)
    backward(params[1:], 5)
    finish(params, optimizer)
    params[0].requires_grad_(True)


def frozen_from_the_start(params, optimizer):
    params.append(make_params((9,), dtype=params[0].dtype, seed=3)[0].requires_grad_(False))
    optimizer.add_param_group({"params": params[-1:]})
    backward(params[:-1], 5)
    finish(params, optimizer)
    params[-1].requires_grad_(True)


def other_layout(params, optimizer):
    backward(params, 5)
    params[0].grad = params[0].grad.t().contiguous().t()
    gradient = params[2].grad
    if gradient.dtype in (torch.float32, torch.float64):  # else nothing public makes a negated one
        params[2].grad = torch.complex(torch.zeros_like(gradient), -gradient).conj().imag
        assert params[2].grad.is_neg()
    finish(params, optimizer)
    params[0].grad = torch.ones(3, 5, dtype=params[0].dtype).t()
    backward(params, 6)  # accumulates in that layout
    finish(params, optimizer)


def partial_cycle(params, optimizer):
    backward(params, 5)
    optimizer.outer_step()
    optimizer.step()  # takes the gradient that outer_step() left
    optimizer.outer_step()
    optimizer.step()
    optimizer.zero_grad()


def looked_at(params, optimizer):
    backward(params, 5)
    with optimizer.outer_weights():
        loss_of(params, 6).item()
    finish(params, optimizer)


def amsgrad_switched(params, optimizer):
    backward(params, 5)
    for group in optimizer.param_groups:
        group["amsgrad"] = True
    finish(params, optimizer)


def reloaded(params, optimizer):
    backward(params, 5)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    finish(params, optimizer)


def copied(params, optimizer):
    backward(params, 5)
    params, optimizer = copy.deepcopy((params, optimizer))
    finish(params, optimizer)
    return params, optimizer


def pickled(params, optimizer):
    params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    backward(params, 5)
    finish(params, optimizer)
    return params, optimizer


def edited_by_a_later_hook(params, optimizer):
    def halve(p):
        p.grad.mul_(0.5)

    handle = params[2].register_post_accumulate_grad_hook(halve)
    for seed in (5, 6):
        backward(params, seed)
        finish(params, optimizer)
    handle.remove()


def dropped_by_a_later_hook(params, optimizer):
    def drop(p):
        p.grad = None

    handle = params[2].register_post_accumulate_grad_hook(drop)
    backward(params, 5)
    finish(params, optimizer)
    handle.remove()


def some_inputs_only(params, optimizer):
    backward(params, 5, inputs=params[1:3])
    torch.autograd.grad(loss_of(params, 6), params[:3])
    finish(params, optimizer)


def not_finite(params, optimizer):
    for bad in (float("nan"), float("inf")):
        (params[0] * bad).sum().backward()
        backward(params, 5)
        finish(params, optimizer)


def unscaled(params, optimizer):
    if params[0].dtype == torch.float16:  # which GradScaler refuses
        return
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for unscale in (True, False, True):
        scaler.scale(loss_of(params, 5)).backward()
        if unscale:
            scaler.unscale_(optimizer)  # leaves the versions of gradients as they are
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


SCENARIOS = [
    accumulated_twice, retained_graph, created_graph, clipped, one_edited, edited_through_detach, replaced,
    data_replaced, by_hand, missing, dropped, kept_gradients, closure, group_added, frozen_for_a_while,
    frozen_from_the_start, other_layout, partial_cycle, looked_at, amsgrad_switched, reloaded, copied, pickled,
    edited_by_a_later_hook, dropped_by_a_later_hook, some_inputs_only, not_finite, unscaled,
]  # fmt: skip


# The interpreter is slow: with Triton, what depends on the backend.
OF_TRITON = [accumulated_twice, missing, one_edited]
CASES = [
    pytest.param(backend, dtype, scenario, id=f"{backend}-{dtype}-{scenario.__name__}")
    for backend in FUSED
    for dtype in DTYPES
    for scenario in (OF_TRITON if backend == "triton" else SCENARIOS)
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph", "ignore:grad and param do not obey")
@pytest.mark.parametrize(("backend", "dtype", "scenario"), CASES)
def test_the_same_bits(backend, dtype, scenario):
    compare(backend, scenario, dtype=dtype)


@pytest.mark.parametrize("options", [{"inner_steps": 1}, {"inner_steps": 4}, {"flatten": False}], ids=str)
@pytest.mark.parametrize("scenario", [missing])
def test_options(backend, options, scenario):
    compare(backend, scenario, **options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("scenario", [accumulated_twice, missing, one_edited])
def test_complex(backend, dtype, scenario):
    compare(backend, scenario, dtype=dtype, shapes=[(5, 3), (7,), (0,), (4,)])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph", "ignore:grad and param do not obey")
def test_everything_in_a_row(backend):
    """What one scenario leaves must not fool the next."""

    def all_of_them(params, optimizer):
        few = [*OF_TRITON, other_layout, group_added, frozen_from_the_start, kept_gradients, partial_cycle, copied]
        for scenario in few if backend == "triton" else SCENARIOS:
            params, optimizer = scenario(params, optimizer) or (params, optimizer)
        return params, optimizer

    compare(backend, all_of_them)


def test_parameters_with_gaps_and_tied_ones(backend):
    results = []
    for overlap_norm in (False, True):
        torch.manual_seed(0)
        gaps, tied = nn.Parameter(torch.randn(6, 8)[:, ::2]), nn.Parameter(torch.randn(4, 6))
        optimizer = NexusAdamW([gaps, tied], backend=backend, inner_lr=0.05, overlap_norm=overlap_norm)
        for _ in range(9):
            x = torch.randn(3, 6)
            ((x @ gaps @ tied).sin() @ tied.t()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(outcome([gaps, tied], optimizer))
    assert_same(*results)


def test_step_only_adds_up(backend, calls):
    """Once the buffers of a cycle exist, each gradient is summed once, in its hook."""
    params, optimizer = build(backend, overlap_norm=True)
    for seed in range(8):
        calls.clear()
        backward(params, seed)
        assert calls == ["one"] * len(params)
        optimizer.step()
        if seed > 0:  # the first step of all makes the buffers
            assert calls[len(params) :] == ["add"] * 2
        optimizer.zero_grad()
    backward(params, 0)
    params[2].grad.mul_(2)
    calls.clear()
    optimizer.step()
    assert sorted(calls) == ["add", "add", "one"]
    nn.utils.clip_grad_norm_(params, 0.1)
    calls.clear()
    optimizer.step()
    assert calls == ["all", "all"]
    optimizer.step()
    optimizer.zero_grad()
    backward(params[:1], 1)
    calls.clear()
    optimizer.step()
    assert sorted(calls) == ["add", "all"]  # the other table has no gradient


def test_small_gradients_are_summed_in_step(monkeypatch):
    """On a CPU, where their hooks would cost more than they save."""
    pytest.importorskip("nexus_fused._C")
    monkeypatch.undo()
    params, _optimizer = build("cpu", overlap_norm=True)
    assert [len(p._post_accumulate_grad_hooks or ()) for p in params] == [0, 0, 1, 0, 0]
    compare("cpu", missing)
    compare("cpu", accumulated_twice)


def test_off_by_default(backend, calls):
    params, optimizer = build(backend)
    backward(params, 0)
    optimizer.step()
    assert calls == ["all", "all"]
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_thawed_parameters_get_hooks(backend, calls):
    params, optimizer = build(backend, overlap_norm=True)
    frozen_from_the_start(params, optimizer)
    for seed in range(3):
        backward(params, seed)
        calls.clear()
        finish(params, optimizer)
    assert calls == ["add", "add"]


@pytest.mark.parametrize("numel", [1, CHUNK_ELEMENTS, 5 * CHUNK_ELEMENTS + 3, 70 * CHUNK_ELEMENTS])
def test_threads_do_not_show(numel):
    pytest.importorskip("nexus_fused._C")
    threads, results = torch.get_num_threads(), []
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    try:
        for overlap_norm in (False, True):
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                p = nn.Parameter(torch.zeros(numel))
                optimizer = NexusAdamW([p], backend="cpu", inner_steps=2, overlap_norm=overlap_norm)
                for _ in range(4):
                    (p * gradient).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                results.append([p.detach(), torch.tensor(optimizer.metrics()["grad_norms"])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(results[0], other)


def test_gradients_are_not_kept(backend):
    params, optimizer = build(backend, overlap_norm=True)
    for _ in range(2):
        backward(params, 0)
        alive = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_hooks_go_with_the_optimizer(backend, with_gradients):
    params, optimizer = build(backend, overlap_norm=True)
    for seed in range(5):
        backward(params, seed)
        finish(params, optimizer)
    if with_gradients:
        backward(params, 5)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in params)
    gone = [weakref.ref(t) for table in optimizer._tables.values() for t in (table, table.partials)]
    gone += [weakref.ref(t) for table in optimizer._tables.values() for b in table.buckets for t in b.buffers.values()]
    gone.append(weakref.ref(optimizer))
    gc.disable()  # without cycles nothing waits for the collector
    try:
        del optimizer
        assert not any(p._post_accumulate_grad_hooks for p in params)
    finally:
        gc.enable()
    gc.collect()
    assert not any(ref() is not None for ref in gone)
    backward(params, 6)
    assert all(p.grad is not None for p in params)


def test_an_optimizer_that_was_never_built_leaves_no_hooks(backend):
    params = make_params((3,), (4,))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1, "eps": -1}]
    with pytest.raises(ValueError, match="group 1"):
        NexusAdamW(groups, backend=backend, overlap_norm=True)
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_parameters_are_saved_without_hooks(backend):
    params, optimizer = build(backend, overlap_norm=True)
    plain, other = build(backend)
    assert optimizer.state_dict().keys() == other.state_dict().keys()
    assert str(optimizer.state_dict()["param_groups"]) == str(other.state_dict()["param_groups"])
    memory = io.BytesIO()
    torch.save(nn.ParameterList(params).state_dict(), memory)
    torch.save(nn.ParameterList(params), memory)
    for p in copy.deepcopy(params) + pickle.loads(pickle.dumps(params)):
        assert not p._post_accumulate_grad_hooks
    for copies, twin in (copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))):
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in copies)
        assert twin._overlap_norm
    assert not any(p._post_accumulate_grad_hooks for p in copy.deepcopy((plain, other))[0])


def test_two_optimizers_on_the_same_parameters(backend):
    """Each has hooks and sums of its own."""
    results = []
    for overlap_norm in (False, True):
        params, first = build(backend, overlap_norm=overlap_norm, flatten=False)
        second = NexusAdamW(params[:2], backend=backend, flatten=False, overlap_norm=overlap_norm)
        for seed in range(9):
            backward(params, seed)
            (first if seed % 3 else second).step()
            first.zero_grad()
        results.append(outcome(params, first))
    assert_same(*results)


def test_an_error_in_a_hook_corrupts_nothing(backend, monkeypatch):
    module = backends.resolve(backend, None, torch.device("cpu"))
    sum_squares, fails = module.sum_squares, [False]

    def failing(table, segment, gradient):
        if fails[0] and segment.numel > 100:
            table.partials.fill_(float("nan"))
            raise torch.OutOfMemoryError("out of memory")
        sum_squares(table, segment, gradient)

    monkeypatch.setattr(module, "sum_squares", failing)

    def scenario(params, optimizer):
        fails[0] = optimizer._overlap_norm
        if fails[0]:
            with pytest.raises(torch.OutOfMemoryError):
                backward(params, 5)
        fails[0] = False
        for p in params:
            p.grad = None
        backward(params, 6)
        finish(params, optimizer)

    compare(backend, scenario)


def test_an_outdated_table_is_left_to_step(backend, monkeypatch):
    """After a failure between new rows and new partial sums a hook must not write where these would be."""

    def scenario(params, optimizer):
        for table in optimizer._tables.values():
            table._outdated = True
            for segment in table.segments:
                segment.chunk += 10**9
        backward(params, 5)
        finish(params, optimizer)

    compare(backend, scenario)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_converted_and_sparse_gradients_raise_in_step(backend):
    params, optimizer = build(backend, overlap_norm=True)
    params[0].grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (5, 3))
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    params, optimizer = build(backend, overlap_norm=True)
    for p in params:
        p.data = p.data.half()  # a hook must not read a float32 of these
    backward(params, 0)
    with pytest.raises(RuntimeError, match="convert or move"):
        optimizer.step()
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = NexusAdamW(embedding.parameters(), backend=backend, overlap_norm=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


class TestRefused:
    @pytest.mark.parametrize("value", [None, 1, "yes"])
    def test_not_a_bool(self, value):
        with pytest.raises(TypeError, match="overlap_norm must be True or False"):
            NexusAdamW(make_params((3,)), overlap_norm=value)

    @pytest.mark.parametrize("choice", [{"backend": "reference"}, {"fused": False}], ids=str)
    def test_reference(self, choice):
        params = make_params((3,))
        address = params[0].data_ptr()
        with pytest.raises(RuntimeError, match=r"sums the norm in step\(\): use overlap_norm=False"):
            NexusAdamW(params, overlap_norm=True, **choice)
        assert params[0].data_ptr() == address

    def test_a_fallback_is_the_reference(self, monkeypatch):
        monkeypatch.setattr(backends, "why_not", lambda *_, **__: "it is not built")
        with pytest.warns(UserWarning, match="runs its reference"), pytest.raises(RuntimeError, match="overlap_norm"):
            NexusAdamW(make_params((3,)), overlap_norm=True)

    def test_several_processes(self, monkeypatch, backend):
        params, optimizer = build(backend, overlap_norm=True)
        backward(params, 0)
        before = values(params)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        for refused in (optimizer.step, lambda: NexusAdamW(make_params((3,)), overlap_norm=True)):
            with pytest.raises(RuntimeError, match=r"2 processes.*use overlap_norm=False"):
                refused()
        assert_same(values(params), before)
        NexusAdamW(make_params((3,)))
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        optimizer.step()


def test_compiled_autograd(backend):
    """Its tracer meets the hook too, and leaves the sums to step()."""
    from torch._dynamo import config

    def scenario(params, optimizer):
        @torch.compile(backend="eager")
        def compiled():
            (params[0] * params[0]).sum().backward()

        with config.patch(compiled_autograd=True):
            for _ in range(3):
                compiled()
                finish(params, optimizer)
        torch._dynamo.reset()

    compare(backend, scenario)


def test_torch_may_have_no_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    overlap.check_processes()
