"""inner_steps=None where ranks communicate: DistributedDataParallel, FSDP2, tensor parallelism, local walks."""

from __future__ import annotations

import contextlib
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nexus_fused import NexusAdamW

OPTIONS = {"lr": 1e-2, "inner_lr": 0.05, "displacement_dtype": torch.float32}
CYCLES = (4, 2, 4)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def _loss(model, i, rank=None):
    seed = 100 * (dist.get_rank() if rank is None else rank) + i
    return model(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))).square().mean()


def _train(model, optimizer, context=lambda i, last: contextlib.nullcontext(), cycles=CYCLES):
    """Cycles of several passes, in the way of the optimizer's inner_steps."""
    i = 0
    for passes in cycles:
        for k in range(passes):
            with context(i, k + 1 == passes):
                _loss(model, i).backward()
            i += 1
            if optimizer.inner_steps is not None:
                optimizer.step()
                optimizer.zero_grad()
        if optimizer.inner_steps is None:
            assert optimizer.cycle_position == passes
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.outer_step()
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def _wrapped(kind):
    model = _model()
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        fully_shard(model)
        return model
    if kind == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    views = kind == "DDP, views of buckets"
    return DistributedDataParallel(model, gradient_as_bucket_view=views, static_graph=kind == "DDP, static graph")


def _both_ways(kind):
    ends = []
    for steps in (None, 4):
        model = _wrapped(kind)
        optimizer = NexusAdamW(model.parameters(), **OPTIONS, inner_steps=steps)
        ends.append(_train(model, optimizer))
    return ends


KINDS = ["DDP", "DDP, views of buckets", "DDP, static graph", "FSDP2"]


@pytest.mark.parametrize("kind", KINDS)
def test_reduced_gradients(kind):
    """An inner step comes when they have been reduced: the same cycles as with a number, on all ranks."""
    ranks = on_ranks(2, _both_ways, kind)
    for one, other in ranks:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)


def _tensor_parallel():
    ends = []
    for steps in (None, 2):
        model = _wrapped("tensor parallel")
        optimizer = NexusAdamW(model.parameters(), **OPTIONS, inner_steps=steps)
        for i in range(4):
            _loss(model, i, rank=0).backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            elif i % 2:
                optimizer.step()
        ends.append([p.full_tensor().detach() for p in model.parameters()])
    return ends


def test_tensor_parallel():
    for one, other in on_ranks(2, _tensor_parallel):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class _Head(nn.Module):
    """Its smallest parameter has no part in some passes of some ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 2), nn.Linear(2, 1)

    def forward(self, x, *, with_head):
        return self.head(self.body(x)) if with_head else self.body(x)


def _uneven_use(views):
    ends = []
    for steps in (None, 4):
        module = _Head()
        parallel = DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=views)
        optimizer = NexusAdamW(module.parameters(), **OPTIONS, inner_steps=steps)
        for i in range(12):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(100 * dist.get_rank() + i))
            parallel(x, with_head=i % 4 in (0, 3) or dist.get_rank() == 0).square().mean().backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            elif i % 4 == 3:
                optimizer.step()
        ends.append([p.detach().clone() for p in module.parameters()])
    return ends


@pytest.mark.parametrize("views", [False, True])
def test_parameters_that_one_rank_does_not_use(views):
    ranks = on_ranks(2, _uneven_use, views)
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    torch.testing.assert_close(*ranks[0], rtol=1e-5, atol=1e-6)


def _looks_before_backward(steps):
    """A forward pass without gradients between another one and its backward pass, as a teacher's or a metric's."""
    parallel = _wrapped("DDP")
    optimizer = NexusAdamW(parallel.parameters(), **OPTIONS, inner_steps=steps)
    for i in range(4):
        loss = _loss(parallel, i)
        with torch.no_grad():
            _loss(parallel, 50 + i)
        loss.backward()
        if steps or i % 2:
            optimizer.step()
    with pytest.raises(RuntimeError, match="did not reduce the gradients"):  # of a forward pass inside
        _unreduced(parallel, optimizer)
    return [p.detach().clone() for p in parallel.parameters()]


def _unreduced(parallel, optimizer):
    optimizer.zero_grad()
    with parallel.no_sync():
        loss = _loss(parallel, 9)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [None, 2])
def test_other_forward_passes(steps):
    one, other = on_ranks(2, _looks_before_backward, steps)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# Accumulation over ranks


def _without_reduction(steps, how):
    parallel = _wrapped("DDP")
    optimizer = NexusAdamW(parallel.parameters(), **OPTIONS, inner_steps=steps)
    before = [p.detach().clone() for p in parallel.parameters()]
    if how == "attribute":
        parallel.require_backward_grad_sync = False
    with pytest.raises(RuntimeError) as raised:  # noqa: PT012
        if how == "accelerate":
            from accelerate import Accelerator

            os.environ["MASTER_ADDR"] = "127.0.0.1"  # it asks, though the group is there
            module = _model()
            optimizer = NexusAdamW(module.parameters(), **OPTIONS, inner_steps=steps)  # before DDP, as usual there
            before = [p.detach().clone() for p in module.parameters()]
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
            parallel, _ = accelerator.prepare(module, optimizer)
            with accelerator.accumulate(parallel):
                accelerator.backward(_loss(parallel, 0))
        else:
            with parallel.no_sync() if how == "no_sync" else contextlib.nullcontext():
                _loss(parallel, 0).backward()
            optimizer.step()
    assert optimizer.at_boundary
    assert all(torch.equal(a, b) for a, b in zip(before, parallel.parameters(), strict=True))
    optimizer.zero_grad()
    parallel.require_backward_grad_sync = True
    _loss(parallel, 0).backward()
    optimizer.step()
    return str(raised.value)


@pytest.mark.parametrize(
    ("steps", "how"), [(None, "no_sync"), (None, "attribute"), (None, "accelerate"), (4, "no_sync"), (4, "attribute")]
)
def test_replicas_that_would_part(steps, how):
    if how == "accelerate":
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    for error in on_ranks(2, _without_reduction, steps, how):
        assert f"did not reduce the gradients of this {'backward pass' if steps is None else 'step()'}" in error
        for way_out in ("displacement_group", "sync_each_batch=True", "one_micro_batch()", "train ddp.module"):
            assert way_out in error


def _accelerate_reduces_all():
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    os.environ["MASTER_ADDR"] = "127.0.0.1"
    ends = []
    for steps in (None, 4):
        module = _model()
        optimizer = NexusAdamW(module.parameters(), **OPTIONS, inner_steps=steps)
        plugin = GradientAccumulationPlugin(num_steps=4 if steps is None else 1, sync_each_batch=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        parallel, wrapped = accelerator.prepare(module, optimizer)
        for i in range(8):
            with accelerator.accumulate(parallel):
                accelerator.backward(_loss(parallel, i))
                wrapped.step()
                wrapped.zero_grad()
        assert optimizer.at_boundary
        ends.append([p.detach().clone() for p in module.parameters()])
    return ends


def test_accelerate_that_reduces_each_pass():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ranks = on_ranks(2, _accelerate_reduces_all)
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    torch.testing.assert_close(*ranks[0], rtol=1e-5, atol=1e-6)


def _fsdp_without_reduction(steps):
    model = _wrapped("FSDP2")
    optimizer = NexusAdamW(model.parameters(), **OPTIONS, inner_steps=steps)
    model.set_requires_gradient_sync(False)

    def train_step():
        _loss(model, 0).backward()
        optimizer.step()

    with pytest.raises(RuntimeError) as raised:
        train_step()
    assert optimizer.at_boundary
    return str(raised.value)


def _rebuilt():
    """An optimizer that a scheduler keeps alive, and one that takes its place."""
    model = _wrapped("FSDP2")
    first = NexusAdamW(model.parameters(), **OPTIONS, inner_steps=None)
    second = NexusAdamW(model.parameters(), **OPTIONS, inner_steps=None)
    weights = _train(model, second)
    assert first.at_boundary
    fresh = _wrapped("FSDP2")
    return weights, _train(fresh, NexusAdamW(fresh.parameters(), **OPTIONS, inner_steps=None))


def test_the_last_optimizer_built_has_the_passes():
    for weights, expected in on_ranks(2, _rebuilt):
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [None, 4])
def test_fsdp_merges_passes(steps):
    for error in on_ranks(2, _fsdp_without_reduction, steps):
        assert "FSDP2 did not reduce the gradients" in error
        assert "set_requires_gradient_sync(False)" in error


def _local_walks(how):
    """Weights of this rank, what it warned of, and the same walks without DDP and with a number."""
    module = _model()
    number = NexusAdamW(module.parameters(), **OPTIONS, inner_steps=4, displacement_group=dist.group.WORLD)
    expected = _train(module, number)
    parallel = _wrapped("DDP")
    options = {**OPTIONS, "inner_steps": None, "displacement_group": dist.group.WORLD}
    optimizer = NexusAdamW(parallel.parameters(), **options)

    def context(i, last):
        return parallel.no_sync() if how == "never" or not last else contextlib.nullcontext()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "around":  # accumulation's usual form inside
            with parallel.no_sync():
                weights = _train(parallel, optimizer, lambda i, last: contextlib.nullcontext())
        else:
            weights = _train(parallel, optimizer, context)
    said = [str(w.message) for w in caught if "displacement_group" in str(w.message)]
    optimizer.check_ranks()
    return weights, said, expected


@pytest.mark.parametrize("how", ["never", "around", "last"])
def test_local_walks(how):
    """Without reduction exactly local walks; where the last pass is reduced, gradients and D are sent, ranks stay
    equal, and one warning says what to do."""
    ranks = on_ranks(2, _local_walks, how)
    torch.testing.assert_close(ranks[0][0], ranks[1][0], rtol=0, atol=0)
    for weights, said, expected in ranks:
        assert len(said) == (how == "last")
        if how == "last":
            assert "Keep model.no_sync() open around the whole training loop" in said[0]
        else:
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def _uneven():
    """This rank has `rank + 2` passes in each cycle, and one cycle more on the last rank; then nothing is left."""
    module = _model()
    options = {**OPTIONS, "inner_steps": None, "displacement_group": dist.group.WORLD}
    optimizer = NexusAdamW(module.parameters(), **options)
    rank = dist.get_rank()
    for cycle in range(2 + rank):
        for k in range(rank + 2 if cycle != 1 else rank):  # none on rank 0 in the second cycle
            _loss(module, 10 * cycle + k).backward()
        optimizer.step()
    optimizer.outer_step()
    assert optimizer.at_boundary
    return [p.detach().clone() for p in module.parameters()], [
        float(optimizer.state[p]["step"]) for p in module.parameters()
    ]


def test_local_walks_of_uneven_length():
    (first, steps), (second, _) = on_ranks(2, _uneven)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert steps == [3] * 4


def _discards():
    module = _model()
    options = {**OPTIONS, "inner_steps": None, "displacement_group": dist.group.WORLD}
    optimizer = NexusAdamW(module.parameters(), **options)
    before = [p.detach().clone() for p in module.parameters()]
    for i in range(3):
        _loss(module, i).backward()
    optimizer.discard_cycle()
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_discarded_local_walks():
    """Back at θ exactly, which is kept."""
    assert on_ranks(2, _discards) == [True, True]
