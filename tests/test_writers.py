"""Who else writes weights, moves them or reads them: nothing they do is lost, nothing dead is updated."""

from __future__ import annotations

import contextlib
import copy
import io

import inside
import pytest
import safetensors.torch
import torch
from conftest import assert_same, build, make_params, run, set_grads, values
from torch import nn

from nexus_fused import NexusAdamW
from nexus_fused.reference import read_weight


def theta_after(param, optimizer, value):
    """What θ is once `value` was written into a parameter: it moves along, by the displacement there is."""
    return value + optimizer.state[param].get("displacement", torch.zeros(())).double().expand(param.shape)


def assert_near(param, theta):
    """After one update of AdamW, which moves a weight by lr = 1e-4. Below float32 what was written keeps the digits of
    the remainder: half of the spacing, and half of it for the rounding into the parameter."""
    spacing = {torch.bfloat16: 2**-5, torch.float16: 2**-8}.get(param.dtype, 0)  # between 4 and 8
    torch.testing.assert_close(param.detach().double(), theta.expand(param.shape), rtol=0, atol=2e-4 + spacing)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("taken", [0, 4, 6])
def test_theta_moves_along_with_what_is_written(backend, dtype, taken, flatten):
    """After construction, at a boundary and in mid-cycle: training goes on from what was written."""
    params, optimizer = build(dtype=dtype, backend=backend, flatten=flatten, lr=1e-4, weight_decay=0)
    run(optimizer, params, taken)
    theta = theta_after(params[0], optimizer, 5)
    with torch.no_grad():
        params[0].fill_(5)
    run(optimizer, params, 4 - taken % 4, 20)
    assert optimizer.at_boundary
    assert_near(params[0], theta)


@pytest.mark.parametrize("taken", [1, 3])
def test_what_is_shown_and_put_back_leaves_no_trace(backend, dtype, taken):
    """A perturbation (SAM), an average for an evaluation, `max_norm`: bit for bit, in mid-cycle too."""
    results = []
    for shown in (False, True):
        params, optimizer = build(dtype=dtype, backend=backend)
        run(optimizer, params, taken)
        if shown:
            kept = values(params)
            with torch.no_grad():
                for value in (0.0, torch.nan, torch.inf, 1e-3):
                    for p in params:
                        p.fill_(value)
                for p, value in zip(params, kept, strict=True):
                    p.copy_(value)
        run(optimizer, params, 6, 9)
        results.append(values(params))
    assert_same(*results)


def test_elements_that_nobody_wrote_keep_their_digits(backend):
    params, optimizer = build(dtype=torch.bfloat16, backend=backend, weight_decay=0)
    run(optimizer, params, 4)
    remainder = optimizer.state[params[0]]["remainder"]
    before = read_weight(params[0].detach(), remainder)
    with torch.no_grad():
        params[0][1:3].clamp_(-0.5, 0.5)
    optimizer.step()  # without a gradient
    after = read_weight(params[0].detach(), remainder)
    written = params[0].detach().float() == before.sign() * 0.5
    assert 0 < written.sum() < written.numel()
    assert_same([after[~written]], [before[~written]])
    assert ((after.abs() - 0.5).abs()[written] <= 2**-9).all()  # half of the spacing at 0.5


@pytest.mark.parametrize("taken", [0, 2, 4])
@pytest.mark.parametrize("how", ["load into itself", "resume", "deepcopy", "inside outer_weights"])
def test_written_values_are_in_what_is_saved(backend, dtype, taken, how):
    """Saved or copied right after the write, before any step has seen it."""
    params, optimizer = build(dtype=dtype, backend=backend, lr=1e-4, weight_decay=0)
    run(optimizer, params, taken)
    others, other = build(dtype=dtype, backend=backend, lr=1e-4, weight_decay=0)
    theta = theta_after(params[0], optimizer, 5) if how != "inside outer_weights" else torch.tensor(5.0).double()
    with optimizer.outer_weights() if how == "inside outer_weights" else contextlib.nullcontext():
        with torch.no_grad():
            params[0].fill_(5)
        if how == "load into itself":  # as libraries do when they prepare an optimizer
            optimizer.load_state_dict(optimizer.state_dict())
            others, other = params, optimizer
        elif how == "deepcopy":
            others, other = copy.deepcopy((params, optimizer))
        else:
            state, weights = copy.deepcopy((optimizer.state_dict(), values(params)))
            with torch.no_grad():
                for p, value in zip(others, weights, strict=True):
                    p.copy_(value)
            other.load_state_dict(state)
    run(other, others, 4 - other.cycle_position, 20)
    assert_near(others[0], theta)


def test_a_copys_first_write_counts(backend):
    params, optimizer = build(backend=backend, lr=1e-4, weight_decay=0)
    run(optimizer, params, 2)
    others, other = copy.deepcopy((params, optimizer))
    theta = theta_after(others[0], other, 5)
    with torch.no_grad():
        others[0].fill_(5)
    run(other, others, 2, 9)
    assert_near(others[0], theta)


def test_gaps_and_low_precision_load_without_a_remainder(backend):
    p = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16)[:, ::2])
    optimizer = NexusAdamW([p], backend=backend)
    with torch.no_grad():
        p.fill_(5)
    optimizer.load_state_dict(torch.optim.AdamW([p]).state_dict())
    assert_same([p.detach()], [torch.full((4, 3), 5.0, dtype=torch.bfloat16)])


def test_written_inside_outer_weights(backend, dtype):
    params, optimizer = build(dtype=dtype, backend=backend, lr=1e-4, weight_decay=0)
    run(optimizer, params, 2)
    walk = params[1].detach().clone()
    with optimizer.outer_weights(), torch.no_grad():
        params[0].fill_(5)
    assert_same([params[1].detach()], [walk])
    run(optimizer, params, 2, 9)
    assert_near(params[0], torch.tensor(5.0).double())


@pytest.mark.parametrize("taken", [0, 2])
def test_replaced_storage_is_the_one_that_is_updated(backend, dtype, taken):
    params, optimizer = build(dtype=dtype, backend=backend)
    run(optimizer, params, taken)
    replacement = torch.full((5, 3), 2.0, dtype=dtype)
    params[0].data = replacement
    run(optimizer, params, 4 - taken)
    assert params[0].data_ptr() == replacement.data_ptr()
    assert not torch.equal(replacement, torch.full((5, 3), 2.0, dtype=dtype))
    assert (replacement - 2).abs().max() < 0.1


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)]
)
def test_converted_model_is_noticed(backend, convert):
    model = nn.Conv2d(3, 4, 2)
    params = list(model.parameters())
    optimizer = NexusAdamW(params, backend=backend)
    run(optimizer, params, 1)
    convert(model)
    before = values(params)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* build the optimizer after it"):
        optimizer.step()
    assert_same(values(params), before)
    assert optimizer.cycle_position == 1


@pytest.mark.parametrize("looks_first", ["step", "state_dict", "load_state_dict"])
@pytest.mark.parametrize(
    "convert", [nn.Module.bfloat16, nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)]
)
def test_a_model_converted_before_the_first_step_is_followed(backend, convert, looks_first):
    """As torch.optim's state, which is made in the first step, would."""
    results = []
    for convert_first in (True, False):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2)
        params = list(model.parameters())
        if convert_first:
            convert(model)
        optimizer = NexusAdamW([{"params": p} for p in params], lr=1e-2, inner_lr=0.05, backend=backend)
        if not convert_first:
            optimizer.state["host"]["note"] = 1
            convert(model)
        if looks_first == "state_dict":
            optimizer.state_dict()
        elif looks_first == "load_state_dict":
            optimizer.load_state_dict(NexusAdamW([{"params": p} for p in make_params((4, 3, 2, 2), (4,))]).state_dict())
        run(optimizer, params, 6)
        entries = [optimizer.state[p] for p in params]
        assert all(
            ("remainder" in entry) == (p.dtype == torch.bfloat16) for p, entry in zip(params, entries, strict=True)
        )
        results.append([*values(params), *(entry["exp_avg"] for entry in entries)])
    assert_same(*results)


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_moments_that_somebody_filled_in_stay(backend, how):
    """A state that is not fresh is none to begin anew with."""
    (p,), optimizer = build((3,), backend=backend, inner_steps=1)
    if how == "in place":
        optimizer.state[p]["exp_avg"].fill_(7.0)
    else:
        optimizer.state[p]["exp_avg"] = torch.full((3,), 7.0)
    p.data = p.data.bfloat16()
    set_grads([p], 0)
    with pytest.raises(RuntimeError, match="build the optimizer after it"):
        optimizer.step()
    p.data = p.data.float()
    assert (optimizer.state_dict()["state"][0]["exp_avg"] == 7).all()


@pytest.mark.parametrize("converted_first", [False, True])
def test_displacements_are_there_after_a_conversion_too(backend, converted_first):
    model = nn.Linear(3, 2)
    optimizer = NexusAdamW(model.parameters(), backend=backend)
    if converted_first:
        model.bfloat16()
    optimizer.materialize_displacements()
    model.bfloat16()
    assert all("displacement" in entry for entry in optimizer.state_dict()["state"].values())


def test_a_conversion_that_cannot_be_followed_changes_nothing(backend):
    (a, b), optimizer = build((3,), (4,), backend=backend)
    a.data = a.data.to(torch.float8_e5m2)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is torch.float8_e5m2"):
        optimizer.step()
    a.data = a.data.float()
    run(optimizer, [a, b], 4)
    assert optimizer.state[a]["step"] == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_autograd_notices_our_writes(backend, steps):
    """A graph that needs the old weights must raise, not compute with new ones."""
    (p,), optimizer = build((3,), backend=backend)
    loss = (p * p).sum()
    run(optimizer, [p], steps)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def model_with_everything(dtype=torch.float32):
    """Tied weights, a view of a shared buffer, a frozen, a zero-size, a transposed and a scalar parameter."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding = nn.Embedding(11, 6, dtype=dtype)
    model.head = nn.Linear(6, 11, bias=False, dtype=dtype)
    model.head.weight = model.embedding.weight
    memory = torch.randn(2, 6, dtype=dtype)
    model.first, model.second = nn.Parameter(memory[0]), nn.Parameter(memory[1])
    model.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
    model.empty = nn.Parameter(torch.empty(0, 4, dtype=dtype))
    model.transposed = nn.Parameter(torch.randn(6, 4, dtype=dtype).t())
    model.scalar = nn.Parameter(torch.tensor(1.5, dtype=dtype))
    return model, memory


class TestFlatMemory:
    def test_identity_and_values_stay(self, backend, dtype):
        model, memory = model_with_everything(dtype)
        params, before = list(model.parameters()), values(model.parameters())
        optimizer = NexusAdamW(model.parameters(), backend=backend)
        assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
        assert model.head.weight is model.embedding.weight
        assert_same(values(params), before)
        run(optimizer, [p for p in params if p.requires_grad], 5)
        assert_same([memory[0], memory[1]], [model.first.detach(), model.second.detach()])  # still views of it
        assert optimizer.state[model.empty]["step"] == 1

    def test_weights_share_no_storage_but_one_buffer(self, backend):
        params, optimizer = build((100,), (200,), backend=backend)
        gap = params[1].data_ptr() - params[0].data_ptr()
        assert gap == 448  # 100 float32 and the padding to a cache line
        for p in params:
            for t in (p, optimizer.state[p]["exp_avg"]):
                assert t.untyped_storage().nbytes() == t.numel() * 4
                assert t.data_ptr() % 64 == 0

    def test_left_alone(self, backend):
        """Memory that somebody else would miss is not left behind."""
        aliased, plain = make_params((4,), (4,))
        alias = aliased.detach()
        numpy = torch.zeros(4).numpy()
        foreign = nn.Parameter(torch.from_numpy(numpy))
        optimizer = NexusAdamW([aliased, plain, foreign], backend=backend)
        run(optimizer, [aliased, plain, foreign], 4)
        assert_same([alias], [aliased.detach()])
        assert_same([torch.from_numpy(numpy)], [foreign.detach()])
        pointer = plain.data_ptr()
        run(optimizer, [plain], 4)
        assert plain.data_ptr() == pointer

    def test_files_hold_what_they_should(self, backend, tmp_path):
        """A sub-module's file has its own bytes, not the flat buffer's; safetensors and deepcopy are content."""
        model = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 1000))
        optimizer = NexusAdamW(model.parameters(), backend=backend)
        run(optimizer, list(model.parameters()), 4)
        file = io.BytesIO()
        torch.save(model[0].state_dict(), file)
        assert file.tell() < 1010 * 4 + 4000
        file = io.BytesIO()
        torch.save(optimizer.state[model[0].weight]["exp_avg"], file)
        assert file.tell() < 1000 * 4 + 2000
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        safetensors.torch.save_model(model, tmp_path / "again.safetensors")
        loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert_same([loaded[key] for key in model.state_dict()], model.state_dict().values())
        assert_same(values(copy.deepcopy(model).parameters()), values(model.parameters()))

    def test_buckets_are_bounded(self, backend, monkeypatch):
        """At most BUCKET_BYTES each, or one parameter that is larger; every parameter in one piece."""
        monkeypatch.setattr("nexus_fused.flat.BUCKET_BYTES", 4096)
        params, optimizer = build((300,), (5000,), (600,), (500,), (1,), backend=backend)
        table = inside.only_table(optimizer)
        assert [b.numel * 4 for b in table.buckets] == [1216, 20032, 2432, 2112]
        reference, other = build((300,), (5000,), (600,), (500,), (1,), backend=backend, flatten=False)
        run(optimizer, params, 9)
        run(other, reference, 9)
        assert_same(values(params), values(reference))

    def test_offsets_beyond_int32(self):
        """The arithmetic of addresses, for parameters of more than 2^31 elements that nobody allocates."""
        from nexus_fused.flat import bucketed, make_segment

        large = [torch.empty(1, dtype=torch.float32).expand(2**31 + 5), torch.empty(1).expand(2**33)]
        segments = [make_segment(nn.Parameter(torch.empty(0)), group=0, index=i) for i in range(3)]
        for segment, tensor in zip(segments, [*large, torch.empty(7)], strict=True):
            segment.numel = tensor.numel()
        buckets = list(bucketed(segments, 4))
        assert [numel for _, numel in buckets] == [2**31 + 16, 2**33, 16]
        assert [s.start for s in segments] == [0, 0, 0]
