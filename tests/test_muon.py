"""Nexus before Muon and AdamW: against two models, docs/recipes/muon.py, split_matrices, and bench.muon."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import assert_same, values
from torch import nn
from two_models import TwoModels

from bench import muon as bench
from nexus_fused import Nexus, split_matrices
from nexus_fused.demo.model import ByteTransformer, Size
from nexus_fused.demo.train import Result, Settings, train

ROOT = Path(__file__).parent.parent
K, GAMMA = 3, 0.05

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """An embedding, hidden matrices, one of them frozen, a norm, biases and a head; and what no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.frozen = nn.Linear(10, 10, bias=False).requires_grad_(False)
        self.narrow = nn.Linear(10, 6, bias=False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, 11)

    def forward(self, x):
        y = self.norm(self.wide(self.words(x)).tanh())
        return self.head(self.narrow(y + self.frozen(y)))


def tiny(dtype):
    torch.manual_seed(0)
    return Tiny().to(dtype)


def loss_of(model, seed, weights=None):
    x, y = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
    logits = model(x) if weights is None else torch.func.functional_call(model, weights, (x,))
    return nn.functional.cross_entropy(logits, y)


class Both:
    """What stands behind the walk."""

    def __init__(self, model):
        matrices, rest = split_matrices(model, head=model.head)
        self.muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)

    def step(self):
        self.muon.step()
        self.adamw.step()

    def state(self, p):
        return self.muon.state.get(p) or self.adamw.state.get(p, {})


def polar(gradient, *_):
    """What Newton-Schulz approximates, to the last digits."""
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    return (u @ v).to(gradient.dtype)


@pytest.mark.parametrize("exact", [True, False], ids=["polar factor", "Newton-Schulz"])
def test_two_models(exact, monkeypatch):
    """In float64. Both hand torch's Muon the same D/Γ up to float64's rounding.

    Muon's own iteration rounds it to bfloat16 first: to the same number, as none of the few thousand elements is within
    1e-14 of the middle between two. So what is left is float64's rounding, whatever Muon computes in.
    """
    if exact:
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", polar)
    model, other = tiny(torch.float64), tiny(torch.float64)
    behind, theirs = Both(model), Both(other)
    optimizer = Nexus(behind.muon, behind.adamw, inner_lr=GAMMA, inner_steps=K)
    two = TwoModels(list(other.parameters()), GAMMA, K, lr=0.0)
    two.adamw = theirs
    names = [name for name, _ in other.named_parameters()]
    start = values(model.parameters())
    for seed in range(4 * K):
        loss_of(model, seed).backward()
        optimizer.step()
        weights = {n: w.requires_grad_(p.requires_grad) for n, w, p in zip(names, two.inner, two.outer, strict=True)}
        loss_of(other, seed, weights).backward()
        grads = [w.grad for w in two.inner]
        two.inner = [w.detach() for w in two.inner]
        two.step(grads)
        optimizer.zero_grad()
        if optimizer.at_boundary:
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
                assert behind.state(p).keys() == theirs.state(q).keys()
                for key, value in behind.state(p).items():
                    torch.testing.assert_close(value, theirs.state(q)[key], rtol=1e-11, atol=1e-13)
        else:
            for p, w in zip(model.parameters(), two.inner, strict=True):
                torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-12)
    still = {n for n, p, s in zip(names, model.parameters(), start, strict=True) if torch.equal(p, s)}
    assert still == {"frozen.weight", "unused.weight", "unused.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_walk_too_short_to_see_hands_over_unit_gradients(dtype):
    """The mean of g/‖g‖ at θ, one norm over both optimizers: what bench.muon's arm of that name steps along."""
    model = tiny(dtype)
    behind = Both(model)
    optimizer = Nexus(
        behind.muon, behind.adamw, inner_lr=1e-12, inner_steps=K, displacement_dtype=torch.float32
    )  # fmt: skip
    params = [p for p in model.parameters() if p.requires_grad]
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for seed in range(K):
        gradients = torch.autograd.grad(loss_of(model, seed), params, allow_unused=True)
        norm = torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt()
        for total, gradient in zip(mean, gradients, strict=True):
            total += 0 if gradient is None else gradient.double() / norm / K
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    for p, unit in zip(params, mean, strict=True):
        for key, share in ("momentum_buffer", 0.05), ("exp_avg", 0.1):  # 1 - momentum, 1 - beta1
            if key in behind.state(p):
                torch.testing.assert_close(behind.state(p)[key].double() / share, unit, **tolerance)


# split_matrices


def names_of(model, **head):
    """Names of the matrices and of the rest; each parameter is in one of them, once."""
    name = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = ([name[id(p)] for p in part] for part in split_matrices(model, **head))
    assert sorted(matrices + rest) == sorted(name.values())
    return matrices, rest


def test_split():
    model = tiny(torch.float32)
    matrices, rest = names_of(model, head=model.head)
    assert matrices == ["wide.weight", "frozen.weight", "narrow.weight", "unused.weight"]
    assert rest == ["words.weight", "wide.bias", "norm.weight", "norm.bias", "unused.bias", "head.weight", "head.bias"]
    assert names_of(model, head=None)[0][-1] == "head.weight"
    assert names_of(model, head=[model.head, model.wide.weight, model.narrow])[0] == ["frozen.weight", "unused.weight"]
    assert names_of(model, head=model.head.weight) == (matrices, rest)


def test_split_of_a_tied_head():
    model = tiny(torch.float32)
    model.head = nn.Linear(6, 11, bias=False)
    model.head.weight = model.words.weight
    model.words, model.head = model.head, model.words  # now the head comes first
    matrices, rest = names_of(model, head=None)
    assert matrices == ["wide.weight", "frozen.weight", "narrow.weight", "unused.weight"]
    assert "words.weight" in rest


def test_split_of_other_modules():
    model = nn.ModuleDict(
        {
            "bag": nn.EmbeddingBag(4, 3),
            "conv": nn.Conv2d(2, 2, 3),
            "plane": nn.LayerNorm((4, 5)),
            "rms": nn.RMSNorm((4, 5)),
            "bilinear": nn.Bilinear(2, 3, 4),
            "complex": nn.Linear(2, 2, dtype=torch.complex64),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    matrices, rest = split_matrices(model, head=None)
    assert names_of(model, head=None)[0] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    torch.optim.Muon(matrices)
    torch.optim.AdamW(rest)


def test_a_head_must_be_named():
    model = tiny(torch.float32)
    with pytest.raises(TypeError, match="head"):
        split_matrices(model)
    for head in nn.Linear(6, 11), [model.head, torch.zeros(2, 2)], nn.Tanh():
        with pytest.raises(ValueError, match="head must name modules or parameters of the model"):
            split_matrices(model, head=head)


# The recipe


def recipe():
    path = ROOT / "docs" / "recipes" / "muon.py"
    spec = importlib.util.spec_from_file_location("recipes_muon", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipe(tmp_path):
    """It learns, and goes on bit for bit from a checkpoint of mid-cycle; D came through both optimizers."""
    script = recipe()
    model, optimizer, losses = script.train(tmp_path / "checkpoint.pt")
    resumed, other, after = script.train(tmp_path / "checkpoint.pt", resume=True)
    assert_same(values(model.parameters()), values(resumed.parameters()))
    ends = optimizer.state_dict(), other.state_dict()
    torch.testing.assert_close(*(end["state"] for end in ends), rtol=0, atol=0)
    assert ends[0]["param_groups"] == ends[1]["param_groups"]
    assert losses[-1] < 0.75 * losses[0]
    assert losses[-2:] == after[-2:]
    muon, adamw = optimizer.optimizers
    assert len(muon.state) == 5
    assert all(state["step"] == script.MICRO_BATCHES // script.K for state in adamw.state.values())
    assert model.head.weight in adamw.state
    assert model.words.weight in adamw.state
    assert optimizer.metrics()["skipped_inner_steps"] == 0


def test_recipe_prints(capsys):
    recipe().main()
    assert capsys.readouterr().out.startswith("loss of θ every 8 cycles: 3.")


# bench.muon


SMALL = Size(dim=16, layers=1, heads=2, context=16, batch=2, steps=2, lr_grid=(), threads=1)


def texts(*names):
    numpy = pytest.importorskip("numpy")
    return {name: numpy.random.default_rng(seed).integers(97, 105, 500, "uint8") for seed, name in enumerate(names)}


def test_the_arms_of_the_benchmark():
    """All but AdamW begin with the same weights and see the same text; what differs is who makes the gradient."""
    training = texts("a", "b", "c")
    held_out = {**training, **texts("d")}
    runs = {}
    for arm in bench.ARMS:
        settings = Settings(SMALL, arm, 0, 1e-2, 0.0, 4)
        runs[arm] = bench.measured(training, held_out, settings)
    bits = {run.mean_bits for run in runs.values()}
    assert len(bits) == len(bench.ARMS)
    assert max(bits) < 8.5
    assert all(run.tokens == 4 * 3 * 2 * 17 for run in runs.values())
    assert [bool(run.alignment) for run in runs.values()] == ["unit" in arm or "Nexus" in arm for arm in bench.ARMS]
    assert runs["Muon + unit gradients"].lost_fraction == 1
    assert runs["Muon + Nexus, γ = 0.2"].lost_fraction < 0.1


def test_plain_muon_of_the_benchmark_steps_clipped_means():
    training = texts("a", "b", "c")
    settings = Settings(SMALL, "Muon", 0, 1e-2, 0.0, 1)
    seen = {}

    def build(settings, k):
        model, both = bench.build_arm(settings, k)
        step = both.step

        def look():
            seen["norm"] = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            seen["numbers"] = [sum(len(g["params"]) for g in o.param_groups) for o in both.optimizers]
            step()

        both.step = look
        return model, both

    train(training, training, settings, 1, build)
    assert float(seen["norm"]) == pytest.approx(1.0, rel=1e-3)
    assert seen["numbers"] == [4, 7]  # the matrices of a block; tokens, and weight and bias of three norms
    assert len(split_matrices(ByteTransformer(bench.SIZE), head=None)[0]) == 12


@pytest.mark.parametrize("best", [-2, -1, 0, 1, 2])
def test_the_search_ends_between_worse_neighbors(best):
    tried = []

    def measure(lr):
        tried.append(lr)
        return abs(lr - 2.0**best)

    assert bench.climb(measure, 1.0) == 2.0**best
    assert {2.0 ** (best - 1), 2.0 ** (best + 1)} <= set(tried)
    assert len(set(tried)) == len(tried)


def test_figures_of_the_benchmark():
    arms = list(bench.ARMS)
    runs = [
        Result(arm, seed, 1.0, curve=[(1, i + seed)], bits={"a": float(i + seed), "x": 2.0 * i * seed, "y": 4.0})
        for i, arm in enumerate(arms)
        for seed in range(3 if i < 4 else 1)
    ]
    made = bench.figures(runs, texts("a"))
    assert made["Muon"]["trained"] == {"mean": 2, "standard_error": pytest.approx(3**-0.5), "by_seed": [1, 2, 3]}
    difference = made["Muon + unit gradients − Muon"]
    assert difference["trained"] == {"mean": 1, "standard_error": 0, "by_seed": [1, 1, 1]}
    assert difference["unseen"]["by_seed"] == [0, 1, 2]
    assert made[f"{arms[-1]} − Muon"]["trained"]["by_seed"] == [3]
