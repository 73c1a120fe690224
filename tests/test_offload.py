"""Moments in host memory, without a GPU: the CPU plays a device with memory of its own, once a late one."""

from __future__ import annotations

import copy
import functools
import pickle

import inside
import pytest
import torch
from conftest import BACKENDS, COMPLEX, DTYPES, assert_same, build, by_bits, make_params, run, sample, set_grads, values
from torch import nn
from two_memories import Host, TwoMemories, offload

from nexus_fused import NexusAdamW
from nexus_fused.dtensor import as_part_of
from nexus_fused.flat import COLUMNS

ON_HOST = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor"}
ADDRESSES = {"weight", "remainder", "displacement", "grad", "step", *ON_HOST}
SHAPES = (9, 5), (7,), (0, 4), (1,)


@pytest.fixture
def host(monkeypatch):
    host = Host()
    offload(monkeypatch, host)
    return host


@pytest.fixture
def group():
    """The default process group, of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def contents(optimizer):
    """Copies of weights and state, in order; of a remainder its bits."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = by_bits(optimizer.state_dict())["state"].values()
    return [*values(params), *(entry[name].clone() for entry in entries for name in sorted(entry))]


def bits(tensor):
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().view(torch.uint8)


def assert_addresses(optimizer, host):
    """Each row has what is offloaded on the host, and nothing else. Returns the columns that are there at all."""
    found = set()
    for table in inside.tables(optimizer):
        for row in table.rows.tolist():
            for name, address in zip(COLUMNS, row, strict=True):
                if name in ADDRESSES and address > 0 and row[COLUMNS.index("length")]:
                    found.add(name)
                    assert host.has_address(address) == (name in ON_HOST), name
    return found


# Results


def train(host=None, *, offload, options):
    """Whole cycles, one that ends early, a skipped step, θ shown in mid-cycle, a state saved and loaded."""
    params, optimizer = build(*SHAPES, offload=offload, **options)
    run(optimizer, params, 6)
    seen = contents(optimizer)
    with optimizer.outer_weights():
        seen += contents(optimizer)
        with torch.no_grad():
            params[0][3] = 1.5
    seen += contents(optimizer)
    optimizer.outer_step()
    set_grads(params, 20)
    params[1].grad[0] = float("nan")
    optimizer.step()
    run(optimizer, params, 1, 21)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 3, 22)
    if host:
        assert_addresses(optimizer, host)
    return [*seen, *contents(optimizer)], optimizer.metrics()


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", sample([*DTYPES, *COMPLEX], torch.float32, torch.bfloat16), ids=str)
class TestResults:
    """Bit for bit those of `offload=False`, and nothing computes with both memories at once."""

    def test_alone(self, host, backend, dtype):
        options = {"backend": backend, "dtype": dtype, "amsgrad": True}
        expected = train(offload=False, options=options)
        with TwoMemories(host):
            ours = train(host, offload=True, options=options)
        assert_same(ours[0], expected[0])
        assert str(ours[1]) == str(expected[1])

    def test_local_walks(self, host, group, backend, dtype):
        """The anchor is on the host too."""
        options = {"backend": backend, "dtype": dtype, "displacement_group": group, "inner_steps": 3}
        results = []
        for offloaded in (False, True):
            with TwoMemories(host):
                params, optimizer = build(*SHAPES, offload=offloaded, **options)
                run(optimizer, params, 4)
                with optimizer.outer_weights():
                    seen = values(params)
                    with torch.no_grad():
                        params[0][3] = 1.5
                if offloaded:
                    assert "anchor" in assert_addresses(optimizer, host)
                run(optimizer, params, 4, 4)
                optimizer.outer_step()
            results.append(seen + contents(optimizer))
        assert_same(*results)


def test_maxima_that_come_later(host):
    params, optimizer = build(*SHAPES, offload=True)
    run(optimizer, params, 5)
    assert "max_exp_avg_sq" not in assert_addresses(optimizer, host)
    optimizer.param_groups[0]["amsgrad"] = True
    run(optimizer, params, 4)
    assert {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} <= assert_addresses(optimizer, host)


def test_groups_and_copies_that_come_later(host):
    params, optimizer = build(*SHAPES, offload=True, dtype=torch.bfloat16)
    run(optimizer, params, 5)
    optimizer.add_param_group({"params": make_params((9,), dtype=torch.bfloat16)})
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        members = [p for group in each.param_groups for p in group["params"]]
        run(each, members, 4)
        assert {"exp_avg", "displacement", "remainder"} <= assert_addresses(each, host)


def test_no_difference_on_a_cpu(monkeypatch):
    monkeypatch.setattr("nexus_fused.flat.pinned_zeros", None)
    monkeypatch.setattr("nexus_fused.walk.wait_for", None)
    options = {"dtype": torch.bfloat16, "amsgrad": True}
    (left, _), (right, _) = (train(offload=offload, options=options) for offload in (True, False))
    assert_same(left, right)


# Memory


def test_bytes(host):
    """8 per parameter, in float32 and below; with maxima 12."""
    for dtype in (torch.float32, torch.bfloat16):
        for amsgrad, expected in ((False, 8), (True, 12)):
            before = host.used
            build((4096,), (1024, 3), dtype=dtype, amsgrad=amsgrad, offload=True)
            assert host.used - before == expected * (4096 + 1024 * 3)


def test_what_cannot_be_pinned_is_an_error(monkeypatch):
    """It names the bytes, the group and the remedy; nothing is modified, and memory that came is used."""

    def full(numel, dtype):
        raise RuntimeError("CUDA error: out of memory")

    host, first, late = Host(), make_params((33,)), make_params((50, 2))
    offload(monkeypatch, host)
    optimizer = NexusAdamW(first, offload=True)
    run(optimizer, first, 5)
    before = contents(optimizer)
    inside.offload_on_cpu(monkeypatch, full, lambda device: None)
    message = r"offload=True: {} bytes .* for {} of parameter group {} could not be pinned: .*ulimit -l.*offload=False"
    address = late[0].data_ptr()
    with pytest.raises(RuntimeError, match=message.format(448, "exp_avg", 1)):
        optimizer.add_param_group({"params": late})
    optimizer.param_groups[0]["amsgrad"] = True
    set_grads(first, 9)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message.format(192, "max_exp_avg_sq", 0)):
            optimizer.step()
    assert late[0].data_ptr() == address
    offload(monkeypatch, host)
    optimizer.param_groups[0]["amsgrad"] = False
    assert_same(contents(optimizer), before)
    optimizer.param_groups[0]["amsgrad"] = True
    run(optimizer, first, 4)
    assert "max_exp_avg_sq" in assert_addresses(optimizer, host)


@pytest.mark.parametrize("value", [None, 1, 0, "yes", torch.tensor(True)], ids=str)
def test_anything_but_a_bool_is_an_error(value):
    with pytest.raises(TypeError, match="offload must be True or False, but is"):
        build(offload=value)


# Waiting


class Late:
    """A device that takes an outer step once somebody waits for it, or gives it something else to do."""

    def __init__(self, patch):
        from nexus_fused import cuda

        self.waiting, self.waits = [], 0
        outer_step = cuda._C.cuda_outer_step
        patch.setattr(cuda._C, "cuda_outer_step", lambda *args: self.waiting.append((outer_step, args)))
        for name in ("sq_norm", "inner_step"):
            patch.setattr(cuda, name, functools.partial(self._after, getattr(cuda, name)))
        offload(patch, Host(), self.wait_for)

    def wait_for(self, device):
        self.waits += 1
        while self.waiting:
            kernel, args = self.waiting.pop(0)
            kernel(*args)

    def _after(self, function, *args):
        self.wait_for(None)
        self.waits -= 1
        return function(*args)


needs_cuda = pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the CUDA kernels on CPU tensors")


def a_cycle(optimizer, params, kept):
    """Its last kernel is late; gradients stay, as a GPU's memory does until kernels are done."""
    for seed in range(optimizer.inner_steps):
        set_grads(params, seed)
        kept += [p.grad for p in params]
        optimizer.step()


def moments(state):
    return [values[name] for values in state.values() for name in ("exp_avg", "exp_avg_sq")]


@needs_cuda
class TestWaiting:
    @pytest.fixture
    def late(self, monkeypatch):
        return Late(monkeypatch)

    @staticmethod
    def expected():
        params, optimizer = build(backend="cpu")
        a_cycle(optimizer, params, [])
        return moments(copy.deepcopy(optimizer.state))

    @pytest.mark.parametrize(
        "read",
        [
            lambda optimizer: moments(optimizer.state_dict()["state"]),
            lambda optimizer: moments(optimizer.state),
            lambda optimizer: moments(copy.deepcopy(optimizer).state),
            lambda optimizer: moments(pickle.loads(pickle.dumps(optimizer)).state),
        ],
        ids=["state_dict", "state", "deepcopy", "pickle"],
    )
    def test_before_it_is_read(self, late, read):
        expected, kept = self.expected(), []
        params, optimizer = build(backend="cuda", offload=True)
        a_cycle(optimizer, params, kept)
        assert len(late.waiting) == 1
        assert_same(read(optimizer), expected)
        assert late.waits >= 1

    def test_before_a_load(self, late):
        """Else the outer step would write over what was loaded."""
        params, optimizer = build(backend="cuda", offload=True)
        saved, kept = copy.deepcopy(optimizer.state_dict()), []
        a_cycle(optimizer, params, kept)
        assert len(late.waiting) == 1
        optimizer.load_state_dict(saved)
        assert not any(value.any() for value in moments(optimizer.state))

    def test_before_what_others_put_into_the_state_is_taken_over(self, late):
        params, optimizer = build(backend="cuda", offload=True, inner_steps=1)
        entry, kept = optimizer.state[params[0]], []
        a_cycle(optimizer, params, kept)
        entry["exp_avg"] = torch.full_like(entry["exp_avg"], 7.0)
        assert len(late.waiting) == 1
        inside.look(optimizer, gradients=False)
        late.wait_for(None)
        assert (entry["exp_avg"] == 7).all()

    def test_not_in_training(self, late):
        """Nor for state that lies on the device."""
        params, optimizer = build(backend="cuda", offload=True)
        for _ in range(3):
            a_cycle(optimizer, params, [])
        optimizer.outer_step()
        assert late.waits == 0
        params, optimizer = build(backend="cuda")
        optimizer.load_state_dict(optimizer.state_dict())
        assert late.waits == 0


# DTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_state_of_dtensors(dtype):
    """On a mesh of GPUs: state with its parts in host memory is shown as it lies, saved and loaded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        plain, expected = build((6, 4), dtype=dtype)
        meta = DTensor.from_local(torch.empty(6, 4, dtype=dtype, device="meta"), mesh, [Shard(0)])

        def spread(tensor):
            return as_part_of(tensor.detach().clone(), meta)

        param = nn.Parameter(spread(plain[0]))
        optimizer = NexusAdamW([param], lr=1e-2, inner_lr=0.05, offload=True)
        for seed in range(6):
            set_grads(plain, seed)
            param.grad = spread(plain[0].grad)
            optimizer.step()
            expected.step()
        (theirs,), (ours,) = expected.state_dict()["state"].values(), optimizer.state_dict()["state"].values()
        assert theirs.keys() == ours.keys()
        for name in theirs.keys() - {"step"}:
            assert isinstance(ours[name], DTensor)
            assert ours[name].device == torch.device("cpu")
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(bits(ours[name].to_local()), bits(theirs[name]))
        saved = {"state": {0: {k: spread(v) if v.dim() else v for k, v in theirs.items()}}}
        optimizer.load_state_dict({**optimizer.state_dict(), **saved})
        assert_same([optimizer.state[param]["exp_avg"].to_local()], [theirs["exp_avg"]])
    finally:
        torch.distributed.destroy_process_group()
