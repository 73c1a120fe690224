"""Nexus in front of other people's optimizers: torch.optim's, and those of libraries where they are installed."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from conftest import assert_same, exact, make_params, run, set_grads, values
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from nexus_fused import Nexus, NexusAdamW

WALK = {"inner_lr": 0.05, "displacement_dtype": torch.float32}

# Those that follow a walk: library, class, options. Muon takes matrices only, and AdamW what it leaves.

REFUSED = ("LBFGS", "SparseAdam")
TORCH = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", *REFUSED)
]
OWN_COPIES_FAIL = ("pytorch_optimizer", "torchao.optim", "bitsandbytes.optim", "flashoptim")
ON_A_CPU = {"quantize": False, "master_weight_bits": None, "fused": False}  # flashoptim's kernels need a GPU
KINDS = [
    *(("torch.optim", name, {}) for name in TORCH),
    ("torch.optim", "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    *(
        ("torch.optim", name, {"maximize": True})
        for name in TORCH
        if "maximize" in inspect.signature(getattr(torch.optim, name)).parameters
    ),
    ("pytorch_optimizer", "ADOPT", {}),
    ("pytorch_optimizer", "AdaBelief", {"weight_decay": 0.1}),
    ("pytorch_optimizer", "AdaFactor", {}),
    ("pytorch_optimizer", "Lamb", {}),
    ("pytorch_optimizer", "Lion", {"weight_decay": 0.1}),
    ("pytorch_optimizer", "Prodigy", {}),
    ("pytorch_optimizer", "SPAM", {}),  # its state has keys that are no parameters
    ("schedulefree", "AdamWScheduleFree", {"lr": 0.01, "weight_decay": 0.1}),
    ("schedulefree", "RAdamScheduleFree", {"lr": 0.01}),
    ("schedulefree", "SGDScheduleFree", {"lr": 0.1}),
    ("torchao.optim", "AdamW4bit", {}),
    ("torchao.optim", "AdamW8bit", {}),
    ("torchao.optim", "AdamWFp8", {}),
    ("bitsandbytes.optim", "AdamW", {}),
    ("bitsandbytes.optim", "AdamW8bit", {}),
    ("bitsandbytes.optim", "Lion8bit", {}),
    ("flashoptim", "FlashAdamW", {"lr": 0.01, **ON_A_CPU}),
    ("flashoptim", "FlashLion", {"lr": 0.01, **ON_A_CPU}),
    ("flashoptim", "FlashSGD", {"lr": 0.01, "momentum": 0.9, **ON_A_CPU}),
    ("transformers", "Adafactor", {}),  # the last: its lr is None
]
NAMES = [
    "-".join((library, name, *options) if library == "torch.optim" else (library, name))
    for library, name, options in KINDS
]
each = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


@pytest.fixture(autouse=True)
def _plainly():
    """One thread, for tensors so small. Uncompiled: torchao compiles the step of every shape, which takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)


def make(kind, model, *, groups=False):
    """The optimizers of a model; in two groups of unlike learning rates."""
    library, name, options = kind
    optimizer = getattr(pytest.importorskip(library), name)
    params = list(model.parameters())
    parts = [[p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]]
    if name == "Muon":
        optimizers = [
            optimizer(parts[0], **options),
            torch.optim.AdamW(parts[1], maximize=options.get("maximize", False)),
        ]
    elif groups:
        lr = inspect.signature(optimizer).parameters["lr"].default
        lr = options.get("lr", lr if isinstance(lr, float) else 1e-3)
        optimizers = [optimizer([{"params": parts[0]}, {"params": parts[1], "lr": 3 * lr}], **{**options, "lr": lr})]
    else:
        optimizers = [optimizer(params, **options)]
    for o in optimizers:
        getattr(o, "train", lambda: None)()
    return optimizers


def build(kind, dtype=torch.float32, *, groups=False, **walk):
    """A model, the optimizers, and the walk in front of them."""
    model = a_model(dtype)
    optimizers = make(kind, model, groups=groups)
    return model, optimizers, Nexus(*optimizers, **{**WALK, **walk})


def a_model(dtype):
    """Its matrix is as large as those whose state the libraries quantize."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)).to(dtype)


def backward(model, seed):
    """The gradients of a micro-batch, at the weights as they are."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model[0].weight.dtype
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64).to(dtype) for n in (64, 5))
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def train(model, optimizer, steps, first=0, schedulers=()):
    for seed in range(first, first + steps):
        backward(model, seed)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def train_plainly(model, optimizers, cycles, inner_steps, sign):
    """Nexus as a loop of ten lines: θ and D aside, in float64."""
    params = list(model.parameters())
    for cycle in range(cycles):
        theta = [p.detach().double().clone() for p in params]
        displacement = [torch.zeros_like(t) for t in theta]
        for k in range(inner_steps):
            put(params, [t - sign * d for t, d in zip(theta, displacement, strict=True)])
            backward(model, cycle * inner_steps + k)
            norm = sum(p.grad.double().square().sum() for p in params).sqrt()
            for d, p in zip(displacement, params, strict=True):
                d += WALK["inner_lr"] / norm * p.grad.double()
        put(params, theta)
        for p, d in zip(params, displacement, strict=True):
            p.grad = (d / (inner_steps * WALK["inner_lr"])).to(p.dtype)
        for o in optimizers:
            o.step()


def put(params, what):
    with torch.no_grad():
        for p, value in zip(params, what, strict=True):
            p.copy_(value)


def watch(optimizers):
    """What each of their steps will see: weights and gradients."""
    seen = []
    for o in optimizers:
        o.register_step_pre_hook(
            lambda o, *_: seen.extend((p.detach().clone(), p.grad.clone()) for g in o.param_groups for p in g["params"])
        )
    return seen


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# What they are given, and what they make of it


@pytest.mark.parametrize("inner_steps", [4, 1])
@each
def test_a_plain_loop(kind, inner_steps):
    """Weights and gradients of every step, in float64: equal but for its rounding.

    flashoptim takes float32 at most: D and θ are rounded to it in each step, to 6e-8 of D and of θ; the gradient at a
    point so near differs by as much again. A sign or a code of 8 bits may flip for that, rarely.
    """
    dtype, tolerance = (torch.float32, 1e-5) if kind[0] == "flashoptim" else (torch.float64, 1e-10)
    model, optimizers, optimizer = build(kind, dtype, inner_steps=inner_steps, inner_lr_follows_lr=False)
    plain = a_model(dtype)
    others = make(kind, plain)
    seen, expected = watch(optimizers), watch(others)
    start = values(model.parameters())
    train(model, optimizer, 3 * inner_steps)
    train_plainly(plain, others, 3, inner_steps, -1 if kind[2].get("maximize") else 1)
    assert len(seen) == len(expected) == 3 * 4
    seen += [(p.detach(), None) for p in model.parameters()]
    expected += [(p.detach(), None) for p in plain.parameters()]
    moved = max((p - q).abs().max().item() for p, q in zip(model.parameters(), start, strict=True))
    apart = 0
    for (weight, gradient), (other, theirs) in zip(seen, expected, strict=True):
        apart += ((weight - other).abs() > tolerance * max(moved, 1e-3)).sum().item()
        if gradient is not None:
            assert gradient.norm() <= 1
            apart += ((gradient - theirs).abs() > tolerance).sum().item()
    assert apart <= 2e-4 * sum(w.numel() for w, _ in seen)


@pytest.mark.filterwarnings("ignore:master_weight_bits=None with non-fp32 parameters")
@each
def test_below_float32(kind):
    """At the step the parameter is θ as it was, bit for bit, and the gradient is D/Γ, rounded to its dtype once."""
    model = a_model(torch.bfloat16)
    optimizers = make(kind, model)
    optimizer = Nexus(*optimizers, **WALK)
    twin = copy.deepcopy(model)
    others = make(kind, twin)
    seen = watch(optimizers)
    order = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    order_of_twin = [p for o in others for g in o.param_groups for p in g["params"]]
    for cycle in range(3):
        mean = [0.0] * len(order)
        for k in range(4):
            set_grads(order, 4 * cycle + k)
            gradients = [p.grad.double() for p in order]
            norm = sum(g.square().sum() for g in gradients).sqrt()
            mean = [m + g / norm / 4 for m, g in zip(mean, gradients, strict=True)]
            optimizer.step()
        for (weight, gradient), m, p in zip(seen, mean, order_of_twin, strict=True):
            assert torch.equal(weight, p.detach())
            rounded = m.bfloat16()
            # D in float32 is rounded too: where it is near the middle of two values the other one is taken.
            assert (gradient != rounded).float().mean() <= 0.01
            torch.testing.assert_close(gradient, rounded, rtol=2**-7, atol=1e-9)
            p.grad = gradient
        for o in others:
            o.step()
        assert_same(values(order), values(order_of_twin))
        seen.clear()


# Checkpoints and copies


@pytest.mark.parametrize("at", [4, 6])
@each
def test_resume(kind, at):
    """From a file, with new optimizers: bit for bit."""
    model, _, optimizer = build(kind)
    train(model, optimizer, at)
    state = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh, _, resumed = build(kind)
    resumed.load_state_dict(state["optimizer"])
    fresh.load_state_dict(state["model"])
    train(model, optimizer, 7, at)
    train(fresh, resumed, 7, at)
    assert resumed.cycle_position == (at + 7) % 4
    assert_same(values(fresh.parameters()), values(model.parameters()))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda what: pickle.loads(pickle.dumps(what))], ids=["deepcopy", "pickle"]
)
@each
def test_copies(kind, how):
    """Where the library's own go on; torch.optim copies groups and state, and no attributes that others add."""
    plain = a_model(torch.float32)
    others = make(kind, plain)
    try:
        plain, others = how((plain, others))
        train_plainly(plain, others, 1, 1, 1)
        plain, others = how((plain, others))
        train_plainly(plain, others, 1, 1, 1)
    except (AttributeError, NotImplementedError):
        assert kind[0] in OWN_COPIES_FAIL
        return
    assert kind[0] not in OWN_COPIES_FAIL
    model, _, optimizer = build(kind)
    train(model, optimizer, 6)
    copied, same = how((model, optimizer))
    train(model, optimizer, 7, 6)
    train(copied, same, 7, 6)
    assert_same(values(copied.parameters()), values(model.parameters()))


# Schedules


@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR"])
@pytest.mark.parametrize("kind", KINDS[:-1], ids=NAMES[:-1])
def test_schedulers(kind, schedule):
    """Two groups. Around Nexus, or around what is behind it: γ and the optimizer follow."""

    def start(around_nexus):
        model, optimizers, optimizer = build(kind, groups=True)
        around = [optimizer] if around_nexus else optimizers
        if schedule == "LambdaLR":
            return model, optimizer, [LambdaLR(o, lambda step: 0.8**step) for o in around]
        peaks = [[float(g["lr"]) for g in o.param_groups] for o in around]
        one_cycle = {"total_steps": 20, "cycle_momentum": False}
        return model, optimizer, [OneCycleLR(o, peak, **one_cycle) for o, peak in zip(around, peaks, strict=True)]

    runs = []
    for around_nexus in (True, False):
        model, optimizer, schedulers = start(around_nexus)
        lengths = []
        for step in range(8):
            train(model, optimizer, 1, step, schedulers)
            lengths.append([float(g["walk_length"]) for g in optimizer.param_groups])
        runs.append((values(model.parameters()), lengths, [float(g["lr"]) for g in optimizer.param_groups]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    first, second = runs[0][1][0][0], runs[0][1][1][0] - runs[0][1][0][0]
    if schedule == "LambdaLR":
        assert (first, second) == pytest.approx((0.05, 0.04), rel=1e-5)
    else:
        assert first == pytest.approx(0.1 * 0.05, rel=1e-5), "far below the peak γ is at its floor"
    constant, _, without = build(kind, groups=True)
    train(constant, without, 8)
    assert any((p != q).any() for p, q in zip(constant.parameters(), runs[0][0], strict=True))


# schedulefree: two sets of weights


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
@pytest.mark.parametrize("steps", [8, 10])
def test_modes_of_schedulefree(name, steps):
    """eval() and outer_weights() show its average of θ, at any position; train() brings the walk back."""
    kind = ("schedulefree", name, {"lr": 0.1})
    model, (inner,), optimizer = build(kind, torch.float64)
    train(model, optimizer, steps)
    walking = values(model.parameters())
    plain, (other,), at_boundary = build(kind, torch.float64)
    train(plain, at_boundary, 8)
    other.eval()
    average = values(plain.parameters())
    assert any((p - q).abs().max() > 1e-5 for p, q in zip(average, walking, strict=True))

    def assert_near(params, expected):  # its train() and eval() round
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-14)

    with optimizer.outer_weights():
        assert_near(model.parameters(), average)
        assert not inner.param_groups[0]["train_mode"]
    assert inner.param_groups[0]["train_mode"]
    assert_near(model.parameters(), walking)
    optimizer.eval()
    assert_near(model.parameters(), average)
    if steps == 8:  # as its authors want: saved after eval()
        state = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        fresh, _, resumed = build(kind, torch.float64)
        resumed.load_state_dict(state["optimizer"])
        fresh.load_state_dict(state["model"])
        resumed.train()
        train(fresh, resumed, 4, 8)
    optimizer.train()
    assert_near(model.parameters(), walking)
    if steps == 8:
        train(model, optimizer, 4, 8)
        assert_near(fresh.parameters(), values(model.parameters()))


def test_schedulefree_wants_train_first():
    schedulefree = pytest.importorskip("schedulefree")
    model = a_model(torch.float32)
    optimizer = Nexus(schedulefree.AdamWScheduleFree(model.parameters()))
    train(model, optimizer, 3)
    with pytest.raises(Exception, match="not in train mode"):
        train(model, optimizer, 1, 3)
    optimizer.train()
    train(model, optimizer, 4)


# What does not work


@pytest.mark.parametrize(
    ("make_it", "error", "said"),
    [
        (lambda p: torch.optim.LBFGS(p), ValueError, "needs closure"),
        (lambda p: torch.optim.SparseAdam(p), ValueError, "needs sparse gradients"),
        (lambda p: pytest.importorskip("schedulefree").AdamWScheduleFreeClosure(p), ValueError, "needs closure"),
        (
            lambda p: pytest.importorskip("schedulefree").ScheduleFreeWrapper(torch.optim.SGD(p)),
            TypeError,
            "no torch.optim.Optim",
        ),
        (
            lambda p: pytest.importorskip("pytorch_optimizer").Lookahead(torch.optim.SGD(p)),
            ValueError,
            "a form of its own",
        ),
        (lambda p: pytest.importorskip("pytorch_optimizer").Magma(torch.optim.SGD(p)), ValueError, "a form of its own"),
        (
            lambda p: pytest.importorskip("pytorch_optimizer").ScheduleFreeWrapper(torch.optim.SGD(p)),
            ValueError,
            "of its own",
        ),
        (
            lambda p: pytest.importorskip("pytorch_optimizer").Lion(p, maximize=True),
            ValueError,
            "has maximize=True, but not in",
        ),
    ],
)
def test_refused_at_construction(make_it, error, said):
    with pytest.raises(error, match=said):
        Nexus(make_it(make_params((5, 3), (7,))))


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda po, p: po.SAM(p, torch.optim.SGD), "requires closure"),
        (lambda po, p: po.AdaHessian(p), "does not require grad"),
    ],
)
def test_refused_in_the_first_cycle(make_it, said):
    """Whoever needs another pass through the model says so at the first step that it is to take; θ is as it was."""
    model = a_model(torch.float64)
    start = values(model.parameters())
    optimizer = Nexus(make_it(pytest.importorskip("pytorch_optimizer"), model.parameters()))
    train(model, optimizer, 3)
    with pytest.raises(Exception, match=said):
        train(model, optimizer, 1, 3)
    for p, q in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-15)


# bfloat16 without a master


def test_updates_of_less_than_half_a_spacing():
    """How much of AdamW's way arrives in bfloat16 weights of 0.02, whose neighbours are 1.2e-4 apart, at lr=1e-5."""
    lr, cycles = 1e-5, 50

    def walked(make_it, dtype=torch.bfloat16, walk=None):
        torch.manual_seed(0)
        p = nn.Parameter((0.02 * torch.randn(64, 64)).bfloat16().to(dtype))
        start, ahead = p.detach().double(), torch.randn(64, 64)
        inner = make_it([p])
        optimizer = inner if walk is None else Nexus(inner, **walk)
        for _ in range(4 * cycles):
            p.grad = ahead.to(dtype)
            optimizer.step()
        return exact(optimizer, p).double() - start

    options = {"lr": lr, "weight_decay": 0.0}
    whole = walked(lambda p: torch.optim.AdamW(p, **options), torch.float32, WALK)
    assert whole.abs().mean() == pytest.approx(cycles * lr, rel=0.01)

    def share(*args):
        return ((walked(*args) * whole).sum() / whole.square().sum()).item()

    assert share(lambda p: torch.optim.AdamW(p, **options), torch.bfloat16, WALK) < 0.25
    assert share(lambda p: NexusAdamW(p, **options, inner_lr=0.05)) == pytest.approx(1, abs=0.01)
    torchao = pytest.importorskip("torchao.optim")
    by_chance = {"bf16_stochastic_round": True}
    assert share(lambda p: torchao._AdamW(p, **options, **by_chance), torch.bfloat16, WALK) == pytest.approx(
        1, abs=0.05
    )


# Optimizers as nobody has written them yet


class Stubborn(torch.optim.Optimizer):
    """What a library may do: plain descent with options of its own kind in its groups."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("options", [{}, {"lr": None}, {"lr": None, "max_lr": None}], ids=str)
def test_groups_without_a_learning_rate(options):
    """γ is constant. A state of the optimizer's own loads too."""
    params = make_params((5, 3), (7,))
    inner = Stubborn(params, **options)
    plain = inner.state_dict()
    optimizer = Nexus(inner, inner_lr=0.05)
    run(optimizer, params, 2)
    optimizer.outer_step()
    optimizer.load_state_dict(plain)
    run(optimizer, params, 2)
    assert float(optimizer.param_groups[0]["walk_length"]) == pytest.approx(0.1)
    assert inner.param_groups[0].items() >= options.items(), "they are as they were"


class Wrapper(Stubborn):
    def state_dict(self):
        return {"inside": super().state_dict()}


class Consolidates(Stubborn):
    """As torch.distributed's ZeroRedundancyOptimizer."""

    ready = False

    def state_dict(self):
        if not self.ready:
            raise RuntimeError("Optimizer state has not been consolidated on this rank")
        return super().state_dict()


def test_a_state_of_another_form_is_refused():
    inner = Wrapper(make_params((3,)))
    with pytest.raises(ValueError, match=r"optimizer 0 \(Wrapper\) saves its state in a form of its own"):
        Nexus(inner)
    assert "inner_lr" not in inner.param_groups[0]


def test_a_state_that_cannot_be_had_yet():
    inner = Consolidates(make_params((3,)))
    optimizer = Nexus(inner)
    with pytest.raises(RuntimeError, match="consolidated"):
        optimizer.state_dict()
    inner.ready = True
    assert optimizer.state_dict()["param_groups"][0]["inner_steps"] == 4


def test_hidden_maximize_is_refused():
    """The walk would descend, and the optimizer ascend."""
    params = make_params((3,))
    inner = Stubborn(params)
    inner.maximize = True
    with pytest.raises(ValueError, match=r"optimizer 0 \(Stubborn\) has maximize=True, but not in its parameter"):
        Nexus(inner)
    inner.maximize = False
    Nexus(inner)
    inner = Stubborn(params, maximize=True)
    inner.maximize = True
    Nexus(inner)
