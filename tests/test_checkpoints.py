"""Checkpoints of several processes: saved on 4 ranks, loaded on 2 and on 1; failing loads, interrupted saves."""

from __future__ import annotations

import copy
import os
import pathlib
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import assert_same, build, run, values
from processes import on_ranks
from sharded import equal_but_for_the_norm, give, gradients, model, spread, whole
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nexus_fused import NexusAdamW
from nexus_fused.reference import read_weight

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "inner_lr": 0.05}
SAVED_AT = 3, 5  # a boundary and mid-cycle
END = 10  # mid-cycle too
UNFROZEN_AT = 4  # parameter 8, in mid-cycle

# How it is saved on 4 ranks and loaded on 2, dtype, whether the optimizer's state is flattened.
WAYS = {
    "fsdp": ("fsdp", "fsdp", torch.float32, False),
    "fsdp bfloat16 flattened": ("fsdp", "fsdp", torch.bfloat16, True),
    "hsdp to fsdp": ("hsdp", "fsdp", torch.bfloat16, False),
    "2d to tensor parallel": ("2d", "tensor parallel", torch.bfloat16, False),
    "tensor parallel to fsdp": ("tensor parallel", "fsdp", torch.float32, False),
    "ddp": ("ddp", "ddp", torch.bfloat16, False),
    "ddp to fsdp, flattened": ("ddp", "fsdp", torch.float32, True),
}


def make(kind, dtype=torch.float32, *, taken=0, empty=True, inner_steps=3):
    """A model and its optimizer as they are after `taken` micro-batches, but for the values: one group partly frozen,
    one frozen, one empty."""
    module = model(dtype)
    for index, param in enumerate(module.parameters()):
        param.requires_grad_(index < 8 or (index == 8 and taken > UNFROZEN_AT))
    if kind == "ddp":
        module = DistributedDataParallel(module)
    elif kind != "plain":
        module = spread(kind, module)
    p = list(module.parameters())
    groups = [{"params": p[:4]}, {"params": [p[4], p[5], p[8]], "lr": 3e-3}, {"params": [p[9]]}, {"params": p[6:8]}]
    if empty:
        groups.insert(2, {"params": []})
    return module, NexusAdamW(groups, **OPTIONS, inner_steps=inner_steps)


def advance(module, optimizer, start, end):
    """Parameter 5 never has a gradient, 6 not in all cycles."""
    params = list(module.parameters())
    for step in range(start, end):
        params[8].requires_grad_(step >= UNFROZEN_AT)
        give(params, gradients(params, step))
        for index in [5, 9] + [6] * (3 <= step < 6) + [8] * (step < UNFROZEN_AT):
            params[index].grad = None
        optimizer.step()


def everything(module, optimizer):
    """Weights, state and groups, whole tensors."""
    params = list(module.parameters())
    optimizer.state_dict()  # clears the displacements of what has not moved
    state = {f"{i}.{key}": whole(v) for i, p in enumerate(params) for key, v in optimizer.state.get(p, {}).items()}
    groups = [{key: v for key, v in g.items() if key != "params"} for g in optimizer.param_groups if g["params"]]
    for group in groups:
        group["betas"] = tuple(group["betas"])  # torch makes lists of tuples
    return [whole(p) for p in params], state, copy.deepcopy(groups)


def same(left, right):
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=0)
    torch.testing.assert_close(left[1], right[1], rtol=0, atol=0)
    assert repr(left[2]) == repr(right[2])


def same_but_for_the_norm(left, right):
    equal_but_for_the_norm(left[0], right[0])
    assert left[1].keys() == right[1].keys()
    equal_but_for_the_norm(left[1].values(), [right[1][key] for key in left[1]])


def app(module, optimizer, **options):
    """What is saved, and what is loaded into."""
    optim = get_optimizer_state_dict(module, optimizer, options=StateDictOptions(**options))
    return {"model": get_model_state_dict(module), "optim": optim}


def _comes_from_adamw(folder, dtype, model_first):
    module = spread("fsdp", model(dtype))
    params = list(module.parameters())
    adamw = torch.optim.AdamW(params, lr=3e-3)
    for step in range(3):
        give(params, gradients(params, step))
        adamw.step()
    dcp.save(app(module, adamw), checkpoint_id=folder)
    module = spread("fsdp", model(dtype))
    optimizer = NexusAdamW(module.parameters(), **OPTIONS)
    state = app(module, optimizer)
    dcp.load(state, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    if model_first:
        set_model_state_dict(module, state["model"])
    set_optimizer_state_dict(module, optimizer, state["optim"])
    if not model_first:
        set_model_state_dict(module, state["model"])
    optimizer.state_dict()
    assert optimizer.param_groups[0]["lr"] == 3e-3
    for p, q in zip(params, module.parameters(), strict=True):
        ours, theirs = optimizer.state[q], adamw.state[p]
        assert torch.equal(whole(q), whole(p))
        weight = read_weight(whole(q), whole(ours["remainder"]) if "remainder" in ours else None)
        assert torch.equal(weight, whole(p).to(torch.float32))
        assert ours["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(ours[key]), whole(theirs[key]).to(torch.float32))


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamws_checkpoint(tmp_path, dtype, model_first):
    on_ranks(2, _comes_from_adamw, str(tmp_path / "saved"), dtype, model_first)


def is_of_mid_cycle(folder):
    """As docs/checkpoints.md says."""
    keys = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return any(key.startswith("optim.state.") and key.endswith(".displacement") for key in keys)


def load(folder, module, optimizer, *, model_first=False, **options):
    if is_of_mid_cycle(folder):
        optimizer.materialize_displacements()
    state = app(module, optimizer, **options)
    dcp.load(state, checkpoint_id=folder)
    if model_first:
        set_model_state_dict(module, state["model"])
    set_optimizer_state_dict(module, optimizer, state["optim"], options=StateDictOptions(**options))
    if not model_first:
        set_model_state_dict(module, state["model"])


def _save(folder):
    saved = {}
    for name, (kind, _, dtype, flat) in WAYS.items():
        module, optimizer = make(kind, dtype, empty=not flat)
        for start, taken in ((0, 3), (3, 5)):
            advance(module, optimizer, start, taken)
            state = app(module, optimizer, flatten_optimizer_state_dict=flat)
            at = f"{folder}/{name} {taken}"
            if name == "fsdp":  # what is written while training goes on is what was at the call
                saved[name, taken] = everything(module, optimizer)
                writing = dcp.async_save(state, checkpoint_id=at, process_group=dist.new_group())
                if taken == 5:
                    advance(module, optimizer, taken, END)
                writing.result()
            else:
                saved[name, taken] = everything(module, optimizer)
                dcp.save(state, checkpoint_id=at)
    return saved


def _save_whole(folder):
    """One file, from rank 0."""
    saved = {}
    for dtype in (torch.float32, torch.bfloat16):
        module, optimizer = make("fsdp", dtype)
        for start, taken in ((0, 3), (3, 5)):
            advance(module, optimizer, start, taken)
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = {
                "model": get_model_state_dict(module, options=options),
                "optim": get_optimizer_state_dict(module, optimizer, options=options),
            }
            if dist.get_rank() == 0:
                torch.save(state, f"{folder}/{dtype} {taken}.pt")
            saved[dtype, taken] = everything(module, optimizer)
    return saved


def _load_whole(folder):
    loaded = {}
    for dtype in (torch.float32, torch.bfloat16):
        for taken in SAVED_AT:
            module, optimizer = make("fsdp", dtype, taken=taken)
            if taken == 5:
                optimizer.materialize_displacements()
            state = {"model": {}, "optim": {}}
            if dist.get_rank() == 0:
                state = torch.load(f"{folder}/{dtype} {taken}.pt", weights_only=True)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(module, optimizer, state["optim"], options=options)
            set_model_state_dict(module, state["model"], options=options)
            loaded[dtype, taken] = everything(module, optimizer)
            advance(module, optimizer, taken, END)
            loaded[dtype, "end"] = everything(module, optimizer)
    return loaded


def test_one_file_of_whole_tensors(tmp_path):
    then = on_ranks(4, _save_whole, str(tmp_path))[0]
    for loaded in on_ranks(2, _load_whole, str(tmp_path)):
        for dtype in (torch.float32, torch.bfloat16):
            module, optimizer = make("plain", dtype)
            advance(module, optimizer, 0, END)
            same_but_for_the_norm(loaded[dtype, "end"], everything(module, optimizer))
            for taken in SAVED_AT:
                same(loaded[dtype, taken], then[dtype, taken])
    for (dtype, taken), expected in then.items():  # in a process without process groups
        module, optimizer = make("plain", dtype, taken=taken)
        state = torch.load(tmp_path / f"{dtype} {taken}.pt", weights_only=True)
        set_optimizer_state_dict(module, optimizer, state["optim"])
        module.load_state_dict(state["model"])
        same(everything(module, optimizer), expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder, and what was saved there by name and micro-batch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, on_ranks(4, _save, str(folder))[0]


def _load(folder):
    loaded = {}
    for name, (_, kind, dtype, flat) in WAYS.items():
        for taken in SAVED_AT:
            here = kind if dist.get_world_size() > 1 else "plain"
            module, optimizer = make(here, dtype, taken=taken, empty=not flat)
            at = f"{folder}/{name} {taken}"
            assert is_of_mid_cycle(at) == (taken == 5)
            load(at, module, optimizer, model_first=dtype == torch.bfloat16, flatten_optimizer_state_dict=flat)
            loaded[name, taken] = everything(module, optimizer)
            advance(module, optimizer, taken, END)
            loaded[name, "end"] = everything(module, optimizer)
    return loaded


@pytest.mark.parametrize("n", [2, 1])
def test_saved_on_4_ranks(saved, n):
    folder, then = saved
    loaded = on_ranks(n, _load, str(folder))[0]
    for name, (_, _, dtype, _) in WAYS.items():
        for taken in SAVED_AT:
            same(loaded[name, taken], then[name, taken])
        module, optimizer = make("plain", dtype)
        advance(module, optimizer, 0, END)
        same_but_for_the_norm(loaded[name, "end"], everything(module, optimizer))


def _go_back(folder):
    """Into a live optimizer: in place, before anything of ours is called."""
    for kind, dtype, options in [
        ("fsdp", torch.float32, {}),
        ("fsdp", torch.bfloat16, {"cpu_offload": True}),
        # Here set_optimizer_state_dict takes another state_dict() between the load in place and ours.
        ("ddp", torch.float32, {"full_state_dict": True}),
        ("ddp", torch.bfloat16, {"full_state_dict": True}),
    ]:
        module, optimizer = make(kind, dtype)
        then = {}
        for start, taken in ((0, 5), (5, 6)):
            advance(module, optimizer, start, taken)
            dcp.save(app(module, optimizer, **options), checkpoint_id=f"{folder}/{kind} {dtype} {taken}")
            then[taken] = everything(module, optimizer)
        for later, taken, model_first in ((8, 5, True), (6, 5, False), (8, 6, True)):
            advance(module, optimizer, taken if later == 6 else 6, later)
            if taken == 6:
                optimizer.outer_step()  # that checkpoint has no displacements to load
            load(f"{folder}/{kind} {dtype} {taken}", module, optimizer, model_first=model_first, **options)
            same(everything(module, optimizer), then[taken])
            assert optimizer.cycle_position == taken % 3
            if taken == 5:
                advance(module, optimizer, 5, 6)
                same(everything(module, optimizer), then[6])


def test_going_back_within_a_run(tmp_path):
    on_ranks(2, _go_back, str(tmp_path))


# What fails


def _fills_what_it_finds(optimizer, full, *, materialize=True):
    """The loop of docs/checkpoints.md."""
    if materialize and any("displacement" in entry for entry in full["state"].values()):
        optimizer.materialize_displacements()
    state = optimizer.state_dict()
    for group, full_group in zip(state["param_groups"], full["param_groups"], strict=True):
        group.update({key: value for key, value in full_group.items() if key != "params"})
        for index, full_index in zip(group["params"], full_group["params"], strict=True):
            entry = state["state"].get(index, {})
            for key, value in full["state"].get(full_index, {}).items():
                if isinstance(entry[key], DTensor):
                    value = distribute_tensor(value, entry[key].device_mesh, entry[key].placements)
                entry[key] = value
    optimizer.load_state_dict(state)


def _loads_by_a_loop(kind, dtype, saved):
    """Each of the saved states in turn, each from where the one before left the optimizer."""
    module = model(dtype) if kind == "plain" else spread(kind, model(dtype))
    params = list(module.parameters())
    optimizer = NexusAdamW(params, **OPTIONS, inner_steps=3)
    ends = []
    for taken, weights, full in saved:
        if ends and taken % 3 == 0:
            assert optimizer.cycle_position == 2  # a boundary comes into mid-cycle
        elif not ends and taken % 3:
            with pytest.raises(KeyError, match="displacement"):
                _fills_what_it_finds(optimizer, full, materialize=False)
        _fills_what_it_finds(optimizer, full)
        assert optimizer.cycle_position == taken % 3
        with torch.no_grad():
            for param, weight in zip(params, weights, strict=True):
                like = isinstance(param, DTensor)
                param.copy_(distribute_tensor(weight, param.device_mesh, param.placements) if like else weight)
        for step in range(taken, 8):
            give(params, gradients(params, step))
            optimizer.step()
        ends.append([whole(p) for p in params])
    return ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_a_loop_that_fills_what_it_finds(kind, dtype):
    params = list(model(dtype).parameters())
    optimizer = NexusAdamW(params, **OPTIONS, inner_steps=3)
    saved = []
    for step in range(8):
        if step in (4, 6):
            saved.append((step, values(params), copy.deepcopy(optimizer.state_dict())))
        give(params, gradients(params, step))
        optimizer.step()
    results = (
        [_loads_by_a_loop(kind, dtype, saved)] if kind == "plain" else on_ranks(2, _loads_by_a_loop, kind, dtype, saved)
    )
    for ends in results:
        for weights in ends:
            equal_but_for_the_norm(weights, [p.detach() for p in params])


def _message(call, *args, **kwargs):
    with pytest.raises((CheckpointException, RuntimeError, ValueError)) as raised:
        call(*args, **kwargs)
    return f"{type(raised.value).__name__}: {raised.value}"


def _fail(folder):
    """Each kind of broken checkpoint: what is said, and whether model and optimizer are as they were."""
    module, optimizer = make("fsdp", torch.bfloat16)
    advance(module, optimizer, 0, 5)
    dcp.save(app(module, optimizer), checkpoint_id=f"{folder}/good")
    good = everything(module, optimizer)
    advance(module, optimizer, 5, 7)
    before = everything(module, optimizer)
    rank, said = dist.get_rank(), {}
    for fault in ("no metadata", "truncated", "no file"):
        broken = pathlib.Path(folder, fault)
        if rank == 0:
            shutil.copytree(f"{folder}/good", broken)
            if fault == "no metadata":
                (broken / ".metadata").unlink()
            else:
                file = max(broken.glob("__1_*.distcp"))
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                if fault == "no file":
                    file.unlink()
        dist.barrier()
        state = copy.deepcopy(app(module, optimizer))
        said[fault] = _message(dcp.load, state, checkpoint_id=broken)
        same(everything(module, optimizer), before)
    # Without the copy: values may be mixed, the position is not; the next load replaces everything.
    said["in place"] = _message(dcp.load, app(module, optimizer), checkpoint_id=f"{folder}/truncated")
    assert optimizer.cycle_position == 1
    load(f"{folder}/good", module, optimizer)
    same(everything(module, optimizer), good)
    return said


def test_broken_checkpoints_raise_on_all_ranks_and_change_nothing(tmp_path):
    for said in on_ranks(2, _fail, str(tmp_path)):
        for fault, message in said.items():
            assert message.startswith("CheckpointException"), (fault, message)


class DiesBeforeMetadata(dcp.FileSystemWriter):
    def finish(self, metadata, results):
        os._exit(0)


def _dies(folder):
    module, optimizer = make("fsdp", taken=5)
    advance(module, optimizer, 0, 5)
    dcp.save(app(module, optimizer), storage_writer=DiesBeforeMetadata(folder))


def _loads_the_rest(folder):
    module, optimizer = make("fsdp", taken=5)
    optimizer.materialize_displacements()
    before = everything(module, optimizer)
    message = _message(dcp.load, app(module, optimizer), checkpoint_id=folder)
    same(everything(module, optimizer), before)  # nothing was read yet
    return message


def test_a_save_that_died(tmp_path):
    with pytest.raises(AssertionError, match="no result of rank 0"):
        on_ranks(2, _dies, str(tmp_path))
    assert len(list(tmp_path.glob("*.distcp"))) == 2
    for message in on_ranks(2, _loads_the_rest, str(tmp_path)):
        assert message.startswith("CheckpointException")
        assert "metadata" in message


def _does_not_fit(folder):
    """What the checkpoint or the optimizer that loads it lacks."""
    module, optimizer = make("fsdp")
    for start, taken in ((0, 3), (3, 5)):
        advance(module, optimizer, start, taken)
        dcp.save(app(module, optimizer), checkpoint_id=f"{folder}/{taken}")
    said = {}
    for what in ("not materialized", "frozen"):
        module, optimizer = make("fsdp", taken=5)
        if what == "frozen":
            optimizer.materialize_displacements()
            next(module.parameters()).requires_grad_(False)
        before = everything(module, optimizer)
        state = copy.deepcopy(app(module, optimizer))
        dcp.load(state, checkpoint_id=f"{folder}/5")
        said[what] = _message(set_optimizer_state_dict, module, optimizer, state["optim"])
        same(everything(module, optimizer), before)
    module, optimizer = make("fsdp")
    optimizer.materialize_displacements()
    said["no displacements"] = _message(dcp.load, app(module, optimizer), checkpoint_id=f"{folder}/3")
    # Another K: the checkpoint has fewer norms than there is room for.
    module, optimizer = make("fsdp", inner_steps=4)
    said["inner_steps"] = _message(dcp.load, app(module, optimizer), checkpoint_id=f"{folder}/3")
    state = app(module, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/3", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    with pytest.warns(UserWarning, match="inner_steps=3, this optimizer has 4, which it keeps"):
        set_optimizer_state_dict(module, optimizer, state["optim"])
    assert optimizer.inner_steps == 4
    assert optimizer.at_boundary
    return said


def test_checkpoints_that_do_not_fit_are_explained(tmp_path):
    for said in on_ranks(2, _does_not_fit, str(tmp_path)):
        assert "parameter 0 of group 0 has no 'displacement'" in said["not materialized"]
        assert "materialize_displacements()" in said["not materialized"]
        assert "parameter 0 of group 0, which is frozen here, has no 'displacement'" in said["frozen"]
        assert "freeze it after loading" in said["frozen"]
        assert "Missing key in checkpoint state_dict: optim.state.0.weight.displacement" in said["no displacements"]
        assert "grad_norms.3" in said["inner_steps"]


# One process


def test_a_parameter_that_was_unfrozen_is_saved(dtype):
    """torch.distributed.checkpoint refuses to load a trainable parameter without state."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(dtype)
    module[0].requires_grad_(False)
    twin = copy.deepcopy(module)
    optimizer, other = (NexusAdamW(m.parameters(), lr=1e-2, inner_lr=0.05) for m in (module, twin))
    for m, o in ((module, optimizer), (twin, other)):
        run(o, list(m[1].parameters()), 2)
        m[0].requires_grad_(True)
    fresh = copy.deepcopy(module)
    loader = NexusAdamW(fresh.parameters(), lr=1e-2, inner_lr=0.05)
    loader.materialize_displacements()
    set_optimizer_state_dict(fresh, loader, copy.deepcopy(get_optimizer_state_dict(module, optimizer)))
    with optimizer.outer_weights():
        assert [int(entry["step"]) for entry in optimizer.state_dict()["state"].values()] == [0] * 4
    for m, o in ((module, optimizer), (twin, other), (fresh, loader)):
        run(o, list(m.parameters()), 6, 10)
        assert_same(values(m.parameters()), values(module.parameters()))


def test_a_flattened_boundary_into_materialized_displacements(dtype):
    """What torch does not find in a flattened state it replaces with {}."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    module = nn.Linear(4, 5).to(dtype)
    optimizer = NexusAdamW(module.parameters(), lr=1e-2, inner_lr=0.05)
    run(optimizer, list(module.parameters()), 4)
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=options))
    expected = everything(module, optimizer)
    optimizer.materialize_displacements()
    set_optimizer_state_dict(module, optimizer, state, options=options)
    same(everything(module, optimizer), expected)
    del state["state.weight.exp_avg"]
    with pytest.raises(ValueError, match="parameter 0 of group 0 lacks exp_avg"):
        set_optimizer_state_dict(module, optimizer, state, options=options)


def test_what_a_failed_load_left_is_the_state(dtype):
    """It wrote displacements and went no further: θ = w + D, as ever."""
    params, optimizer = build(dtype=dtype)
    run(optimizer, params, 2)
    before = values(params)
    for entry in optimizer.state_dict()["state"].values():
        entry["displacement"].zero_()
    with optimizer.outer_weights():
        assert_same(values(params), before)
