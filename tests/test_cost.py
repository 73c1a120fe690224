"""bench.cost: its formulas against cases worked out otherwise, its bytes against measured ones, its page."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # not only for one test: the ranks import from here too

from bench import cost, cost_measured  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
PAGE = (ROOT / "docs" / "cost.md").read_text()
RESULT = json.loads((ROOT / "bench" / "results" / "cost.json").read_text())


def ring(kind, ranks, chunk):
    """Bytes that rank 0 sends, step by step; checks that everything arrives where it should."""
    sent = 0
    have = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # have[rank][part]: whose values are in it
    if kind == "all_gather":  # each has its own part, complete
        have = [
            [set(range(ranks)) if part == (rank + 1) % ranks else set() for part in range(ranks)]
            for rank in range(ranks)
        ]
    rounds = {"reduce_scatter": [0], "all_gather": [1], "all_reduce": [0, 1]}[kind]
    for first in rounds:
        for step in range(ranks - 1):
            parts = [(rank + first - step) % ranks for rank in range(ranks)]
            for part, values in [(p, have[rank][p]) for rank, p in enumerate(parts)]:
                have[(parts.index(part) + 1) % ranks][part] |= values
            sent += chunk
    complete = set(range(ranks))
    for rank in range(ranks):
        needed = [(rank + 1) % ranks] if kind == "reduce_scatter" else range(ranks)
        assert all(have[rank][part] == complete for part in needed)
    return sent


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_bytes_in_a_ring(kind, ranks):
    assert cost.sent(kind, ranks, 6 * ranks) == pytest.approx(ring(kind, ranks, 6))


# Tensors that each pass reads and writes, as its formula names them. w: of Nexus, a float32 parameter, or one and its
# remainder; of AdamW, a float32 parameter or master, and p the parameter that mirrors a master. A: g in float32.
PASSES = {
    "accumulate": "grad g -> grad",
    "norm": "g ->",
    "scale": "g -> g",
    "adamw": "w g m v -> w m v",
    "adamw with master": "w g m v -> w m v p",
    "wide first": "g -> A",
    "wide accumulate": "A g -> A",
    "wide norm": "A ->",
    "wide scale": "A -> A",
    "wide adamw": "A w m v -> w m v p",
    "first": "w g -> w D",
    "first, local": "w g -> w D anchor",
    "middle": "w D g -> w D",
    "last": "w D g m v -> w m v",
    "end": "anchor D g -> w D",
    "end without a walk": "g -> D",
    "after the end": "w D m v -> w m v",
}


def moved(passes, gradient, displacement=BF16):
    """Bytes of a sequence of passes: a number of times, and the pass's name."""
    sizes = dict.fromkeys(("grad", "g", "p"), gradient.itemsize) | {"D": displacement.itemsize}
    return sum(
        times * sum(sizes.get(tensor, 4) for tensor in PASSES[name].replace("->", "").split()) for times, name in passes
    )


def nexus(k):
    """Passes of a synchronized cycle, and of one with local walks."""
    if k == 1:
        return [(1, "norm"), (1, "adamw")], [(1, "norm"), (1, "end without a walk"), (1, "after the end")]
    later = (k, "norm"), (k - 2, "middle")
    return [*later, (1, "first"), (1, "last")], [*later, (1, "first, local"), (1, "end"), (1, "after the end")]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k", [1, 2, 4, 7, 33])
def test_bytes_through_memory(dtype, k):
    synchronized, local = nexus(k)
    displacement = BF16 if k <= 32 else F32
    adamw = "adamw" if dtype is F32 else "adamw with master"
    expected = {
        cost.ADAMW: moved([(k - 1, "accumulate"), (1, "norm"), (1, "scale"), (1, adamw)], dtype),
        cost.SYNCHRONIZED: moved(synchronized, dtype, displacement),
        cost.LOCAL: moved(local, dtype, displacement),
    }
    if displacement is BF16:
        expected[cost.LOCAL_F32] = moved(local, dtype, F32)
    if dtype is BF16:
        wide = [(1, "wide first"), (k - 1, "wide accumulate"), (1, "wide norm"), (1, "wide scale"), (1, "wide adamw")]
        expected[cost.WIDE] = moved(wide, dtype)
    found = cost.costs(parameters=1, ranks=1, inner_steps=k, dtype=dtype)
    assert {method: c.traffic for method, c in found.items()} == expected


@pytest.mark.parametrize("gradient", [F32, BF16])
@pytest.mark.parametrize("displacement", [BF16, F32])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_gradients_and_displacements_of_any_size(gradient, displacement, k):
    """Whatever the parameters' dtype is."""
    sizes = k, gradient.itemsize, displacement.itemsize
    synchronized, local = nexus(k)
    assert cost.nexus_traffic(*sizes) == moved(synchronized, gradient, displacement)
    assert cost.walks_traffic(*sizes) == moved(local, gradient, displacement)


def test_bytes_of_a_cycle():
    """K = 4: of float32, of bfloat16 gradients with parameters of any dtype, and with D in float32, which is read or
    written six times."""
    assert [cost.nexus_traffic(4, 4), cost.nexus_traffic(4, 2)] == [92, 76]
    assert [cost.nexus_traffic(4, 4, 4), cost.nexus_traffic(4, 2, 4)] == [92 + 12, 76 + 12]


def test_bytes_through_memory_are_those_that_the_benchmark_counts():
    from bench.contenders import K, cycles, kernels

    for dtype in (F32, BF16):
        ours = cycles([(64,)], dtype)[0].bytes
        assert cost.nexus_traffic(K, dtype.itemsize) == ours
        passes = {"sq_norm": "norm", "inner_step, first": "first", "inner_step, middle": "middle"}
        passes |= {"outer_step": "last", "end_walk": "end"}
        assert {c.name: c.bytes for c in kernels([(64,)], dtype)} == {
            kernel: moved([(1, name)], dtype) for kernel, name in passes.items()
        }
    assert cost.adamw_traffic(K, 4) == cycles([(64,)], F32)[1].bytes


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_memory(dtype):
    """Peak bytes per parameter beside its gradient: a weight of 4, two moments, D; with local walks θ too."""

    def found(method, k):
        return cost.costs(parameters=1, ranks=1, inner_steps=k, dtype=dtype)[method].memory - dtype.itemsize

    assert [found(cost.SYNCHRONIZED, k) for k in (4, 33, 1)] == [4 + 8 + 2, 4 + 8 + 4, 4 + 8]
    assert [found(cost.LOCAL, k) for k in (4, 33)] == [4 + 8 + 2 + 4, 4 + 8 + 4 + 4]
    assert found(cost.LOCAL_F32, 4) == 4 + 8 + 4 + 4
    assert found(cost.LOCAL, 1) == 4 + 8 + 2  # w is θ, but D goes through memory
    assert found(cost.ADAMW, 4) == 16 - dtype.itemsize


def test_layouts():
    """1,000 parameters, K = 3, 12 ranks: bytes sent within shards and across replicas, and memory."""

    def found(shards, dtype=F32):
        found = cost.costs(parameters=1000, ranks=12, inner_steps=3, dtype=dtype, shards=shards, blocks=2, tensors=5)
        return {
            method: (cost.bytes_sent(c.collectives, False), cost.bytes_sent(c.collectives, True), c.memory)
            for method, c in found.items()
        }

    def near(**expected):
        return {getattr(cost, name): pytest.approx(values) for name, values in expected.items()}

    all_12, vector = 2 * 11 / 12, 8 * (9 + 5)
    assert found(1) == near(
        ADAMW=(0, all_12 * 4000, 16000),
        SYNCHRONIZED=(0, 3 * all_12 * 4000, 18000),
        LOCAL=(0, all_12 * (2000 + vector), 22000),
        LOCAL_F32=(0, all_12 * (4000 + vector), 24000),
    )
    # Shards of 250 parameters on 4 ranks, 3 replicas. 9 rounds of the whole: 2 gathers and a reduction in each of 3.
    in_4, of_3, scalars = 3 / 4, 2 * 2 / 3, 2 * 3 / 4 * (3 * 8 + 24)
    assert found(4) == near(
        ADAMW=(in_4 * 9 * 4000 + 2 * in_4 * 5 * 4, of_3 * 1000, 4000),
        UNSHARDED=(in_4 * 7 * 4000 + 2 * in_4 * 5 * 4, of_3 * 1000, 250 * 12 + 4000),
        SYNCHRONIZED=(in_4 * 9 * 4000 + scalars, of_3 * 3000, 4500),
        LOCAL=(in_4 * 9 * 4000 + scalars, of_3 * (500 + vector), 5500),
        LOCAL_F32=(in_4 * 9 * 4000 + scalars, of_3 * (1000 + vector), 6000),
    )
    assert found(4, BF16) == near(
        ADAMW=(in_4 * 9 * 2000 + 2 * in_4 * 5 * 2, of_3 * 500, 4000),
        WIDE=(in_4 * (6 * 2000 + 3 * 4000) + 2 * in_4 * 5 * 4, of_3 * 1000, 4500),
        UNSHARDED=(in_4 * 7 * 2000 + 2 * in_4 * 5 * 2, of_3 * 500, 250 * 14 + 2000),
        SYNCHRONIZED=(in_4 * 9 * 2000 + scalars, of_3 * 1500, 4000),
        LOCAL=(in_4 * 9 * 2000 + scalars, of_3 * (500 + vector), 5000),
        LOCAL_F32=(in_4 * 9 * 2000 + scalars, of_3 * (1000 + vector), 5500),
    )
    assert set(found(12)) == {cost.ADAMW, cost.UNSHARDED, cost.SYNCHRONIZED}  # no replicas to walk on their own


def test_seconds():
    collectives = [
        cost.Collective("all_reduce", True, 2, 100.0, 3),  # sends 100
        cost.Collective("all_gather", False, 4, 80.0, 2),  # sends 60
    ]
    seconds = cost.communication_seconds(collectives, network_bandwidth=50, shard_bandwidth=20, latency=0.5)
    assert seconds == 100 / 50 + 60 / 20 + 5 * 0.5


def test_buckets_of_ddp():
    mib = 2**20
    assert [cost.ddp_buckets(size * mib) for size in (0.1, 1, 1.1, 26, 26.1, 51)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shards": 3}, "3 shards and 8 ranks"),
        ({"shards": 16}, "16 shards and 8 ranks"),
        ({"inner_steps": 0}, "0 inner steps"),
        ({"dtype": torch.float16}, "float16"),
    ],
)
def test_numbers_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        cost.costs(**{"parameters": 10, "ranks": 8, "inner_steps": 4, "dtype": F32, **wrong})


def test_measured_bytes():
    """Kinds, bytes and calls of collectives are the model's on 1, 2 and 4 processes, for each layout and method.

    What ranks write to sockets is what rings send and gloo's headers, a few hundred bytes a call; memory is the model's
    and what does not grow with the parameters.
    """
    rows = list(cost_measured.compared())
    assert {(row["ranks"], row["shards"]) for row in rows} == {(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)}
    for row in rows:
        model, measured = row["model"], row["measured"]
        assert measured.collectives == model.collectives, (row["ranks"], row["shards"], row["dtype"], row["method"])
        assert row["equal"]  # on the other ranks too
        assert row["ranks"] == 1 or measured.collectives
        if measured.sent is not None:
            calls = sum(calls for _, calls in measured.collectives.values())
            assert model.sent <= measured.sent <= model.sent + 2048 * calls + 4096, row
        if measured.memory is not None:
            assert model.memory <= measured.memory <= model.memory + 8192, row
    assert {row["method"] for row in rows if row["measured"].memory is None} == {
        cost.ADAMW,
        cost.WIDE,
        cost.UNSHARDED,
    }
    assert_figures(cost_measured.figures(rows))


def assert_figures(figures):
    """A float64 vector goes with D: Γ, Σγ² and five hyperparameters of the group, two votes, a number per tensor."""
    size, vector = cost_measured.LAYERS * cost_measured.WIDTH**2, 8 * (9 + cost_measured.LAYERS)
    found = {name: figure["value"] for name, figure in figures.items()}
    assert found == {
        "float32: bytes of a cycle, local walks / AdamW's": 0.5 + vector / (4 * size),
        "float32: bytes of a cycle, local walks / synchronized": (0.5 + vector / (4 * size))
        / cost_measured.INNER_STEPS,
        "float32: bytes of a cycle, local walks, D in float32 / AdamW's": 1 + vector / (4 * size),
        "bfloat16: bytes of a cycle, local walks / AdamW's": 1 + vector / (2 * size),
        "bfloat16: bytes of a cycle, local walks, D in float32 / AdamW's": 2 + vector / (2 * size),
        "bfloat16: bytes of a cycle, local walks / AdamW's, float32 gradients": 0.5 + vector / (4 * size),
        "float32: bytes per parameter that local walks hold beside synchronized": pytest.approx(4, abs=1e-3),
        "bfloat16: bytes per parameter that local walks hold beside synchronized": pytest.approx(4, abs=1e-3),
    }


# What was published


def test_published_measurement():
    """It was taken with the model as it is."""
    rows = RESULT["sections"][0]["rows"]
    for row in rows:
        found = cost_measured.modelled(row["ranks"], row["shards"], getattr(torch, row["dtype"]))
        model = cost_measured.as_measured(found[row["method"]])
        assert row["model"] == cost_measured.as_json(model)
        assert row["equal"]
        assert row["measured"]["collectives"] == row["model"]["collectives"]
    assert_figures(RESULT["figures"])


COMMANDS = re.findall(
    r"```\npython -m bench.cost (--parameters [^\n]*)\n```\n\n(.*?)(?=\n\n[^|*R\n]|\Z)", PAGE, re.DOTALL
)


def test_every_command_of_the_page_is_found():
    assert len(COMMANDS) == PAGE.count("bench.cost --parameters") == 1


@pytest.mark.parametrize(("options", "shown"), COMMANDS)
def test_tables_of_the_page(options, shown, capsys):
    cost.main(shlex.split(options))
    assert capsys.readouterr().out.strip() == shown.strip()


def test_formulas_of_the_page():
    """Each formula in K gives what stands beside it for K = 4, and what the program computes for other K."""
    found = {}
    for k in (2, 4, 7):
        for name, dtype in (("float32", F32), ("bfloat16", BF16)):
            for method, c in cost.costs(parameters=1, ranks=1, inner_steps=k, dtype=dtype).items():
                found[name, method, k] = c.traffic
    methods = [cost.ADAMW, cost.WIDE, cost.SYNCHRONIZED, cost.LOCAL, cost.LOCAL_F32]
    rows = PAGE.partition("| | float32 | K = 4 | bfloat16 | K = 4 |")[2].split("\n\n")[0].strip().splitlines()[1:]
    assert len(rows) == len(methods)
    for method, row in zip(methods, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for name, formula, at_4 in (("float32", *cells[1:3]), ("bfloat16", *cells[3:5])):
            assert bool(formula) == ((name, method, 4) in found)
            for k in (2, 4, 7) if formula else ():
                readable = re.sub(r"(\d+)(?=[K(])", r"\1*", formula.replace("−", "-"))
                assert eval(readable, {"K": k}) == found[name, method, k]
            assert not formula or int(at_4) == found[name, method, 4]


def test_figures_of_the_page():
    rows = PAGE.partition("<!-- figures")[2].split("\n\n")[0].splitlines()
    shown = dict(re.findall(r"\| (.*?) \| ([\d.]+) \|", "\n".join(rows)))
    assert shown == {name: f"{abs(figure['value']):.3f}" for name, figure in RESULT["figures"].items()}


def test_excess_on_the_page():
    """What is sent and held beyond the model."""
    rows = RESULT["sections"][0]["rows"]

    def most(key):
        pairs = [
            (row["measured"][key], row["model"][key]) for row in rows if row["measured"][key] and row["model"][key]
        ]
        return f"{100 * max(a / b - 1 for a, b in pairs):.2f} %"

    assert f"write at most {most('sent')} more" in " ".join(PAGE.split())
    assert f"alive are at most {most('memory')} more" in " ".join(PAGE.split())
