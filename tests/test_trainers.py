"""The scripts of docs/trainers under the real libraries, and the warnings of frameworks.py.

They need the extra `trainers`; without it the tests of the missing library are skipped (.ci/run refuses that).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import OF_LIBRARIES, assert_same, assert_theta, build, run, values
from processes import on_ranks
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nexus_fused import NexusAdamW, frameworks

SCRIPTS = Path(__file__).parent.parent / "docs" / "trainers"
PACKAGES = {
    "huggingface": ("transformers", "accelerate"),
    "accelerate_run": ("accelerate",),
    "lightning_fabric": ("lightning",),
    "lightning_trainer": ("lightning",),
}
K = 4
BARE = {  # a Trainer of Lightning that leaves nothing behind
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

pytestmark = OF_LIBRARIES


def load(name):
    """The script as a module."""
    for package in PACKAGES.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[trainers]'")
    spec = importlib.util.spec_from_file_location(f"trainers_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def thetas():
    """Weights at every boundary of the optimizers stepped meanwhile, oldest first."""
    seen = []

    def look(optimizer, args, kwargs):
        if optimizer.at_boundary:
            seen.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_post_hook(look)
    yield seen
    handle.remove()


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_same_end(unbroken, resumed):
    """Weights and optimizer, bit for bit: (model, optimizer) or their state_dicts."""
    (model, optimizer), (other, other_optimizer) = (
        [part if isinstance(part, dict) else part.state_dict() for part in end] for end in (unbroken, resumed)
    )
    torch.testing.assert_close(model, other, rtol=0, atol=0)
    torch.testing.assert_close(optimizer["state"], other_optimizer["state"], rtol=0, atol=0)
    assert str(optimizer["param_groups"]) == str(other_optimizer["param_groups"])


def set_weights(model, weights):
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(value)


def regression_loss(model, weights, x, y):
    set_weights(model, weights)
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y))


def check_scripted_run(script, ends, loss, thetas, x, y):
    """Of a script that returns (model, optimizer, loss of θ): the resumed run ends the same, θ was seen, it learned."""
    (model, optimizer), resumed = ends
    assert_same_end((model, optimizer), resumed)
    cycles = script.MICRO_BATCHES // K
    assert all(state["step"] == cycles for state in optimizer.state.values())
    assert optimizer.metrics()["skipped_inner_steps"] == 0
    seen = thetas[:cycles]
    assert loss == regression_loss(model, seen[script.SAVE_AFTER // K - 1], x, y)
    assert regression_loss(model, seen[-1], x, y) < regression_loss(model, seen[0], x, y)


def fabric_options(precision):
    if precision != "16-mixed":
        return {"precision": precision}
    from lightning.fabric.plugins import MixedPrecision  # by its name alone Fabric would take bf16 on a CPU

    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_fabric(tmp_path, thetas, precision):
    script = load("lightning_fabric")
    model, optimizer, loss = script.train(str(tmp_path), **fabric_options(precision))
    resumed, resumed_optimizer, _ = script.train(str(tmp_path), resume=True, **fabric_options(precision))
    ends = (model, optimizer), (resumed, resumed_optimizer)
    check_scripted_run(script, ends, loss, thetas, *script.micro_batch(script.MICRO_BATCHES))


def trainer_options(precision):
    if precision != "16-mixed":
        return {"precision": precision}
    from lightning.pytorch.plugins import MixedPrecision

    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_trainer(tmp_path, thetas, precision):
    """Epochs of 6 micro-batches and cycles of 4: the first and the third epoch end in mid-cycle."""
    script = load("lightning_trainer")
    validated = []

    class Record(script.lightning.Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            if not trainer.sanity_checking:
                validated.append(values(module.parameters()))

    callbacks = [script.ShowOuterWeights(), Record(), script.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
    trainer = script.train(str(tmp_path), callbacks=callbacks, **trainer_options(precision))
    optimizer = trainer.optimizers[0]
    assert all(state["step"] == 6 for state in optimizer.state.values())
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0)  # the schedule counted micro-batches
    for epoch, theta in enumerate([thetas[0], thetas[2], thetas[3], thetas[5]]):
        for seen in validated[2 * epoch : 2 * epoch + 2]:  # two batches of validation
            assert_theta(seen, theta, longest=0.1)

    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["cycle_position"] == 2
    again = script.train(str(tmp_path), resume_from=str(tmp_path / "epoch=2.ckpt"), **trainer_options(precision))
    assert_same_end((trainer.model, optimizer), (again.model, again.optimizers[0]))


def test_lightning_trainer_ends_in_mid_cycle(tmp_path, thetas):
    """The callback applies the partial cycle; an exception in validation puts the walk back."""
    script = load("lightning_trainer")
    trainer = script.train(str(tmp_path), max_epochs=1)
    assert trainer.optimizers[0].at_boundary
    assert all(state["step"] == 2 for state in trainer.optimizers[0].state.values())

    class Fail(script.lightning.Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            if not trainer.sanity_checking:
                raise ZeroDivisionError

    failing = script.lightning.Trainer(callbacks=[script.ShowOuterWeights(), Fail()], **BARE)
    model = script.Regression()
    with pytest.raises(ZeroDivisionError):
        failing.fit(model, script.make_loader(6, seed=1), script.make_loader(1, seed=2))
    optimizer = failing.optimizers[0]
    assert optimizer.cycle_position == 2
    walk = values(model.parameters())
    optimizer.outer_step()  # raises inside outer_weights()
    assert not all(torch.equal(p, w) for p, w in zip(model.parameters(), walk, strict=True))


@pytest.mark.parametrize("average_first", [False, True], ids=["ShowOuterWeights first", "average first"])
def test_lightning_averages_theta(tmp_path, thetas, average_first):
    """As docs/trainers.md has it. Listed after the average, our callback takes its last outer step from there."""
    script = load("lightning_trainer")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class AverageAtBoundaries(callbacks.EMAWeightAveraging):
        def on_train_start(self, trainer, module):
            self.optimizer = trainer.optimizers[0]

        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None and self.optimizer.at_boundary

    both = [script.ShowOuterWeights(), AverageAtBoundaries(decay=0.5)]
    trainer = script.train(str(tmp_path), max_epochs=3, callbacks=both[::-1] if average_first else both)
    assert len(thetas) == 4  # and two micro-batches of another cycle
    average = thetas[0]
    for theta in thetas[1:]:
        average = [(a + b) / 2 for a, b in zip(average, theta, strict=True)]
    distance = max(float((p - a).abs().max()) for p, a in zip(trainer.model.parameters(), average, strict=True))
    assert distance > 1e-3 if average_first else distance < 1e-6


def test_lightning_averages_at_position_1(tmp_path):
    """By its own count of steps, whatever multiple of K it is given."""
    script = load("lightning_trainer")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    positions = []

    class Record(callbacks.EMAWeightAveraging):
        def on_train_start(self, trainer, module):
            self.optimizer = trainer.optimizers[0]

        def should_update(self, step_idx=None, epoch_idx=None):
            updates = super().should_update(step_idx, epoch_idx)
            positions.extend([self.optimizer.cycle_position] if updates else [])
            return updates

    script.train(str(tmp_path), max_epochs=3, callbacks=[Record(update_every_n_steps=K)])
    assert positions == [1] * 5


def test_lightning_refuses_clipping_with_a_scaler(tmp_path):
    """As the scripts say."""
    script = load("lightning_trainer")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        script.train(str(tmp_path), gradient_clip_val=1.0, **trainer_options("16-mixed"))
    fabric = load("lightning_fabric").Fabric(accelerator="cpu", **fabric_options("16-mixed"))
    model = nn.Linear(3, 2)
    model, optimizer = fabric.setup(model, NexusAdamW(model.parameters()))
    with pytest.raises(NotImplementedError, match="Gradient clipping"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)


class TestLightningWrappers:
    """Objects that imitate the optimizer's class but hold it: what our methods set must not stay in them."""

    @pytest.fixture(params=["fabric", "trainer"])
    def wrap(self, request):
        pytest.importorskip("lightning", reason="lightning is not installed")
        if request.param == "fabric":
            from lightning.fabric import Fabric

            return Fabric(accelerator="cpu").setup_optimizers
        from lightning.pytorch.core.optimizer import LightningOptimizer

        return LightningOptimizer

    def test_outer_step(self, wrap):
        (params, optimizer), (others, plain) = build(), build()
        wrapper = wrap(optimizer)
        run(optimizer, params, 2)
        run(plain, others, 2)
        wrapper.outer_step()
        plain.outer_step()
        assert wrapper.cycle_position == optimizer.cycle_position == 0
        assert str(wrapper.metrics()) == str(plain.metrics())
        assert_same(values(params), values(others))

    def test_outer_weights(self, wrap):
        params, optimizer = build()
        wrapper, theta = wrap(optimizer), values(params)
        run(optimizer, params, 2)
        walk = values(params)
        with wrapper.outer_weights():
            assert_same(values(params), theta)
            assert wrapper.state_dict()["param_groups"][0]["cycle_position"] == 0
            assert "displacement" not in wrapper.state_dict()["state"][0]
            with pytest.raises(RuntimeError, match=r"inside outer_weights\(\)"):
                optimizer.step()
        assert_same(values(params), walk)
        assert optimizer.cycle_position == 2

    def test_eval_and_train(self, wrap):
        params, optimizer = build()
        wrapper, theta = wrap(optimizer), values(params)
        run(optimizer, params, 2)
        walk = values(params)
        wrapper.eval()
        assert_same(values(params), theta)
        with pytest.raises(RuntimeError, match=r"after eval\(\)"):
            optimizer.step()
        wrapper.train()
        assert_same(values(params), walk)
        run(optimizer, params, 2)

    def test_loading(self, wrap):
        (params, optimizer), (others, plain) = build(), build()
        run(plain, others, 2)
        wrapper = wrap(optimizer)
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                p.copy_(q)
        wrapper.materialize_displacements()
        assert "displacement" in optimizer.state[params[0]]
        wrapper.load_state_dict(plain.state_dict())
        assert optimizer.cycle_position == 2
        run(optimizer, params, 3, first_seed=2)
        run(plain, others, 3, first_seed=2)
        assert_same(values(params), values(others))

    def test_add_param_group(self, wrap):
        params, optimizer = build()
        late = nn.Parameter(torch.ones(3))
        wrap(optimizer).add_param_group({"params": [late]})
        run(optimizer, [*params, late], K)
        assert optimizer.state[late]["step"] == 1


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(tmp_path, thetas, accelerate_reset, mixed_precision):
    script = load("accelerate_run")
    model, optimizer, loss = script.train(str(tmp_path), mixed_precision=mixed_precision)
    resumed, resumed_optimizer, _ = script.train(str(tmp_path), resume=True, mixed_precision=mixed_precision)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))  # draws what the script draws before its data
    x = torch.randn(8 * script.MICRO_BATCHES, 8)
    ends = (model, optimizer), (resumed, resumed_optimizer)
    check_scripted_run(script, ends, loss, thetas, x, x.sum(1, keepdim=True).sin())


def test_accelerate_evaluates_in_mid_cycle(accelerate_reset):
    """Through its wrapper; training goes on bit for bit as without evaluations, and prepare() comes after one."""
    load("accelerate_run")
    from accelerate import Accelerator

    (params, plain), (others, nexus) = build(), build()
    nexus.eval()
    optimizer = Accelerator(cpu=True).prepare(nexus)
    for seed in range(2 * K + 1):
        run(plain, params, 1, seed)
        run(optimizer, others, 1, seed)
        optimizer.eval()
        with plain.outer_weights():
            assert_same(values(params), values(others))
        optimizer.train()
        assert_same(values(params), values(others))
    torch.testing.assert_close(plain.state_dict(), nexus.state_dict(), rtol=0, atol=0)


def test_accelerate_with_a_scaler(accelerate_reset):
    """An overflow skips the inner step; Accelerate does not know, as the script says."""
    load("accelerate_run")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # whose own fp16 needs a GPU
    model = nn.Linear(6, 4)
    nexus = NexusAdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(nexus, scaler=scaler)
    for i in range(K + 1):
        x = torch.full((3, 6), float("inf") if i == 2 else 1.0)
        scaler.scale(model(x).square().mean()).backward()
        optimizer.step()
        assert not optimizer.step_was_skipped
        optimizer.zero_grad()
    assert nexus.metrics()["skipped_inner_steps"] == 1
    assert scaler.get_scale() == 2.0**9
    assert nexus.cycle_position == 1


@pytest.mark.parametrize("by_class", [False, True], ids=["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_huggingface(tmp_path, thetas, accelerate_reset, by_class, bf16):
    script = load("huggingface")
    from transformers import TrainerCallback

    evaluated = []

    class Record(TrainerCallback):
        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            evaluated.append((state.global_step, values(model.parameters())))

    options = {"max_steps": 10, "by_class": by_class, "bf16": bf16, "logging_steps": 1}
    trainer = script.make_trainer(
        str(tmp_path), **options, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=6
    )
    trainer.add_callback(Record())
    order = list(trainer.model.parameters())
    with pytest.warns(UserWarning, match="leaves out 2 micro-batch"):  # the Trainer saves at the end
        trainer.train()
    nexus = trainer.optimizer.optimizer
    assert type(nexus) is NexusAdamW
    assert all(state["step"] == 2 for state in nexus.state.values())
    assert nexus.cycle_position == 2
    assert {group["weight_decay"] for group in nexus.param_groups} == ({0.1, 0.0} if by_class else {0.1})

    # θ in the order of the parameter groups, evaluations in the model's.
    position = {p: i for i, p in enumerate(p for group in nexus.param_groups for p in group["params"])}
    expected = {5: thetas[0], 10: thetas[1]}
    assert {step for step, _ in evaluated} == {5, 10}
    for step, seen in evaluated:
        assert_theta(seen, [expected[step][position[p]] for p in order], longest=0.1)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0]

    again = script.make_trainer(str(tmp_path), **options)
    with torch.no_grad():
        next(again.model.parameters()).zero_()  # what is loaded counts
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-6")
    trainer.optimizer.train()  # the last evaluation left θ
    assert_same_end((trainer.model, nexus), (again.model, again.optimizer.optimizer))


def test_huggingface_saves_after_an_evaluation(tmp_path, accelerate_reset):
    """After micro-batches 6 and 10 of cycles of 4: θ and the start of the cycle, which is said once. Evaluations before
    training leave an optimizer that Accelerate can prepare."""
    script = load("huggingface")

    def without_dropout(trainer):  # an evaluation draws from the generator of all
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return trainer

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 6}
    trainer = without_dropout(script.make_trainer(str(tmp_path), max_steps=10, **options))
    before = trainer.evaluate()["eval_loss"]
    with pytest.warns(UserWarning, match="leaves out 2 micro-batch") as seen:
        trainer.train()
    assert len([w for w in seen if "NexusAdamW" in str(w.message)]) == 1
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["cycle_position"] == 0
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    start, first, first_again, second, second_again = losses  # evaluations after 2, 4, 6, 8 and 10 micro-batches
    assert [start, first_again, second_again] == pytest.approx([before, first, second], rel=1e-6)
    assert second < first < before
    assert trainer.evaluate()["eval_loss"] == losses[-1]
    trainer.optimizer.train()
    plain = without_dropout(script.make_trainer(str(tmp_path), max_steps=10))
    plain.evaluate()
    plain.train()
    assert_same_end((plain.model, plain.optimizer.optimizer), (trainer.model, trainer.optimizer.optimizer))
    again = script.make_trainer(str(tmp_path), max_steps=10)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-6")
    assert again.optimizer.optimizer.at_boundary  # after four more of them


@pytest.mark.parametrize("starts_at_a_boundary", [False, True])
def test_huggingface_tries_another_batch_size(tmp_path, accelerate_reset, starts_at_a_boundary):
    """After a failure in micro-batch 3 the Trainer begins anew, with the optimizer as it is."""
    script = load("huggingface")
    from transformers import TrainerCallback

    class StartAtBoundary(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 0:
                optimizer.optimizer.outer_step()

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            positions.append((state.global_step, optimizer.optimizer.cycle_position))

    positions = []
    trainer = script.make_trainer(str(tmp_path), max_steps=4, auto_find_batch_size=True)
    trainer.add_callback(Record())
    if starts_at_a_boundary:
        trainer.add_callback(StartAtBoundary())
    compute_loss = trainer.compute_loss

    def fail_once(*args, **kwargs):
        if len(positions) == 2:
            positions.append("failed")
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = fail_once
    trainer.train()
    again = [(1, 1), (2, 2), (3, 3), (4, 0)] if starts_at_a_boundary else [(1, 3), (2, 0), (3, 1), (4, 2)]
    assert positions == [(1, 1), (2, 2), "failed", *again]


def _average_weights(kind, count):
    """Weights and θ after each of 12 micro-batches of this rank's own, whose ranks average their weights meanwhile.

    count: torch's averager begins after so many steps; Accelerate's averages after every so many.
    """
    torch.manual_seed(0)
    module = model = nn.Linear(6, 4)
    optimizer = nexus = NexusAdamW(module.parameters(), lr=1e-2, inner_lr=0.05, inner_steps=K)
    end_step, average = (lambda: None), contextlib.nullcontext()
    if kind == "torch":
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
        from torch.distributed.optim import PostLocalSGDOptimizer

        optimizer = PostLocalSGDOptimizer(nexus, PeriodicModelAverager(period=K, warmup_steps=count))
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        from accelerate import Accelerator
        from accelerate.local_sgd import LocalSGD

        os.environ["MASTER_ADDR"] = "127.0.0.1"  # it asks, though the group is there
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(module, nexus)
        average = LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=count)
        end_step = average.step
    seen = []
    with average:
        for i in range(3 * K):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * dist.get_rank() + i))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            end_step()
            weights = values(module.parameters())
            with nexus.outer_weights():
                seen.append((weights, values(module.parameters())))
    return seen


@pytest.mark.parametrize(
    ("kind", "count", "right"), [("torch", K - 1, True), ("torch", 0, False), ("accelerate", K, True)]
)
def test_averages_of_local_weights(kind, count, right):
    """At a boundary they are averages of θ, which is then one on all ranks; in mid-cycle each rank has a D of its own,
    and never the same θ."""
    if kind == "accelerate":
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    ranks = on_ranks(2, _average_weights, kind, count)
    averaged = K - 1 if right else 0  # the micro-batch of each cycle after which weights are averaged
    for i, micro_batch in enumerate(zip(*ranks, strict=True)):
        (weights, theta), (others, other_theta) = micro_batch
        assert all(map(torch.equal, weights, others)) == (i % K == averaged)
        distance = max(float((a - b).abs().max()) for a, b in zip(theta, other_theta, strict=True))
        assert distance < 1e-6 if right else distance > 1e-3
    assert not torch.equal(ranks[0][-1][0][0], ranks[0][K][0][0])


@pytest.mark.parametrize("save_after", [10, 8], ids=["mid-cycle", "boundary"])
def test_torchtitan_style(tmp_path, thetas, save_after):
    script = load("torchtitan_style")
    model, optimizer, loss = script.train(str(tmp_path), save_after=save_after)
    resumed, resumed_optimizer, _ = script.train(str(tmp_path), resume=True, save_after=save_after)
    ends = (model, optimizer), (resumed, resumed_optimizer)
    check_scripted_run(script, ends, loss, thetas, *script.micro_batch(script.MICRO_BATCHES))


def test_torchtitan_style_errors(tmp_path, monkeypatch):
    script = load("torchtitan_style")
    parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="pipeline"):
        script.build_optimizers(parts)
    script.train(str(tmp_path))
    monkeypatch.setattr(NexusAdamW, "materialize_displacements", lambda self: None)
    with pytest.raises(Exception, match=r"materialize_displacements\(\)"):  # dcp wraps it
        script.train(str(tmp_path), resume=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_torchrun_alone(tmp_path, thetas, process_group, precision):
    script = load("torchrun")
    path = tmp_path / "checkpoint.pt"
    model, optimizer, loss = script.train(path, precision=precision)
    resumed, resumed_optimizer, _ = script.train(path, resume=True, precision=precision)
    ends = (model, optimizer), (resumed, resumed_optimizer)
    check_scripted_run(script, ends, loss, thetas, *script.micro_batch(script.MICRO_BATCHES, 0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchrun", ["--precision", "fp16"]),
        ("torchrun", ["--accumulate"]),
        ("accelerate_run", []),
        ("accelerate_run", ["--accumulate"]),
    ],
)
def test_two_processes(tmp_path, name, options):
    """Both end with the same bits, and so do the runs resumed in mid-cycle."""
    if name in PACKAGES:
        load(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPTS / f"{name}.py"), "--out", str(tmp_path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ends = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in range(2):
        assert_same_end(ends[0]["unbroken"], ends[rank]["unbroken"])
        assert_same_end(ends[0]["unbroken"], ends[rank]["resumed"])
    _, optimizer = ends[0]["unbroken"]
    assert all(state["step"] == 6 and state["exp_avg"].any() for state in optimizer["state"].values())
    if name == "accelerate_run":  # the scheduler took a step per process and micro-batch
        assert optimizer["param_groups"][0]["lr"] == pytest.approx(0)


def _trained_by_the_trainer():
    """On this rank: weights, what was warned of, with gradients reduced in the last pass, never, and in each."""
    script = load("huggingface")
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # Accelerate asks, though the group is there

    class LocalWalks(script.Trainer):  # as docs/trainers.md has it
        def training_step(self, model, *args, **kwargs):
            with self.accelerator.no_sync(model):
                return super().training_step(model, *args, **kwargs)

    found = []
    each = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    for kind, group, more in (
        (script.Trainer, dist.group.WORLD, {}),
        (LocalWalks, dist.group.WORLD, {}),
        (script.Trainer, None, each),
    ):
        options = {"gradient_accumulation_steps": K, "inner_steps": None, "max_steps": 4, "by_class": True, **more}
        script.HYPERPARAMETERS["displacement_group"] = group
        script.Trainer = kind
        trainer = script.make_trainer(tempfile.mkdtemp(), **options)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.train()
        said = [str(w.message) for w in seen if "displacement_group" in str(w.message)]
        found.append((values(trainer.model.parameters()), len(said), trainer.optimizer.optimizer.at_boundary))
    return found


class TestInnerStepsNone:
    """Their accumulation stays on: each micro-batch that they accumulate is an inner step."""

    @pytest.mark.parametrize("by_class", [False, True])
    def test_huggingface(self, tmp_path, accelerate_reset, by_class, monkeypatch):
        script = load("huggingface")
        monkeypatch.setitem(script.HYPERPARAMETERS, "displacement_dtype", torch.float32)
        monkeypatch.setattr(script, "get_scheduler", lambda name, *args, **kwargs: get_scheduler("constant", args[0]))
        from transformers import get_scheduler

        ends = []
        for inner_steps in (None, K):
            accumulation = (
                {"gradient_accumulation_steps": K, "max_steps": 6} if inner_steps is None else {"max_steps": 24}
            )
            options = {"by_class": by_class, "inner_steps": inner_steps, "save_strategy": "steps", "save_steps": 4}
            schedule = {"lr_scheduler_type": "constant", "warmup_steps": 0} if by_class else {}
            folder = str(tmp_path / str(inner_steps))
            trainer = make_trainer_with(script, folder, **accumulation, **options, **schedule)
            trainer.train()
            assert all(state["step"] == 6 for state in trainer.optimizer.state.values())
            ends.append(values(trainer.model.parameters()))
            if inner_steps is None:
                again = make_trainer_with(script, folder, **accumulation, **options, **schedule)
                again.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
                assert_same_end((trainer.model, trainer.optimizer), (again.model, again.optimizer))
        torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)

    def test_huggingface_on_two_processes(self):
        """With a displacement_group, one warning where the last pass is reduced all the same; or with all reduced."""
        load("huggingface")
        ranks = on_ranks(2, _trained_by_the_trainer)
        for (weights, said, ended), (others, *_), expected in zip(*ranks, (1, 0, 0), strict=True):
            assert_same(weights, others)
            assert said == expected
            assert ended

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_accelerate(self, tmp_path, accelerate_reset, precision):
        script, ends = load("accelerate_run"), []
        for resume in (False, True):
            options = {"accumulation": K, "inner_steps": None, "mixed_precision": precision}
            ends.append(script.train(str(tmp_path), resume=resume, **options)[:2])
        assert_same_end(*ends)
        assert all(state["step"] == 6 for state in ends[0][1].state.values())
        assert ends[0][1].param_groups[0]["lr"] == pytest.approx(0)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
    def test_fabric(self, tmp_path, precision):
        """Saved in mid-cycle."""
        script, ends = load("lightning_fabric"), []
        for resume in (False, True):
            found = script.train(str(tmp_path), resume=resume, inner_steps=None, **fabric_options(precision))
            ends.append(found[:2])
        assert_same_end(*ends)
        assert all(state["step"] == 6 for state in ends[0][1].state.values())

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
    def test_lightning(self, tmp_path, precision):
        """Epochs of 6 micro-batches: Lightning steps after 4, and after the last 2, a shorter cycle."""
        script = load("lightning_trainer")
        options = {"inner_steps": None, "accumulate_grad_batches": K, **trainer_options(precision)}
        trainer = script.train(str(tmp_path), **options)
        optimizer = trainer.optimizers[0]
        assert all(state["step"] == 8 for state in optimizer.state.values())
        assert len(optimizer.metrics()["grad_norms"]) == 2
        again = script.train(str(tmp_path), resume_from=str(tmp_path / "epoch=2.ckpt"), **options)
        assert_same_end((trainer.model, optimizer), (again.model, again.optimizers[0]))

    @pytest.mark.parametrize("save_after", [10, 8], ids=["mid-cycle", "boundary"])
    def test_torchtitan_style(self, tmp_path, save_after):
        script, ends = load("torchtitan_style"), []
        for resume in (False, True):
            ends.append(script.train(str(tmp_path), save_after=save_after, resume=resume, inner_steps=None)[:2])
        assert_same_end(*ends)
        assert all(state["step"] == 6 for state in ends[0][1].state.values())

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_torchrun_alone(self, tmp_path, process_group, precision):
        script, ends = load("torchrun"), []
        for resume in (False, True):
            ends.append(script.train(tmp_path / "saved.pt", resume=resume, precision=precision, accumulate=True)[:2])
        assert_same_end(*ends)

    def test_trl(self, tmp_path, accelerate_reset):
        """Its own trainers are the Trainer's kind."""
        trl, datasets = (pytest.importorskip(name, reason="trl is not installed") for name in ("trl", "datasets"))
        script = load("huggingface")
        rows = [row["input_ids"].tolist() for row in script.make_data(64, seed=1)]
        data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict({"input_ids": rows}), fingerprint="numbers")
        args = trl.SFTConfig(
            str(tmp_path), max_steps=3, gradient_accumulation_steps=K, report_to="none", use_cpu=True, bf16=False,
            disable_tqdm=True, save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            script.make_model(), args, train_dataset=data, processing_class=tokenizer(),
            optimizer_cls_and_kwargs=(NexusAdamW, {"lr": 3e-3, "inner_lr": 0.05, "inner_steps": None}),
        )  # fmt: skip
        trainer.train()
        assert all(state["step"] == 3 for state in trainer.optimizer.state.values())


def tokenizer():
    """One for numbers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(32)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="0")


def make_trainer_with(script, folder, *, lr_scheduler_type=None, warmup_steps=None, **options):
    """The script's Trainer, with another schedule where the Trainer builds it."""
    trainer = script.make_trainer(folder, **options)
    if lr_scheduler_type is not None:
        trainer.args.lr_scheduler_type, trainer.args.warmup_steps = lr_scheduler_type, warmup_steps
    return trainer


class TestAccumulationIsNoticed:
    def test_accelerate(self, tmp_path, accelerate_reset):
        script = load("accelerate_run")
        with pytest.warns(UserWarning, match=r"Accelerate.* 3 micro-batches.*gradient_accumulation_steps to 1") as seen:
            script.train(str(tmp_path), accumulation=3)
        assert len([w for w in seen if "NexusAdamW" in str(w.message)]) == 1

    def test_huggingface(self, tmp_path, accelerate_reset):
        script = load("huggingface")
        trainer = script.make_trainer(str(tmp_path), max_steps=4, gradient_accumulation_steps=2)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            # As Accelerate has it once it is imported, and schedulers wrap step().
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.optim.lr_scheduler")
            trainer.train()
        (warning,) = [str(w.message) for w in seen if "NexusAdamW" in str(w.message)]
        assert re.search(r"Trainer.* 2 micro-batches.*gradient_accumulation_steps to 1", warning)

    def test_lightning(self, tmp_path):
        script = load("lightning_trainer")
        with pytest.warns(UserWarning, match=r"Lightning.* 3 micro-batches.*accumulate_grad_batches to 1") as seen:
            script.train(str(tmp_path), accumulate_grad_batches=3)
        assert len([w for w in seen if "NexusAdamW" in str(w.message)]) == 1

    def test_as_an_error_it_comes_before_the_step(self):
        script = load("lightning_trainer")
        trainer, model = script.lightning.Trainer(accumulate_grad_batches=2, **BARE), script.Regression()
        before = values(model.parameters())
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="accumulate_grad_batches"):
            trainer.fit(model, script.make_loader(4, seed=1))
        assert_same(values(model.parameters()), before)
        assert trainer.optimizers[0].at_boundary

    @pytest.mark.parametrize(
        ("passes", "looks"), [((3, 3, 2, 3, 3, 3), K), ((1, 3, 1, 3, 3, 3), 2), ((1,) * 6, 1)], ids=str
    )
    def test_several_backward_passes_of_ones_own(self, passes, looks):
        """Noticed where all steps of the first cycle have several; the hook that counts goes then, or at the first that
        has one."""
        model = nn.Linear(3, 2)
        optimizer = NexusAdamW(model.parameters())
        hooked, said = [], []
        for count in passes:
            for _ in range(count):
                model(torch.ones(1, 3)).sum().backward()
                torch.autograd.grad(model(torch.ones(1, 3)).sum(), model.weight)  # adds to nothing
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                optimizer.step(lambda: None)
            said += [str(w.message) for w in seen]
            hooked.append(bool(model.weight._backward_hooks))
            optimizer.zero_grad()
        assert hooked == [True] * looks + [False] * (len(passes) - looks)
        accumulates = ["Your loop accumulates the gradients of 2 backward passes" in line for line in said]
        assert accumulates == [True] * (looks == K)

    def test_nothing_is_imported(self, monkeypatch):
        for name in ("accelerate.state", "lightning.pytorch", "pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        (p,) = params = [nn.Parameter(torch.ones(3))]
        p.grad = torch.ones(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frameworks.AccumulationWatch("NexusAdamW").look(params, lambda: None, K)
        assert "accelerate.state" not in sys.modules
