"""What the backends for a device share, shown on CPU tensors: uploads, offsets, scalars, captured steps."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import inside
import pytest
import torch
from conftest import BACKENDS, assert_same, assert_snapshot, build, run, set_grads, snapshot, values
from kernel_tables import contents, make_cycle, make_table, run_function
from torch import nn

from nexus_fused import NexusAdamW, cuda, graphs, options
from nexus_fused import cycle as cycles
from nexus_fused import table as tables
from nexus_fused.cycle import MicroBatch
from nexus_fused.table import CHUNK_ELEMENTS, COLUMNS

ON_DEVICES = [name for name in ("triton", "cuda") if name in BACKENDS]
if not ON_DEVICES:
    pytest.skip("needs kernels for a GPU that run on CPU tensors", allow_module_level=True)

pytestmark = pytest.mark.interpreted


@pytest.fixture(params=ON_DEVICES)
def backend(request):
    return request.param


@pytest.fixture
def uploads(monkeypatch):
    """What was copied to the device: the shape of each copy of rows."""
    copied = []

    def count(tensor, target, *_):
        copied.extend([tuple(tensor.shape)] * (tensor.shape[-1] == len(COLUMNS)))
        target.copy_(tensor)

    monkeypatch.setattr(tables, "upload", count)
    return copied


def test_table_is_uploaded_only_when_an_address_changes(uploads, backend):
    params, optimizer = build((5, 3), (7,), (9,), backend=backend, inner_steps=3)
    unused = params.pop()  # has no gradient, ever
    assert unused.grad is None
    set_grads(params, 0)
    optimizer.step()
    assert uploads == [(3, len(COLUMNS))]
    for _ in range(8):
        optimizer.step()
    assert len(uploads) == 1
    kept = [p.grad for p in params]
    for step in range(2, 8):
        kept.append(params[0].grad)
        params[0].grad = params[0].grad.clone()
        optimizer.step()
        assert len(uploads) == step
    params[1].grad = None  # does not move on, but has moved: who is touched must be told
    optimizer.step()
    assert len(uploads) == 8


def test_hyperparameters_are_uploaded_only_when_they_change(monkeypatch, backend):
    copied = []
    monkeypatch.setattr("nexus_fused.cycle.upload", lambda tensor, target, *_: (copied.append(1), target.copy_(tensor)))
    params, optimizer = build((5, 3), backend=backend)
    run(optimizer, params, 5)
    assert len(copied) == 1
    optimizer.param_groups[0]["lr"] *= 0.5
    run(optimizer, params, 2)
    assert len(copied) == 2


def test_hyperparameters_on_a_device(monkeypatch, backend):
    """Learning rates that lie on a device, here played by CPU tensors that are not read, give the same bits."""
    read = options.number
    results = []
    for on_device in (False, True):
        if on_device:  # as a tensor elsewhere: not read
            monkeypatch.setattr(
                options,
                "number",
                lambda value, name, allowed: value if name.startswith("lr ") else read(value, name, allowed),
            )
        params, optimizer = build((5, 3), backend=backend, lr=torch.tensor(0.02, dtype=torch.float64))
        for step in range(8):
            optimizer.param_groups[0]["lr"].fill_(0.02 / (step + 1))
            run(optimizer, params, 1, first_seed=step)
        results.append(values(params))
    assert_same(*results)


def test_an_outer_step_leaves_the_norm_alone(backend):
    """Other devices may read it later: each finishes the cycle by itself."""
    table, cycle = make_table(torch.float32, [50, 3 * CHUNK_ELEMENTS], touched=(0, 1)), make_cycle(backend)
    norm = cycle.backend.sq_norm(table)
    before = norm.clone()
    run_function("outer_step", table, cycle, MicroBatch([norm], 0))
    assert_same([norm], [before])


def test_chunks_are_balanced():
    """A large parameter is cut into many programs, a small one is one, an empty one none."""
    sizes = [5 * CHUNK_ELEMENTS + 1, 3, 0, CHUNK_ELEMENTS, 1]
    table = make_table(torch.float32, sizes)
    _, row_of_chunk, starts, _ = table.on_device()
    assert row_of_chunk.tolist() == [0] * 6 + [1] + [3] + [4]
    assert starts.tolist() == [[0, 0], [5, 9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_int32(backend, dtype):
    """A chunk that starts 2^31 + 2^14 elements into its segment, at an address that makes this ours: as if at 0."""
    far = 2**31 + CHUNK_ELEMENTS
    results = []
    for offset in (0, far):
        table, cycle = make_table(dtype, [1500], touched=(0,)), make_cycle(backend)
        rows = table.rows[0]
        for column, name in enumerate(COLUMNS):
            sizes = {"weight": dtype.itemsize, "grad": dtype.itemsize, "remainder": 2, "displacement": 2}
            if name in ("weight", "remainder", "grad", "displacement", "exp_avg", "exp_avg_sq") and rows[column]:
                rows[column] -= offset * sizes.get(name, 4)
            elif name == "chunk":
                rows[column] = -(offset // CHUNK_ELEMENTS)
            elif name == "length":
                rows[column] += offset
        norm = cycle.backend.sq_norm(table)
        run_function("inner_step", table, cycle, MicroBatch([norm], 0))
        run_function("outer_step", table, cycle, MicroBatch([norm], 1))
        tensors, sums = contents(table, cycle)
        results.append([norm.clone(), *tensors, *sums])
    assert results[0][0] > 0
    assert_same(*results)


@pytest.mark.interpreted(many=[7, 70])
@pytest.mark.parametrize("many", [7, 8, 20, 70, 300])
def test_many_groups(backend, many):
    """Triton's scalars go through blocks of 32 groups, CUDA's through a block's 256 threads; from 8 groups on, ‖D‖² of
    one is a warp's."""
    results, alignments = [], []
    for which in ("reference", backend):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3)) for _ in range(many)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1), "maximize": i % 3 == 0} for i, p in enumerate(params)]
        optimizer = NexusAdamW(groups, backend=which)
        run(optimizer, params, 9)
        results.append([*values(params), *(s["step"] for s in optimizer.state_dict()["state"].values())])
        alignments.append(optimizer.metrics()["alignment"])
    assert_same(*results)
    assert alignments[0] == pytest.approx(alignments[1], rel=1e-12)


# Steps captured into a CUDA graph, played by calls that are recorded instead of made


class Graph:
    """While it captures, kernels and copies to the device are recorded, not run; `replay` runs them."""

    def __init__(self, monkeypatch):
        self.calls, self.id, self._kernels = [], None, cuda._C
        monkeypatch.setattr(cuda, "_C", self)
        monkeypatch.setattr(graphs, "capture_id", lambda devices: self.id)
        for module in (cycles, tables):
            monkeypatch.setattr(module, "upload", self._upload(module.upload))
        for kind, name in (
            (cycles.Cycle, "count_pass"),
            (cycles.Cycle, "finish_pass_count"),
            (tables.Table, "_keep_touched"),
            (tables.Table, "_note_on_device"),
        ):
            monkeypatch.setattr(kind, name, self._method(getattr(kind, name)))

    def __getattr__(self, name):
        function = getattr(self._kernels, name)
        if not callable(function):
            return function
        return lambda *args: function(*args) if self.id is None else self.calls.append((function, args))

    def _upload(self, upload):
        def record(values, target, replayed=None):
            assert (replayed is not None) == (self.id is not None)
            if replayed is None:
                upload(values, target)
            else:
                self.calls.append((target.copy_, (values.clone(),)))

        return record

    def _method(self, function):
        """The few operations of torch that captured steps are made of beside kernels."""

        def record(*args, **kwargs):
            if self.id is None:
                return function(*args, **kwargs)
            self.calls.append((functools.partial(function, **kwargs), args))
            return None

        return record

    def replay(self):
        for function, args in self.calls:
            function(*args)


@pytest.fixture
def graph(monkeypatch):
    if "cuda" not in BACKENDS:
        pytest.skip("needs the CUDA kernels on CPU tensors")
    return Graph(monkeypatch)


def mixed(**kwargs):
    """Parameters of two dtypes and groups, with K = 3."""
    dtypes = torch.float32, torch.float32, torch.bfloat16
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n, dtype in zip((40, 3, 7), dtypes, strict=True)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    return params, NexusAdamW(groups, **{"lr": 1e-2, "inner_lr": 0.05, "inner_steps": 3, "backend": "cuda", **kwargs})


def test_replays_equal_eager_steps(graph):
    """Gradients of each micro-batch at addresses of their own, one missing; eager cycles with others in between."""
    results = []
    for captured in (False, True):
        graph.calls.clear()
        torch.manual_seed(0)
        params, optimizer = mixed(capturable=True)
        static = [[torch.empty_like(p) for p in params] for _ in range(3)]
        static[1][1] = None
        generator = torch.Generator().manual_seed(1)

        def step(params=params, optimizer=optimizer, static=static):
            for grads in static:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                optimizer.step()
            optimizer.zero_grad()

        def new_gradients(static=static, generator=generator):
            for grad in (grad for grads in static for grad in grads if grad is not None):
                grad.copy_(torch.randn(grad.shape, generator=generator))

        new_gradients()
        step()
        if captured:
            graph.id = 7
            step()
            graph.id = None
            assert optimizer.at_boundary
        for eager in (False, False, True, False):
            new_gradients()
            if eager:
                optimizer.param_groups[0]["lr"] = 5e-3  # what was captured keeps its own
                run(optimizer, params, 3)
                optimizer.param_groups[0]["lr"] = 1e-2
            elif captured:
                graph.replay()
            else:
                step()
        state = optimizer.state_dict()["state"]
        results.append([*values(params), *(entry[key] for entry in state.values() for key in sorted(entry))])
        results[-1].append(torch.tensor(optimizer.metrics()["grad_norms"]))
    assert_same(*results)


def test_eager_steps_at_the_addresses_of_the_step_before(graph):
    """That step was captured and has not run, or a replay has put the addresses of others on the device since."""
    results = []
    for captured in (False, True):
        graph.calls.clear()
        torch.manual_seed(0)
        params, optimizer = mixed(capturable=True)
        first, second = ([torch.randn_like(p) for p in params] for _ in range(2))

        def cycle(grads, params=params, optimizer=optimizer):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            for _ in range(3):
                optimizer.step()

        run(optimizer, params, 3)
        if captured:
            graph.id = 1
            cycle(first)
            graph.id = None
        cycle(first)
        cycle(second)
        graph.replay() if captured else cycle(first)
        cycle(second)
        results.append(values(params))
    assert_same(*results)


def test_capture_must_begin_at_a_boundary(graph):
    params, optimizer = mixed(capturable=True)
    run(optimizer, params, 4)
    before = snapshot(optimizer)
    graph.id = 1
    set_grads(params, 0)
    for call in (optimizer.step, optimizer.outer_step):
        with pytest.raises(
            RuntimeError, match="in mid-cycle, after 1 of 3 inner steps: begin the capture at a boundary"
        ):
            call()
    graph.id = None
    assert_snapshot(optimizer, before)
    run(optimizer, params, 2)
    assert optimizer.at_boundary


def test_loading_forgets_a_capture_that_failed(graph):
    params, optimizer = mixed(capturable=True)
    run(optimizer, params, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, 2)
    for recover in (optimizer.state_dict, lambda: copy.deepcopy(optimizer), None):
        graph.id = 1
        run(optimizer, params, 1)
        graph.id = None
        if recover is None:
            optimizer.load_state_dict(saved)
        else:
            with pytest.raises(RuntimeError, match="a capture into a CUDA graph ended in mid-cycle, after 1 of 3"):
                recover()
    assert optimizer.cycle_position == 1
    run(optimizer, params, 2)
    assert optimizer.at_boundary


@pytest.mark.parametrize("after", [None, 2])
def test_capture_must_end_at_a_boundary(graph, after):
    """Whatever comes after a capture of part of a cycle, an eager step or another capture, is told; then all is as
    before that capture, which has not run anything."""
    params, optimizer = mixed(capturable=True)
    run(optimizer, params, 3)
    before = snapshot(optimizer)
    graph.id = 1
    run(optimizer, params, 2)
    graph.id = after
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="ended in mid-cycle, after 2 of 3 inner steps: capture all steps"):
        optimizer.step()
    graph.id = None
    assert_snapshot(optimizer, before)
    run(optimizer, params, 3)
    assert optimizer.at_boundary


def test_a_partial_cycle_can_be_captured(graph):
    params, optimizer = mixed(capturable=True)
    run(optimizer, params, 3)
    graph.id = 1
    run(optimizer, params, 2)
    optimizer.outer_step()
    graph.id = None
    run(optimizer, params, 1)


def test_capture_is_refused_without_capturable(graph):
    params, optimizer = mixed()
    run(optimizer, params, 3)
    optimizer.param_groups[0]["capturable"] = True
    before = snapshot(optimizer)
    graph.id = 1
    set_grads(params, 0)
    with pytest.raises(
        RuntimeError, match="capturable is False in parameter group 1: build NexusAdamW with capturable"
    ):
        optimizer.step()
    graph.id = None
    assert_snapshot(optimizer, before)


def test_capture_is_refused_before_a_first_cycle(graph):
    params, optimizer = mixed(capturable=True)
    for steps in (0, 2):
        run(optimizer, params, steps)
        optimizer.outer_step()
        graph.id = 1
        set_grads(params, 0)
        if steps == 0:
            with pytest.raises(RuntimeError, match=r"run at least one whole cycle \(3 steps\) before the capture"):
                optimizer.step()
        else:
            run(optimizer, params, 3)
        graph.id = None


@pytest.mark.parametrize("change", ["amsgrad", "group", "thaw", "storage"])
def test_capture_is_refused_where_memory_would_change(graph, change):
    frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    params, optimizer = mixed(capturable=True)
    optimizer.add_param_group({"params": [frozen]})
    run(optimizer, params, 3)
    set_grads(params, 0)
    if change == "amsgrad":
        optimizer.param_groups[1]["amsgrad"] = True
    elif change == "group":
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2))]})
    elif change == "thaw":
        frozen.grad = torch.ones(3)
    else:
        params[0].data = params[0].detach().clone()
    graph.id = 1
    with pytest.raises(RuntimeError, match=r"one whole cycle .*before the capture"):
        optimizer.step()
    graph.id = None
    run(optimizer, params, 3)
    graph.id = 1
    run(optimizer, params, 3)


@pytest.mark.parametrize("name", ["lr", "inner_lr", "betas"])
def test_capture_is_refused_with_hyperparameters_on_the_cpu(graph, name):
    """A float is a constant of the graph, as in torch.optim; a tensor's owner wants to change it."""
    params, optimizer = mixed(capturable=True)
    run(optimizer, params, 3)
    value = torch.tensor(0.01)
    optimizer.param_groups[1][name] = (value, 0.9) if name == "betas" else value
    graph.id = 1
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=f"{name} of parameter group 1 is a tensor on the CPU"):
        optimizer.step()


def test_pinned_memory_is_ready_for_a_capture(monkeypatch):
    """Of the shape that is needed; a capture that finds none left is told what to do."""
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kw: made.append(pin_memory) or empty(*args, **kw))
    replayed = graphs.Replayed()
    for _ in range(2):
        replayed.prepare(torch.Size([2, 3]), torch.int64, 2)
    assert made == [True, True]
    values = [torch.full((2, 3), i) for i in range(2)]
    kept = [replayed.keep(v) for v in values]
    assert_same(kept, values)
    with pytest.raises(RuntimeError, match="run a step outside of a graph after every 4 cycles that are captured"):
        replayed.keep(values[0])
    replayed.prepare(torch.Size([4]), torch.int64, 1)
    assert replayed.keep(torch.ones(4, dtype=torch.int64)).shape == (4,)
    assert_same(kept, values)


def test_a_graph_keeps_its_memory(graph):
    """Replays write where captured steps did, whatever has taken that memory's place since."""
    params, optimizer = mixed(capturable=True)
    run(optimizer, params, 3)
    graph.id = 1
    run(optimizer, params, 3)
    graph.id = None
    ((cycle, members),) = inside.work(optimizer)
    owned = [cycle.hyper, cycle.sums, cycle.counts, *cycle.results, *(t for m in members for t in m.on_device()[:3])]
    owned += [t for m in members for t in (m.partials, m.displacement_sq, m.sq_norm, m.arrivals)]
    alive = [weakref.ref(tensor) for tensor in owned]
    del owned
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2).bfloat16())]})
    gc.collect()
    assert all(reference() is not None for reference in alive)


def test_metrics_of_replays_after_loading(graph):
    params, optimizer = mixed(capturable=True)
    static = [torch.randn_like(p) for p in params]
    run(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    graph.id = 1
    for _ in range(3):
        for p, grad in zip(params, static, strict=True):
            p.grad = grad
        optimizer.step()
    graph.id = None
    optimizer.load_state_dict(saved)
    assert optimizer.metrics()["grad_norms"] == []
    graph.replay()
    assert len(optimizer.metrics()["grad_norms"]) == 3


# Graphs of one backward pass, with inner_steps=None: the host sees none of its replays


def _open(graph, monkeypatch, **kwargs):
    monkeypatch.setattr(graphs, "may_be_captured", lambda devices: True)
    monkeypatch.setattr(graphs.Replayed, "prepare", lambda *args: None)  # pinned memory
    return mixed(inner_steps=None, capturable=True, **kwargs)


def _end_pass(optimizer, params, grads):
    """As at the end of a backward pass that brought these gradients."""
    with optimizer.one_micro_batch():
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


@pytest.mark.parametrize("step_is_captured", [False, True])
def test_replays_of_a_pass(graph, monkeypatch, step_is_captured):
    """One graph of a pass, first and middle one of a cycle; some parameters have no gradient in it, eager passes have
    others. Whether anything was taken is the device's affair as well: a step without is none."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        params, optimizer = _open(graph, monkeypatch)
        static = [torch.empty_like(p) for p in params]
        static[1] = None
        others = [torch.randn_like(p) for p in params]
        generator = torch.Generator().manual_seed(1)
        _end_pass(optimizer, params, others)
        optimizer.step()
        graphs_of = {}
        for name, call in (
            ("pass", functools.partial(_end_pass, optimizer, params, static)),
            ("step", optimizer.step),
        ):
            if captured and (name == "pass" or step_is_captured):
                graph.calls, graph.id = [], 1 + len(graphs_of)
                call()
                graph.id, graphs_of[name] = None, graph.calls

        def replay(name, call, graphs_of=graphs_of):
            if name not in graphs_of:
                call()
            for function, args in graphs_of.get(name, ()):
                function(*args)

        def run_pass(params=params, optimizer=optimizer, static=static, generator=generator, replay=replay):
            for grad in static:
                if grad is not None:
                    grad.copy_(torch.randn(grad.shape, generator=generator))
            replay("pass", lambda: _end_pass(optimizer, params, static))

        found = []
        for passes in ((3, 0), (2, 1), (0, 0), (1, 0), (0, 2)):
            for _ in range(passes[0]):
                run_pass()
            for _ in range(passes[1]):
                _end_pass(optimizer, params, others)
                run_pass()
            assert optimizer.cycle_position == passes[0] + 2 * passes[1]
            replay("step", optimizer.step)
            metrics = optimizer.metrics()
            found += [torch.tensor(metrics.pop("grad_norms")), torch.tensor(list(metrics.values()))]
        run_pass()
        run_pass()
        assert not optimizer.at_boundary
        with optimizer.outer_weights():
            found += values(params)
        state = optimizer.state_dict()
        assert state["param_groups"][0]["cycle_position"] == 2
        assert state["param_groups"][0]["touched"] == [True, False]
        found += [entry[key] for entry in state["state"].values() for key in sorted(entry)]
        optimizer.discard_cycle()
        run_pass()
        replay("step", optimizer.step)
        results.append([*found, *values(params)])
        graph.calls = []
    assert_same(*results)


def test_the_device_counts_what_the_host_does_otherwise(graph, monkeypatch):
    results = []
    monkeypatch.setattr(graphs.Replayed, "prepare", lambda *args: None)
    for blind in (False, True):
        monkeypatch.setattr(graphs, "may_be_captured", lambda devices, blind=blind: blind)
        torch.manual_seed(0)
        params, optimizer = mixed(inner_steps=None, capturable=True)
        generator = torch.Generator().manual_seed(1)
        for cycle in range(4):
            for i in range(cycle + 1):
                grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
                grads[cycle % 3] = None
                _end_pass(optimizer, params, grads)
                assert optimizer.cycle_position == i + 1
            if cycle == 1:  # in mid-cycle
                saved = copy.deepcopy(optimizer.state_dict())
                weights = values(params)
                optimizer.step()
                optimizer.load_state_dict(saved)
                with torch.no_grad():
                    for p, w in zip(params, weights, strict=True):
                        p.copy_(w)
            if cycle == 2:
                late = nn.Parameter(torch.ones(3))
                optimizer.add_param_group({"params": [late]})
                params.append(late)
                _end_pass(optimizer, params, [torch.ones_like(p) for p in params])
            optimizer.step()
        metrics = optimizer.metrics()
        results.append([*values(params), torch.tensor(metrics["grad_norms"]), torch.tensor(metrics["alignment"])])
    assert_same(*results)


def test_a_pass_is_captured_after_a_whole_cycle(graph, monkeypatch):
    params, optimizer = _open(graph, monkeypatch)
    graph.id = 1
    with pytest.raises(RuntimeError, match=r"run at least one whole cycle before the capture"):
        _end_pass(optimizer, params, [torch.ones_like(p) for p in params])
