"""Ranks that walk on their own and average their displacements once in a cycle, against a process that plays them."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from conftest import BACKENDS
from processes import on_ranks
from sharded import counted_collectives, give, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nexus_fused import NexusAdamW, reference
from nexus_fused.flat import STATE_DTYPE
from nexus_fused.ranks import Ranks

K = 3
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "inner_lr": 0.05, "inner_steps": K}
SHAPES = [(40, 30), (30,), (7, 3), (0, 5), (1,), (5, 4)]
CYCLES = 3


def starts(dtype):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def gradient_of(rank, cycle, k, index, dtype):
    """One rank's gradient of a parameter in an inner step; None and NaN in many places."""
    if (index == 1 and rank == 0) or (index == 2 and cycle == 1) or (index == 4 and k == 0):
        return None  # on one rank, in one cycle on all, in the first step of each walk
    if cycle == 2 and rank == 1:
        return None  # a rank that moves nowhere
    generator = torch.Generator().manual_seed(1000 * rank + 100 * cycle + 10 * k + index)
    gradient = torch.randn(SHAPES[index], generator=generator).to(dtype)
    if cycle == 0 and k == 1 and rank == 1 and index == 0:
        gradient[3, 4] = float("nan")
    return gradient


def play(ranks, dtype, *, kept=None, in_part=False):
    """What all ranks must come to, by the definition, in torch: θ and exp_avg after CYCLES cycles.

    kept: the dtype of displacements. in_part: in the last cycle rank r takes r inner steps only.
    """
    theta = [start.to(STATE_DTYPE[dtype]) for start in starts(dtype)]
    kept = torch.float64 if dtype == torch.float64 else kept or torch.bfloat16
    m, v = ([torch.zeros_like(t) for t in theta] for _ in range(2))
    steps = [0] * len(theta)
    for cycle in range(CYCLES):
        displacements, walked, touched = [], [], [False] * len(theta)
        for rank in range(ranks):
            count = rank if in_part and cycle == CYCLES - 1 else K
            lengths, D = 0.0, [torch.zeros_like(t) for t in theta]
            for k in range(count):
                gradients = [gradient_of(rank, cycle, k, i, dtype) for i in range(len(D))]
                squares = [g.double().square().sum() for g in gradients if g is not None]
                norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
                factor = OPTIONS["inner_lr"] / norm
                taken = bool(norm.isfinite() and norm > 0)
                lengths += OPTIONS["inner_lr"] * taken
                for i, g in enumerate(gradients):
                    touched[i] |= g is not None
                    if g is not None and taken:
                        D[i] = D[i] + reference.scaled_gradient(g, factor, D[i].dtype)
                        if k + 1 < K:  # the last one is rounded with the share
                            D[i] = D[i].to(kept).to(D[i].dtype)
            displacements.append([(d * (1 / ranks)).to(kept) for d in D])
            walked.append(lengths)
        gamma = torch.tensor(sum(walked), dtype=torch.float64) * (1 / ranks)
        for i, t in enumerate(theta):
            total = displacements[0][i]
            for other in displacements[1:]:
                total = total + other[i]
            if not touched[i] or gamma == 0:
                continue
            steps[i] += 1
            scalars = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": steps[i]}
            scalars = {key: torch.tensor(value, dtype=torch.float64) for key, value in scalars.items()}
            G = total.to(t.dtype) * (1 / gamma)
            theta[i], m[i], v[i], _ = reference.adamw_formula(t, G, m[i], v[i], None, **scalars)
    return theta, m, steps


def walk(dtype, backend="cpu", kept=None, in_part=False, flatten=True, odd=False):
    """The same on this rank; also what was sent in each cycle."""
    rank, group = dist.get_rank(), dist.group.WORLD
    params = [nn.Parameter(start) for start in starts(dtype)]
    if odd:  # memory that must not move, and memory with gaps
        params[0] = nn.Parameter(torch.stack([params[0].data] * 2, dim=-1)[..., 0])
        params[2].data = torch.cat([params[2].data.flatten(), torch.ones(3, dtype=dtype)])[:21].view(7, 3)
    optimizer = NexusAdamW(
        params, **OPTIONS, backend=backend, displacement_group=group, displacement_dtype=kept, flatten=flatten
    )
    sent = []
    for cycle in range(CYCLES):
        count = rank if in_part and cycle == CYCLES - 1 else K
        with counted_collectives() as calls:
            for k in range(count):
                for index, param in enumerate(params):
                    param.grad = gradient_of(rank, cycle, k, index, dtype)
                optimizer.step()
            if in_part and cycle == CYCLES - 1:
                optimizer.outer_step()
            sent.append([elements for elements, _ in calls])
        assert optimizer.at_boundary
    optimizer.outer_step()  # nobody has walked: nothing happens
    state = [optimizer.state[p] for p in params]
    weights = [reference.read_weight(p.detach(), s.get("remainder")) for p, s in zip(params, state, strict=True)]
    return weights, [s["exp_avg"] for s in state], [int(s["step"]) for s in state], sent


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


WAYS = [
    (torch.float32, None),
    (torch.float32, torch.float32),
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(
    ("dtype", "kept", "backend", "in_part"),
    [
        *((dtype, kept, backend, False) for dtype, kept in WAYS for backend in BACKENDS),
        *((dtype, kept, "cpu", True) for dtype, kept in WAYS),
    ],
)
def test_two_ranks_equal_one_process_that_plays_them(dtype, kept, backend, in_part):
    """Bit for bit: a sum of two has one order. float64 sees the last unit of the norm, whose sum has another order
    here: 4e-16 of weights near 2 in each step, through AdamW's quotient where an element has hardly moved."""
    expected = play(2, dtype, kept=kept, in_part=in_part)
    for weights, exp_avg, steps, sent in on_ranks(2, walk, dtype, backend, kept, in_part):
        if dtype is torch.float64:
            torch.testing.assert_close(weights, expected[0], rtol=0, atol=1e-11)
            torch.testing.assert_close(exp_avg, expected[1], rtol=0, atol=K * 4e-16)
        else:
            assert_equal(weights, expected[0])
            assert_equal(exp_avg, expected[1])
        assert steps == expected[2]
        assert [len(calls) for calls in sent] == [2] * CYCLES  # scalars and one bucket


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_ranks_and_memory_of_every_kind(dtype, flatten):
    """A sum of four has orders: float32's rounding of a mean whose parts are at most Γ, five times at most, through
    AdamW's quotient, which is at most 1 and steep where the gradient is small."""
    expected = play(4, dtype, kept=torch.float32)
    results = on_ranks(4, walk, dtype, "cpu", torch.float32, False, flatten, True)
    for weights, exp_avg, steps, sent in results:
        assert_equal(weights, results[0][0])
        torch.testing.assert_close(exp_avg, expected[1], rtol=1e-5, atol=5 * 2**-24)
        torch.testing.assert_close(weights, expected[0], rtol=1e-4, atol=1e-5)
        assert steps == expected[2]
        assert [len(calls) for calls in sent] == [2] * CYCLES  # scalars and one bucket, wherever parameters lie


def _memory(displaced):
    def status(key):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

    params = [nn.Parameter(torch.full((4096, 2048), 0.5)) for _ in range(4)]  # 128 MiB
    group = dist.group.WORLD if displaced else None
    optimizer = NexusAdamW(params, inner_steps=2, displacement_group=group)
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    for _ in range(2):
        optimizer.step()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(2):
        optimizer.step()
    return status("VmHWM") - before


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
def test_no_memory_beside():
    """Of 128 MiB that are averaged: gloo's own buffers only, an eighth at most."""
    for extra in on_ranks(2, _memory, True):
        assert extra < 16 * 2**20, extra


def _trains(cycles):
    """Real backward passes under no_sync, with faults; every rank on data of its own."""
    rank = dist.get_rank()
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    late = nn.Linear(6, 1)
    parallel = DistributedDataParallel(module)
    optimizer = NexusAdamW(
        parallel.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=2, displacement_group=dist.group.WORLD
    )
    generator = torch.Generator().manual_seed(100 + rank)
    differed = 0
    for step in range(2 * cycles):
        batch = torch.randn(2, 6, generator=generator)
        if step % 37 == 3 * rank:
            batch[0, 0] = float("nan")
        if step == cycles:
            optimizer.add_param_group({"params": list(late.parameters()), "lr": 1e-3})
        with parallel.no_sync():
            loss = parallel(batch).square().mean()
            if step >= cycles and (step // 2 + rank) % 3:
                loss = loss + late(batch).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 11:
            if rank != 2:
                optimizer.step()
            optimizer.outer_step()
        if not optimizer.at_boundary:
            everyone = [torch.empty_like(module[0].weight) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, module[0].weight.detach())
            differed += not torch.equal(everyone[0], everyone[1])
    optimizer.outer_step()
    module(batch).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="state_dict\\(\\) in mid-cycle"):
        optimizer.state_dict()
    optimizer.outer_step()
    return [whole(p) for p in [*module.parameters(), *late.parameters()]], differed, optimizer.metrics()


def test_ranks_stay_equal_over_200_cycles_with_faults():
    results = on_ranks(4, _trains, 200)
    for weights, differed, metrics in results:
        assert_equal(weights, results[0][0])
        assert all(w.isfinite().all() for w in weights)
        assert differed > 150  # the walks do
        assert metrics["skipped_outer_steps"] == 8  # of outer_step() after a step without any gradient


def _of_shards():
    """FSDP2 within two ranks, walks of their own across: the two replicas of each shard average."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    fully_shard(module, mesh=mesh["shard"])
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS, displacement_group=mesh.get_group("replicate"))
    replica = mesh.get_local_rank("replicate")
    for k in range(2 * K):
        generator = torch.Generator().manual_seed(10 * k + replica)
        give(params, [torch.randn(p.shape, generator=generator) for p in params])
        optimizer.step()
    return [whole(p) for p in params], optimizer.metrics()


def _one_disagrees():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = nn.Linear(6, 5)
    fully_shard(module, mesh=mesh["shard"])
    with pytest.raises(RuntimeError) as raised:
        NexusAdamW(
            module.parameters(),
            inner_steps=4 + (dist.get_rank() == 3),
            displacement_group=mesh.get_group("replicate"),
        )
    return str(raised.value)


def test_ranks_of_all_groups_are_told():
    """Two of four compare, and find no difference, before they would wait for the two that found one."""
    for error in on_ranks(4, _one_disagrees):
        assert "about inner_steps: 4 on rank 2, 5 on rank 3" in error


def _of_replicas():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS, displacement_group=dist.group.WORLD)
    for k in range(2 * K):
        generator = torch.Generator().manual_seed(10 * k + dist.get_rank())
        give(params, [torch.randn(p.shape, generator=generator) for p in params])
        optimizer.step()
    return [whole(p) for p in params], optimizer.metrics()


def test_walks_of_sharded_replicas():
    """As two ranks that have all parameters, but for the norm's order of summation."""
    expected, metrics = on_ranks(2, _of_replicas)[0]
    for weights, same in on_ranks(4, _of_shards):
        torch.testing.assert_close(weights, expected, rtol=2.4e-7, atol=1e-8)
        for key in ("alignment", "lost_fraction"):
            assert same[key] == pytest.approx(metrics[key], rel=1e-6, abs=1e-9)


def _alignment():
    param = nn.Parameter(torch.zeros(2))
    group, kept = dist.group.WORLD, torch.float32  # bfloat16 rounds D by 2^-9
    optimizer = NexusAdamW([param], inner_lr=1e-6, inner_steps=2, displacement_group=group, displacement_dtype=kept)
    directions = [[(1.0, 0.0), (1.0, 0.0)], [(0.0, 1.0), (0.6, 0.8)]][dist.get_rank()]
    for direction in directions:
        param.grad = torch.tensor(direction)
        optimizer.step()
    return optimizer.metrics()["alignment"]


def test_alignment_is_that_of_all_ranks_gradients():
    units = torch.tensor([(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)], dtype=torch.float64)
    cosines = units @ units.T
    expected = float((cosines.sum() - 4) / 12)
    assert on_ranks(2, _alignment) == pytest.approx([expected] * 2, rel=1e-5)


def _bad_input():
    rank, errors = dist.get_rank(), []
    group = dist.group.WORLD
    for options in (
        {"displacement_dtype": [torch.float32, torch.bfloat16][rank], "displacement_group": group},
        {"displacement_dtype": torch.float16, "displacement_group": group},
        {"displacement_group": "gloo"},
        {"norm_group": 3},
        {"displacement_group": group, "inner_steps": 2 + rank},
        {"displacement_group": group, "start": float(rank)},
        {"displacement_group": group, "start": float(rank), "frozen": True},
        {"displacement_group": group, "lr": 1e-3 * (1 + rank)},
    ):
        param = nn.Parameter(torch.full((4,), options.pop("start", 1.0)))
        param.requires_grad_(not options.pop("frozen", False))
        with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
            NexusAdamW([param], **options)
        errors.append(f"{raised.type.__name__}: {raised.value}")
    mesh = init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    for name in ("displacement_group", "norm_group"):
        with pytest.raises(
            ValueError, match=f"{name} has the ranks 0, 1, but a parameter is sharded over the ranks 0, 1"
        ):
            NexusAdamW([sharded], **{name: group})
    with pytest.raises(TypeError, match="group must be a process group or None, but is 'x'"):
        NexusAdamW([sharded]).check_ranks("x")
    return errors


def test_bad_input():
    words = [
        "RuntimeError: ranks disagree at construction about displacement_dtype: torch.float32 on rank 0, torch.",
        "ValueError: displacement_dtype must be None (torch.bfloat16 up to 32 inner steps, else torch.float32), torch.",
        "TypeError: displacement_group must be a process group or None, but is 'gloo'",
        "TypeError: norm_group must be a process group or None, but is 3",
        "RuntimeError: ranks disagree at construction about inner_steps: 2 on rank 0, 3 on rank 1",
        "RuntimeError: ranks disagree at construction about the value of parameter 0, which must be broadcast from",
        "RuntimeError: ranks disagree at construction about the value of parameter 0, which must be broadcast from",
        "RuntimeError: ranks disagree at construction about lr of group 0: 0.001 on rank 0, 0.002 on rank 1",
    ]
    for errors in on_ranks(2, _bad_input):
        for error, expected in zip(errors, words, strict=True):
            assert error.startswith(expected), error


def _uneven(debug):
    """8, 7 and 2 micro-batches in cycles of 4, with schedules that stand still afterwards; outer_step() on each."""
    if debug:
        dist.set_debug_level(dist.DebugLevel.INFO)
    rank = dist.get_rank()
    params = [nn.Parameter(start) for start in starts(torch.float32)]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = NexusAdamW(
        [*params, frozen], lr=1e-2, inner_lr=0.05, inner_steps=4, displacement_group=dist.group.WORLD
    )
    with counted_collectives() as calls:
        for k in range((8, 7, 2)[rank]):
            if k == 1:
                frozen.requires_grad_()  # on all ranks; one has a gradient
                frozen.grad = torch.ones(3) if rank == 0 else None
            for index, param in enumerate(params):
                param.grad = gradient_of(rank, 0, k, index, torch.float32)
            optimizer.step()
            optimizer.param_groups[0].update(lr=1e-2 / (2 + k), betas=(0.9 - 0.02 * k, 0.95))
        optimizer.outer_step()
    state = [int(optimizer.state[p]["step"]) for p in [*params, frozen]]
    return (
        [p.detach().clone() for p in [*params, frozen]],
        state,
        len([c for c in calls if c[0] > 4]),
        optimizer.metrics(),
    )


@pytest.mark.parametrize("debug", [False, True])
def test_ranks_with_fewer_micro_batches_take_part_until_the_last_has_come(debug):
    results = on_ranks(3, _uneven, debug)
    for weights, steps, averages, metrics in results:
        assert_equal(weights, results[0][0])
        assert max(steps) == 2  # two cycles; in the third nobody walks, and nothing happens
        assert steps[-1] == 2  # rank 0 had gradients of it in both
        assert averages == results[0][2]
        assert metrics["skipped_outer_steps"] == 0


def _once_all_have_come():
    param = nn.Parameter(torch.ones(3))
    optimizer = NexusAdamW([param], displacement_group=dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "walkers", 49)
        patch.setattr(Ranks, "sum_over_walkers", lambda _, tensors: [tensor.mul_(49) for tensor in tensors])
        optimizer.outer_step()
    return param.detach()


def test_outer_step_returns_whatever_the_number_of_ranks():
    """In float64 49 · (1/49) is not 1."""
    assert_equal(on_ranks(1, _once_all_have_come, timeout=3), [torch.ones(3)])


def _stops_while_sums_begin():
    """The third of four cannot be started: how many of those before it were waited for."""
    begun, waited = [], []

    class Reduction:
        def wait(self):
            waited.append(self)

    def all_reduce(tensor, **_):
        if len(begun) == 2:
            raise RuntimeError("a rank has gone")
        begun.append(Reduction())
        return begun[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        with pytest.raises(RuntimeError, match=r"the average of displacements failed .* a rank has gone"):
            Ranks(displacement_group=dist.group.WORLD).sum_over_walkers([torch.ones(1)] * 4)
    return len(waited)


def test_sums_that_have_begun_are_waited_for():
    """Or they would still write when θ is in their place again."""
    assert on_ranks(1, _stops_while_sums_begin) == [2]


def _writes(where):
    params = [nn.Parameter(start) for start in starts(torch.float32)]
    late = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = NexusAdamW([*params, late], **OPTIONS, displacement_group=dist.group.WORLD)

    def step(k):
        for index, param in enumerate(params):
            param.grad = gradient_of(dist.get_rank(), 0, k, index, torch.float32)
        optimizer.step()

    for k in range(2 * K):
        step(k)
        with torch.no_grad():
            if where == "at a boundary" and optimizer.at_boundary:
                params[0].clamp_(-0.1, 0.1)
            if where == "inside outer_weights()" and k == 1:
                with optimizer.outer_weights():
                    params[0].clamp_(-0.1, 0.1)
            if where == "in mid-cycle" and k == 1:
                params[0].clamp_(-0.1, 0.1)
                late.requires_grad_()  # which has the optimizer look at all of them anew
                errors = []
                for call in (optimizer.step, optimizer.outer_step, optimizer.state_dict):
                    with pytest.raises(RuntimeError) as raised:
                        call()
                    errors.append(str(raised.value))
                return errors
    return [p.detach() for p in params]


@pytest.mark.parametrize("where", ["at a boundary", "inside outer_weights()", "in mid-cycle"])
def test_writes_reach_all_ranks_alike_or_are_refused(where):
    """A walk is one rank's own: what is written into it cannot become θ."""
    results = on_ranks(2, _writes, where)
    for result in results:
        if where == "in mid-cycle":
            assert all("parameter 0 of group 0" in e and "was written in mid-cycle" in e for e in result)
        else:
            assert_equal(result, results[0])


def _adds_a_group(of_rank):
    params = [nn.Parameter(start) for start in starts(torch.float32)]
    optimizer = NexusAdamW(params, **OPTIONS, displacement_group=dist.group.WORLD)
    for index, param in enumerate(params):
        param.grad = gradient_of(dist.get_rank(), 0, 0, index, torch.float32)
    optimizer.step()
    late = nn.Parameter(torch.ones(3) + of_rank * dist.get_rank())
    if of_rank:
        with pytest.raises(RuntimeError, match=r"in add_param_group\(\) about the value of parameter 0"):
            optimizer.add_param_group({"params": [late]})
        late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 2
    for _ in range(1, K):
        late.grad = torch.ones(3)
        optimizer.step()
    return [p.detach() for p in [*params, late]]


@pytest.mark.parametrize("of_rank", [0, 1])
def test_a_late_group_starts_from_equal_weights(of_rank):
    results = on_ranks(2, _adds_a_group, of_rank)
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0][-1], torch.ones(3))


def _is_left_alone(dtype):
    """The other rank does not come to the average."""
    params = [nn.Parameter(start) for start in starts(dtype)]
    optimizer = NexusAdamW(params, **OPTIONS, displacement_group=dist.group.WORLD)
    for k in range(K):
        for index, param in enumerate(params):
            param.grad = gradient_of(0, 0, k, index, dtype)
        if k + 1 < K:
            optimizer.step()
    if dist.get_rank() == 1:
        time.sleep(6)
        os._exit(0)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    words = "the optimizer on rank 0: the average of displacements failed between ranks 0, 1"
    assert str(raised.value).startswith(words), raised.value
    assert optimizer.at_boundary
    assert_equal([p.detach() for p in params], starts(dtype))
    assert all(optimizer.state[p]["step"] == 0 for p in params)
    assert not any("displacement" in optimizer.state[p] for p in params)
    assert optimizer.param_groups[0]["cycle_position"] == 0
    os._exit(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_that_is_left_alone_returns_to_the_start_of_the_cycle(dtype):
    with pytest.raises(AssertionError, match="no result of rank 0\nno result of rank 1"):
        on_ranks(2, _is_left_alone, dtype, timeout=3)
