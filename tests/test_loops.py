"""A script that accumulates, with another optimizer in one statement."""

from __future__ import annotations

import inspect
import types
import warnings

import accumulating_loop
import pytest
import torch
import torch.distributed as dist
from conftest import assert_same, values
from processes import on_ranks

ADAMW = "torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2))"
OPEN = "nexus_fused.NexusAdamW(groups, lr=learning_rate, betas=(beta1, beta2), inner_lr=0.03, inner_steps=None{})"


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def load(constructor=ADAMW, **replaced):
    """The script with this constructor in AdamW's place and, to compare with, other lines `replaced` by name."""
    source = inspect.getsource(accumulating_loop)
    changes = {ADAMW: constructor, **replaced}
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = types.ModuleType("loop")
    exec(
        compile("import nexus_fused\n" + source.replace("from __future__ import annotations", ""), "loop", "exec"),
        module.__dict__,
    )
    return module


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_constructor_is_all_that_changes(dtype):
    """It learns as with AdamW, and as the script that was written for a number of inner steps."""
    _, _, losses, evaluations = load().main(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, ours, evaluated = load(OPEN.format(", displacement_dtype=torch.float32")).main(dtype=dtype)
    assert evaluations[-1] < 0.75 * evaluations[0]
    assert evaluated[-1] < 0.75 * evaluated[0]
    assert len(ours) == len(losses) == 96
    assert optimizer.at_boundary
    assert all(optimizer.state[p]["step"] == 24 for p in model.parameters())
    migrated = {
        "            scaler.scale(loss).backward()": """            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)""",
        """        if grad_clip != 0.0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)""": "",
    }
    constructor = OPEN.format(", displacement_dtype=torch.float32").replace("None", "4", 1)
    _, _, theirs, _ = load(constructor, **migrated).main(dtype=dtype)
    torch.testing.assert_close(
        torch.tensor(ours), torch.tensor(theirs), rtol=2e-3 if dtype == "float16" else 1e-4, atol=0
    )


def test_resumed(tmp_path):
    script = load(OPEN.format(""))
    model, _, losses, _ = script.main(str(tmp_path / "a"))
    script.main(str(tmp_path / "b"), stop=8)
    again, _, rest, _ = script.main(str(tmp_path / "b"), resume=True)
    assert rest == losses[32:]
    assert_same(values(again.parameters()), values(model.parameters()))


def _on_this_rank():
    script = load(OPEN.format(", displacement_group=torch.distributed.group.WORLD"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _, _, evaluations = script.main()
    said = [str(w.message) for w in caught if "displacement_group" in str(w.message)]
    with pytest.raises(RuntimeError, match="did not reduce the gradients of this backward pass"):
        load(OPEN.format("")).main()
    return values(model.parameters()), evaluations, len(said)


def test_two_ranks():
    """Under DDP, which reduces the last micro-step only: each rank walks on its own."""
    assert dist.is_available()
    (weights, evaluations, said), (others, _, _) = on_ranks(2, _on_this_rank)
    assert_same(weights, others)
    assert evaluations[-1] < 0.75 * evaluations[0]
    assert said == 1
