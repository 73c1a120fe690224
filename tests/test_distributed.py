"""Several processes on this machine, joined by gloo: DDP, DTensors on every mesh, ranks that disagree or are late."""

from __future__ import annotations

import copy
import os
import re
import time

import inside
import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from sharded import counted_collectives, equal_but_for_the_norm, give, gradients, model, spread, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nexus_fused import NexusAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "inner_lr": 0.05, "inner_steps": 3}


MESHES = {"fsdp": 4, "hsdp": 2, "tensor parallel": 2, "2d": 4, "offload": 4}  # and over how many ranks each shards


# DTensors


def _sharded(kind, dtype, amsgrad):
    module = spread(kind, model(dtype))
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS, amsgrad=amsgrad)
    with counted_collectives() as calls:
        for step in range(7):
            values = gradients(params, step)
            if step == 4:
                values[3][-1] = float("nan")
            give(params, values)
            if step in (1, 2):
                params[5].grad = None
            optimizer.step()
    state = [whole(optimizer.state[p]["exp_avg_sq"]) for p in params]
    return [whole(p) for p in params], state, optimizer.metrics(), [call for call in calls if call[0] == 1], len(calls)


@pytest.mark.parametrize(
    ("kind", "ranks_of_the_sum", "dtype", "amsgrad"),
    [
        *((kind, n, dtype, False) for dtype in (torch.float32, torch.bfloat16) for kind, n in MESHES.items()),
        ("fsdp", 4, torch.float32, True),
        ("2d", 4, torch.float64, True),
    ],
)
def test_sharded_equals_unsharded(kind, ranks_of_the_sum, dtype, amsgrad):
    module = model(dtype)
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS, amsgrad=amsgrad)
    for step in range(7):
        values = gradients(params, step)
        if step == 4:
            values[3][-1] = float("nan")
        give(params, values)
        if step in (1, 2):
            params[5].grad = None
        optimizer.step()
    results = on_ranks(4, _sharded, kind, dtype, amsgrad)
    for weights, state, metrics, scalars, calls in results:
        equal_but_for_the_norm(weights, [p.detach() for p in params])
        equal_but_for_the_norm(state, [optimizer.state[p]["exp_avg_sq"] for p in params])
        assert metrics["skipped_inner_steps"] == 1
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))
        assert scalars == [(1, ranks_of_the_sum)] * 7  # one scalar in each inner step, whatever the mesh
        assert calls == 7 + 2  # and the metrics at the end of each of two cycles
        for key in ("alignment", "grad_norms", "lost_fraction"):
            assert metrics[key] == pytest.approx(optimizer.metrics()[key], nan_ok=True), key


def _trains(kind):
    module = spread(kind, model())
    optimizer = NexusAdamW(module.parameters(), **OPTIONS)
    inputs = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(1))
    seen = []
    for step, batch in enumerate(inputs):
        module(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (2, 4):  # at a boundary and in mid-cycle
            with torch.no_grad():
                seen.append(module(batch))  # leaves the root's weights gathered
            with optimizer.outer_weights(), torch.no_grad():
                seen.append(module(batch))
            with torch.no_grad():
                seen.append(module(batch))
    return [whole(p) for p in module.parameters()], seen


@pytest.mark.parametrize("kind", MESHES)
def test_sharded_training_and_evaluation_in_mid_cycle(kind):
    module = model()
    optimizer = NexusAdamW(module.parameters(), **OPTIONS)
    inputs = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = []
    for step, batch in enumerate(inputs):
        module(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (2, 4):
            with torch.no_grad():
                expected.append(module(batch))
                with optimizer.outer_weights():
                    expected.append(module(batch))
                expected.append(module(batch))
    assert not torch.equal(expected[3], expected[4])
    for weights, seen in on_ranks(4, _trains, kind):
        # Products of matrices are summed in another order, and AdamW's first steps magnify what cancels.
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, [p.detach() for p in module.parameters()], rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[3], seen[5])


def _keeps_gathered(how):
    """A module whose weights stay gathered after a forward pass, and then change without a backward pass."""
    module = spread("fsdp", model())
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        module(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        before = module(batch)
        if how == "outer_step":
            optimizer.outer_step()
        elif how == "step":
            optimizer.step()  # the last of the cycle, without gradients
        else:
            give(params, gradients(params, 1))
            optimizer.step()
        after = module(batch)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return before, after, module(batch)


@pytest.mark.parametrize("how", ["outer_step", "step", "step after a look"])
def test_gathered_weights_are_those_of_the_shards(how):
    for before, after, expected in on_ranks(2, _keeps_gathered, how):
        assert torch.equal(after, expected)
        assert not torch.equal(after, before)


def _partial(placement):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.arange(12.0).view(6, 2), mesh, [placement]))
    optimizer = NexusAdamW([param], **OPTIONS)
    for _ in range(4):
        part = torch.full((6, 2), 1.0 + dist.get_rank())
        param.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        optimizer.step()
    return whole(param)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_a_partial_gradient_is_reduced(placement):
    param = nn.Parameter(torch.arange(12.0).view(6, 2))
    optimizer = NexusAdamW([param], **OPTIONS)
    for _ in range(4):
        param.grad = torch.full((6, 2), 3.0)
        optimizer.step()
    for weights in on_ranks(2, _partial, placement):
        equal_but_for_the_norm([weights], [param.detach()])


def _writes():
    """Who writes through a DTensor or into its part is seen, with the extension and without."""
    results = []
    for compiled in (True, False):
        if not compiled:
            inside.look_in_python(pytest.MonkeyPatch())
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [
            nn.Parameter(distribute_tensor(t.clone(), mesh, [Shard(0)])) for t in gradients(model().parameters(), 9)
        ]
        optimizer = NexusAdamW(params, **OPTIONS)
        for step in range(6):
            give(params, gradients(params, step))
            with torch.no_grad():
                if step == 1:
                    params[0].mul_(0.5)
                if step == 4:
                    params[1].to_local().add_(1.0)
                if step == 5:  # gradients that lie otherwise
                    params[0].grad = distribute_tensor(params[0].grad.full_tensor(), mesh, [Shard(1)])
                    transposed = params[4].grad.to_local().t().contiguous().t()
                    params[4].grad = DTensor.from_local(transposed, mesh, [Shard(0)], shape=(8, 5), stride=(5, 1))
            optimizer.step()
        results.append([whole(p) for p in params])
    return results


def test_the_extension_sees_dtensors_as_python_does():
    params = [nn.Parameter(t) for t in gradients(model().parameters(), 9)]
    optimizer = NexusAdamW(params, **OPTIONS)
    for step in range(6):
        give(params, gradients(params, step))
        with torch.no_grad():
            if step == 1:
                params[0].mul_(0.5)
            if step == 4:
                params[1].add_(1.0)
        optimizer.step()
    for compiled, python in on_ranks(2, _writes):
        assert all(torch.equal(a, b) for a, b in zip(compiled, python, strict=True))
        equal_but_for_the_norm(compiled, [p.detach() for p in params])


def _loads_whole_tensors(state):
    module = spread("2d", model())
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    optimizer.load_state_dict(state)
    return [whole(optimizer.state[p]["exp_avg"]) for p in params]


def test_a_whole_state_loads_into_shards():
    module = model()
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params)
    give(params, gradients(params, 0))
    optimizer.step()
    expected = [optimizer.state[p]["exp_avg"] for p in params]
    for loaded in on_ranks(4, _loads_whole_tensors, optimizer.state_dict()):
        assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


# Stages of a pipeline


def _stage():
    params = list(model().parameters())
    rank = dist.get_rank()
    own = params[:4] if rank == 0 else params[4:]
    groups = [own] if rank == 0 else [own[:1], own[1:3], own[3:]]
    optimizer = NexusAdamW([{"params": group} for group in groups], **OPTIONS, norm_group=dist.group.WORLD)
    for step in range(7):
        values = gradients(params, step)
        if step == 4:
            values[-1][-1] = float("nan")
        give(params, values)
        optimizer.step()
    with pytest.raises(RuntimeError, match="process group cannot be copied"):
        copy.deepcopy(optimizer)
    frozen = NexusAdamW([nn.Parameter(torch.ones(2), requires_grad=False)], norm_group=dist.group.WORLD)
    frozen.step()  # without any parameter to step
    assert frozen.cycle_position == 1
    return [p.detach() for p in own], optimizer.metrics()


def test_stages_of_a_pipeline_have_one_norm():
    params = list(model().parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    for step in range(7):
        values = gradients(params, step)
        if step == 4:
            values[-1][-1] = float("nan")
        give(params, values)
        optimizer.step()
    (first, metrics), (second, same) = on_ranks(2, _stage)
    equal_but_for_the_norm([*first, *second], [p.detach() for p in params])
    assert str(metrics) == str(same)
    for key in ("alignment", "skipped_inner_steps", "lost_fraction"):
        assert metrics[key] == pytest.approx(optimizer.metrics()[key]), key


# Experts


def _experts_of(layout, params):
    """Of a model whose last four parameters are two experts: the dense ones, this rank's expert, and norm_group."""
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("expert", "shard"))
    dense, group = params[:-4], dist.group.WORLD
    own = params[-2:] if mesh.get_local_rank("expert") else params[-4:-2]
    if layout == "dense shards on all ranks":
        dense = [nn.Parameter(distribute_tensor(p.detach(), init_device_mesh("cpu", (n,)), [Shard(0)])) for p in dense]
    elif layout == "all sharded within an expert":
        placements = [Replicate(), Shard(0)]
        dense = [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in dense]
        own = [nn.Parameter(distribute_tensor(p.detach(), mesh["shard"], [Shard(0)])) for p in own]
        group = mesh.get_group("expert")
    return dense, own, group


def _trains_experts(layout):
    params = list(model().parameters())
    dense, own, group = _experts_of(layout, params)
    first = dist.get_rank() < dist.get_world_size() // 2
    groups = [{"params": dense, "replicated": True}, {"params": own}]
    optimizer = NexusAdamW(groups, **OPTIONS, norm_group=group)
    for step in range(7):
        values = gradients(params, step)
        if step == 4:
            values[-1][-1] = float("nan")  # of one expert
        give(dense, values[:-4])
        give(own, values[-4:-2] if first else values[-2:])
        optimizer.step()
    norms = [norm.item() for norm in optimizer.param_groups[0]["grad_norms"]]
    return [whole(p) for p in dense], [whole(p) for p in own], optimizer.metrics(), norms


@pytest.mark.parametrize(
    ("layout", "n"),
    [("plain", 2), ("dense shards on all ranks", 2), ("all sharded within an expert", 4)],
)
def test_experts_beside_replicated_layers_have_one_norm(layout, n):
    params = list(model().parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    for step in range(7):
        values = gradients(params, step)
        if step == 4:
            values[-1][-1] = float("nan")
        give(params, values)
        optimizer.step()
    results = on_ranks(n, _trains_experts, layout)
    for rank, (dense, own, metrics, norms) in enumerate(results):
        equal_but_for_the_norm(dense, [p.detach() for p in params[:-4]])
        equal_but_for_the_norm(own, [p.detach() for p in (params[-4:-2] if rank < n // 2 else params[-2:])])
        assert all(torch.equal(a, b) for a, b in zip(dense, results[0][0], strict=True))
        assert norms == results[0][3]  # bit for bit
        for key in ("alignment", "grad_norms", "skipped_inner_steps", "lost_fraction"):
            assert metrics[key] == pytest.approx(optimizer.metrics()[key], nan_ok=True), key


def _replicated_is_checked():
    rank = dist.get_rank()
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2 + rank))
    with pytest.raises(RuntimeError, match="about the number of replicated parameters: 1 on rank 0, 0 on rank 1"):
        NexusAdamW([{"params": [a], "replicated": rank == 0}, {"params": [b]}], norm_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"about replicated parameter 0: \(2,\) .* on rank 0, \(3,\)"):
        NexusAdamW([{"params": [b], "replicated": True}, {"params": [a]}], norm_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"about lr of replicated group 0: 0\.001 on rank 0, 0\.002 on rank 1"):
        NexusAdamW([{"params": [a], "replicated": True, "lr": 1e-3 * (1 + rank)}], norm_group=dist.group.WORLD)
    mesh = init_device_mesh("cpu", (2,))
    shared = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r'norm_group has the ranks 0, 1, .* a group with "replicated": True'):
        NexusAdamW([{"params": [shared]}, {"params": [b]}], norm_group=dist.group.WORLD)
    optimizer = NexusAdamW([{"params": [a], "replicated": True}, {"params": [b]}], norm_group=dist.group.WORLD)
    before = a.detach().clone()
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.param_groups[0]["replicated"] = False
    with pytest.raises(ValueError, match="replicated of parameter group 0 was changed from True to False"):
        optimizer.step()
    assert optimizer.at_boundary
    assert torch.equal(a, before)
    optimizer.param_groups[0]["replicated"] = True
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert [group["replicated"] for group in state["param_groups"]] == [True, False]
    optimizer.load_state_dict(state)
    assert optimizer.cycle_position == 1
    return state


def test_replicated_is_checked_saved_and_loaded():
    """It tells how ranks are laid out, as norm_group does: an optimizer keeps its own."""
    (state, _) = on_ranks(2, _replicated_is_checked)
    optimizer = NexusAdamW([{"params": [nn.Parameter(torch.ones(n))]} for n in (3, 2)])
    with pytest.warns(UserWarning, match="group 0 was saved with replicated=True, this optimizer keeps its False"):
        optimizer.load_state_dict(state)
    assert not optimizer.param_groups[0]["replicated"]
    assert optimizer.cycle_position == 1
    optimizer.step()


def test_replicated_without_a_norm_group_is_refused():
    for frozen in (False, True):
        group = {"params": [nn.Parameter(torch.ones(3), requires_grad=not frozen)], "replicated": True}
        with pytest.raises(ValueError, match=r"replicated=True of parameter group 0 .* there is no norm_group"):
            NexusAdamW([group])
        optimizer = NexusAdamW([nn.Parameter(torch.ones(3))])
        with pytest.raises(ValueError, match=r"replicated=True of parameter group 1 .* there is no norm_group"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["replicated"] = True
    with pytest.raises(ValueError, match="replicated of parameter group 0 was changed"):
        optimizer.step()


def _overflows(whose):
    """`found_inf` as a scaler of one's own hands it over, on one rank."""
    params = list(spread("fsdp", model()).parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    for step in range(2 * OPTIONS["inner_steps"]):
        give(params, gradients(params, step))
        optimizer.found_inf = torch.tensor(float(step == 1 and dist.get_rank() == whose))
        optimizer.step()
    return [whole(p) for p in params], optimizer.metrics()


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    params = list(model().parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    for step in range(2 * OPTIONS["inner_steps"]):
        give(params, gradients(params, step))
        optimizer.found_inf = torch.tensor(float(step == 1))
        optimizer.step()
    for weights, metrics in on_ranks(2, _overflows, 1):
        equal_but_for_the_norm(weights, [p.detach() for p in params])
        assert metrics["skipped_inner_steps"] == 1


# DistributedDataParallel, and 200 cycles with faults


def _faults(kind, cycles):
    """Weights of this rank's part after many cycles in which much went wrong."""
    torch.manual_seed(dist.get_rank())  # DDP gives all ranks those of the first
    rank, module = dist.get_rank(), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    late = nn.Linear(6, 1)
    whole_model = nn.ModuleList([module, late])
    if kind == "ddp":
        parallel = DistributedDataParallel(module)
        late_parallel = DistributedDataParallel(late)
    else:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        for param in whole_model.parameters():
            dist.broadcast(param.data, 0)
        parallel, late_parallel = fully_shard(module, mesh=mesh), fully_shard(late, mesh=mesh)
    optimizer = NexusAdamW(parallel.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=2)
    generator = torch.Generator().manual_seed(100 + rank)
    for step in range(2 * cycles):
        batch = torch.randn(2, 6, generator=generator)
        if step % 37 == 3 * rank:
            batch[0, 0] = float("nan")
        loss = parallel(batch).square().mean()
        if step == cycles:
            optimizer.add_param_group({"params": list(late_parallel.parameters()), "lr": 1e-3})
        if step >= cycles:
            loss = loss + late_parallel(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 11:
            optimizer.outer_step()
            optimizer.step()  # without any gradient
    optimizer.outer_step()
    if kind == "ddp":
        optimizer.check_ranks()
    return [whole(p) for p in whole_model.parameters()], optimizer.metrics()["skipped_inner_steps"]


@pytest.mark.parametrize("kind", ["ddp", "hsdp"])
def test_ranks_stay_equal_over_200_cycles_with_faults(kind):
    results = on_ranks(4, _faults, kind, 200)
    for weights, skipped in results:
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))
        assert skipped == results[0][1] > 30
        assert all(w.isfinite().all() for w in weights)


# What is refused, and ranks that disagree


def _refusals():
    module = nn.Linear(4, 4)
    errors = []
    for original in (False, True):
        wrapped = FullyShardedDataParallel(
            copy.deepcopy(module), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(TypeError) as raised:
            NexusAdamW(wrapped.parameters())
        errors.append(str(raised.value))
    mesh = init_device_mesh("cpu", (1,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    with pytest.raises(TypeError, match="parameter 0 of group 0 is a DTensor of partial sums"):
        NexusAdamW([partial])
    return errors


def _experts():
    """Half of the ranks share one parameter, the others another; a mesh made by hand does not say so."""
    rank = dist.get_rank()
    everybody = init_device_mesh("cpu", (4,))
    halves = [DeviceMesh("cpu", [0, 2]), DeviceMesh("cpu", [1, 3])]
    dense = nn.Parameter(distribute_tensor(torch.ones(8), everybody, [Shard(0)]))
    expert = nn.Parameter(distribute_tensor(torch.ones(8), halves[rank % 2], [Shard(0)]))
    optimizer = NexusAdamW([dense])
    with pytest.raises(ValueError, match="shard both over one DeviceMesh with named dimensions"):
        optimizer.add_param_group({"params": [expert]})
    assert len(optimizer.param_groups) == 1
    dense.grad = torch.ones_like(dense)
    optimizer.step()
    return optimizer.param_groups[0]["grad_norms"][0].item()


def test_meshes_that_say_nothing_of_each_other_are_refused():
    assert on_ranks(4, _experts) == pytest.approx([8**0.5] * 4)


def test_parameters_of_other_engines_are_refused():
    for error in on_ranks(1, _refusals)[0]:
        assert error.startswith("parameter 0 of group 0 belongs to FullyShardedDataParallel (FSDP1)")
        assert "fully_shard" in error
    placeholder = nn.Parameter(torch.empty(0))
    placeholder.ds_id = 3  # as DeepSpeed marks them
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is a placeholder of DeepSpeed's ZeRO-3.*fully_shard"):
        NexusAdamW([placeholder])


def _disagrees(about):
    rank = dist.get_rank()
    module = spread("fsdp", model())
    params = list(module.parameters())
    if about == "inner_steps":
        with pytest.raises(RuntimeError) as raised:
            NexusAdamW(params, inner_steps=4 + rank % 2)
        return str(raised.value)
    if about == "parameters":
        with pytest.raises(RuntimeError) as raised:
            NexusAdamW(params[rank:])
        return str(raised.value)
    optimizer = NexusAdamW(params, **OPTIONS)
    if about == "group":
        with pytest.raises(RuntimeError) as raised:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3 + rank))]})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        return str(raised.value)
    saved = [copy.deepcopy(optimizer.state_dict())]
    for step in range(2):
        give(params, gradients(params, step))
        optimizer.step()
        saved.append(copy.deepcopy(optimizer.state_dict()))
    if about == "loaded position":
        with pytest.raises(RuntimeError) as raised:
            optimizer.load_state_dict(saved[1 + rank])
        assert optimizer.cycle_position == 2
    if about == "loaded file":
        if rank == 1:
            del saved[0]["state"][0]["exp_avg"]
        before = [whole(p) for p in params]
        with pytest.raises(RuntimeError) as raised:
            optimizer.load_state_dict(saved[0])
        assert all(torch.equal(whole(p), b) for p, b in zip(params, before, strict=True))
    if about == "position":
        if rank == 1:
            inside.set_position(optimizer, 1)
        dist.set_debug_level(dist.DebugLevel.INFO)
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
    return str(raised.value)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("inner_steps", "at construction about inner_steps: 4 on rank 0, 5 on rank 1"),
        ("parameters", "at construction about the number of parameters: 10 on rank 0, 9 on rank 1"),
        (
            "group",
            r"in add_param_group\(\) about parameter 10: \(3,\) .* in group 1 on rank 0, \(4,\)",
        ),
        ("loaded position", r"in load_state_dict\(\) about cycle_position: 1 on rank 0, 2 on rank 1"),
        (
            "loaded file",
            r"in load_state_dict\(\) about what fails: None on rank 0, .*lacks exp_avg",
        ),
        ("position", r"in step\(\) about cycle_position: 2 on rank 0, 1 on rank 1"),
    ],
)
def test_ranks_that_disagree_are_told_on_all_of_them(about, words):
    for error in on_ranks(2, _disagrees, about):
        assert re.search(f"ranks disagree {words}", error), error


def _waits():
    module = spread("fsdp", model())
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS)
    give(params, gradients(params, 0))
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        os._exit(
            0 if "rank 0: the sum of the norm over the shards failed between ranks 0, 1" in str(raised.value) else 7
        )
    time.sleep(6)
    os._exit(0)


def test_a_late_rank_is_told_with_its_context():
    with pytest.raises(AssertionError, match="no result of rank 0\nno result of rank 1"):
        on_ranks(2, _waits, timeout=3)
