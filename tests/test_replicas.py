"""DistributedDataParallel: gradients that it did not reduce, and norms that differ between replicas."""

from __future__ import annotations

import contextlib
import copy
import gc
import io

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nexus_fused import NexusAdamW

OPTIONS = {"lr": 1e-2, "inner_lr": 0.05, "inner_steps": 2}


def _build(*, optimizer_first=False, compiled=False):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    if optimizer_first:
        optimizer = NexusAdamW(module.parameters(), **OPTIONS)
        return DistributedDataParallel(module), optimizer
    parallel = DistributedDataParallel(module)
    optimizer = NexusAdamW(parallel.parameters(), **OPTIONS)
    return torch.compile(parallel, backend="eager") if compiled else parallel, optimizer


def _backward(parallel, step):
    batch = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    parallel(batch).square().mean().backward()


def _weights(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def _equal_on_ranks(optimizer):
    for weight in _weights(optimizer):
        seen = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
        dist.all_gather(seen, weight)
        if not all(torch.equal(other, weight) for other in seen):
            return False
    return True


def _toggles(how, reduced):
    """A step on this rank's own gradients, after one on reduced ones or as the first: refused as often as it is
    tried."""
    parallel, optimizer = _build(optimizer_first=how == "optimizer first", compiled=how == "compiled")
    plain = getattr(parallel, "_orig_mod", parallel)
    first = 0
    if how == "optimizer first":  # DDP comes later than the look for it, and the first backward pass before the next
        for first in (1, 2):
            _backward(parallel, first)
            optimizer.step()
            optimizer.zero_grad()

    def backward(step, reduces):
        if how == "attribute":
            plain.require_backward_grad_sync = reduces
        with contextlib.nullcontext() if how == "attribute" or reduces else plain.no_sync():
            _backward(parallel, step)

    if reduced:
        backward(first, reduces=True)
        optimizer.step()
        optimizer.zero_grad()
    backward(first + 1, reduces=False)
    for _ in range(2):
        before = _weights(optimizer)
        with pytest.raises(RuntimeError, match=r"did not reduce the gradients of this step.* displacement_group"):
            optimizer.step()
        assert optimizer.cycle_position == reduced
        assert all(torch.equal(a, b) for a, b in zip(_weights(optimizer), before, strict=True))
    optimizer.outer_step()  # uses no gradients
    plain.require_backward_grad_sync = True
    optimizer.zero_grad()
    _backward(parallel, 7)
    optimizer.step()
    return _equal_on_ranks(optimizer)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("how", ["no_sync", "attribute", "optimizer first", "compiled"])
def test_steps_on_a_ranks_own_gradients_are_refused(how, reduced):
    assert on_ranks(2, _toggles, how, reduced) == [True, True]


def _averages_then_reduces():
    """Averages of weights by hand, of the module inside, and DDP goes on."""
    parallel, optimizer = _build()
    for step in range(4):
        _backward(parallel.module, step)
        optimizer.step()
        optimizer.zero_grad()
    for p in parallel.parameters():
        dist.all_reduce(p.data, op=dist.ReduceOp.SUM)
        p.data /= 2
    _backward(parallel, 5)
    optimizer.step()
    return optimizer.cycle_position


def test_the_module_inside_may_train_alone():
    assert on_ranks(2, _averages_then_reduces) == [1, 1]


def _groups_behind():
    _, optimizer = _build()
    late = nn.Linear(2, 2)
    optimizer.param_groups.append({"params": list(late.parameters())})
    optimizer.check_ranks()
    return len(optimizer.state)


def test_ranks_compare_groups_put_behind_too():
    assert on_ranks(2, _groups_behind) == [6, 6]


def _mean_of_several():
    """Several backward passes for a step, only the last of them reduced; evaluations wherever one likes."""
    parallel, optimizer = _build()
    for step in range(6):
        with parallel.no_sync():
            _backward(parallel, 2 * step)
        _backward(parallel, 2 * step + 1)
        if step % 2:
            with torch.no_grad(), parallel.no_sync():
                parallel(torch.ones(1, 4))
        optimizer.step()
        if step == 2:
            optimizer.step()  # the same gradients again
        optimizer.zero_grad()
    copied = copy.deepcopy(parallel.module)  # the hook stays behind
    torch.load(io.BytesIO(_saved(parallel.module)), weights_only=False)
    assert not any(p._post_accumulate_grad_hooks for p in copied.parameters())
    optimizer.check_ranks()
    return _equal_on_ranks(optimizer)


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


def test_accumulation_that_ends_with_a_reduction_is_allowed():
    assert on_ranks(2, _mean_of_several) == [True, True]


def _added_later():
    parallel, optimizer = _build()
    late = DistributedDataParallel(nn.Linear(4, 1))
    optimizer.add_param_group({"params": list(late.parameters())})
    for step in (1, 2):
        optimizer.zero_grad()
        _backward(parallel, step)
        with late.no_sync() if step == 2 else contextlib.nullcontext():
            _backward(late, step)
        with (
            pytest.raises(RuntimeError, match="did not reduce the gradients of this")
            if step == 2
            else contextlib.nullcontext()
        ):
            optimizer.step()
    return optimizer.cycle_position


def test_modules_that_come_later_are_found():
    assert on_ranks(2, _added_later) == [1, 1]


def test_one_process_looks_for_nothing(monkeypatch):
    param = nn.Parameter(torch.ones(3))
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("looked through all objects"))
    optimizer = NexusAdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()


# Experts: parameters of each rank's own beside those that DDP keeps equal


class _Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(4, 4)
        torch.manual_seed(1 + dist.get_rank())
        self.expert = nn.Linear(4, 1)

    def forward(self, batch):
        return self.expert(self.dense(batch).tanh())


def _trains_experts(replicated, debug):
    module = _Experts()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["expert.weight", "expert.bias"])
    parallel = DistributedDataParallel(module)
    groups, options = module.parameters(), OPTIONS
    if replicated:
        groups = [{"params": module.dense.parameters(), "replicated": True}, {"params": module.expert.parameters()}]
        options = {**OPTIONS, "norm_group": dist.group.WORLD}
    optimizer = NexusAdamW(groups, **options)
    optimizer.check_ranks()  # no norm yet
    dist.set_debug_level(dist.DebugLevel.INFO if debug else dist.DebugLevel.OFF)
    if debug and not replicated:
        _backward(parallel, 0)
        before = _weights(optimizer)
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        assert optimizer.at_boundary
        assert all(torch.equal(a, b) for a, b in zip(_weights(optimizer), before, strict=True))
        return str(raised.value)
    errors = []
    for step in range(4):
        _backward(parallel, step)
        optimizer.step()
        optimizer.zero_grad()
        try:
            optimizer.check_ranks()
        except RuntimeError as error:
            errors.append(str(error))
    if not replicated:
        assert len(errors) == 4  # in mid-cycle and at a boundary
        return errors[0]
    assert not errors
    seen = [torch.empty_like(module.dense.weight) for _ in range(2)]
    dist.all_gather(seen, module.dense.weight.detach())
    return torch.equal(*seen)


def _counts_once(kind):
    """Parameters that count on one rank only, with gradients of each rank's own."""
    dist.set_debug_level(dist.DebugLevel.INFO)
    rank, own = dist.get_rank(), nn.Parameter(torch.ones(3))
    if kind == "beside DTensors":
        sharded = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)]))
        optimizer = NexusAdamW([sharded, own], **OPTIONS)
    else:
        groups = [{"params": [own], "replicated": True}, {"params": [nn.Parameter(torch.ones(2))]}]
        optimizer = NexusAdamW(groups, **OPTIONS, norm_group=dist.group.WORLD)
    own.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(float(rank))  # of one rank: no disagreement
    optimizer.step()
    assert optimizer.param_groups[0]["skipped_inner_steps"] == 1
    own.grad = torch.full((3,), 1.0 + rank)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert optimizer.cycle_position == 1
    assert own.tolist() == [1, 1, 1]
    return str(raised.value)


@pytest.mark.parametrize("kind", ["beside DTensors", "replicated"])
def test_what_counts_once_must_be_equal(kind):
    for error in on_ranks(2, _counts_once, kind):
        assert "in step() about the norm of gradients of parameters that count as replicated: 1.73205 on" in error


@pytest.mark.parametrize("debug", [False, True])
def test_experts_beside_layers_under_ddp(debug):
    assert on_ranks(2, _trains_experts, True, debug) == [True, True]
    for error in on_ranks(2, _trains_experts, False, debug):
        when = r"step" if debug else "check_ranks"
        assert error.startswith(f"ranks disagree in {when}() about the norm of gradients: ")
        assert "norm_group" in error
        assert '"replicated": True' in error
