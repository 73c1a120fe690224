"""bench.study on tiny synthetic text: what a run is, that a study can stop anywhere, its file, its figures, its law."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

import numpy as np

from bench.study import StudyError, __main__, arms, figures, law, plan, report, results, runs
from nexus_fused.demo import data
from nexus_fused.demo.model import ByteTransformer

ROOT = Path(__file__).parent.parent
TINY = runs.Size(dim=16, layers=1, heads=2, context=16, windows=10)
NAMES = ("a", "b", "c", "d", "e")


def texts() -> tuple[data.Texts, data.Texts]:
    """Five domains of different letters, and one that is never trained on."""
    made = {
        name: np.random.default_rng(seed).integers(97 + 4 * seed, 105 + 4 * seed, 3000, "uint8")
        for seed, name in enumerate((*NAMES, "x"))
    }
    return {name: made[name] for name in NAMES}, made


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runs.SIZES, "tiny", TINY)


def perform(run: runs.Run, points: list[runs.Point], tick=lambda: None):
    return dict(runs.perform(run, points, *texts(), "cpu", "float32", tick))


RUN = runs.Run("nexus:0.2", "tiny", 5, 3, 1e-2)
CYCLE = TINY.cycle_tokens


def comparable(measured: dict) -> dict:
    return {name: value for name, value in measured.items() if name != "seconds"}


# Arms


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("adamw", (False, None)),
        ("unit", (False, 1e-12)),
        ("nexus:0.05", (False, 0.05)),
        ("nexus:1e-3", (False, 1e-3)),
        ("muon", (True, None)),
        ("muon+unit", (True, 1e-12)),
        ("muon+nexus:0.2", (True, 0.2)),
    ],
)
def test_arms(arm: str, expected: tuple[bool, float | None]) -> None:
    assert arms.parse(arm) == expected
    optimizer = arms.build(arm, ByteTransformer(TINY), 1e-3, 5)
    assert hasattr(optimizer, "metrics") == (expected[1] is not None)


@pytest.mark.parametrize("arm", ["", "sgd", "nexus", "nexus:", "nexus:0", "nexus:-1", "nexus:1e999", "nexus:1.2.3"])
def test_unknown_arms(arm: str) -> None:
    with pytest.raises(StudyError, match="there is no arm"):
        arms.parse(arm)
    with pytest.raises(StudyError, match="there is no arm"):
        arms.parse(f"muon+{arm}")


# Runs


def test_a_run_repeats_bit_for_bit_whatever_is_measured_on_the_way() -> None:
    """Branches leave the run as it is, and a resumed study takes other points than the first one did."""
    whole = [
        runs.Point(*RUN, CYCLE * 3),
        runs.Point(*RUN, CYCLE * 3, "mixture", CYCLE * 2),
        runs.Point(*RUN, CYCLE * 3, "b", CYCLE),
        runs.Point(*RUN, CYCLE * 7),
        runs.Point(*RUN, CYCLE * 7, "b", CYCLE * 2),
    ]
    everything = perform(RUN, whole)
    assert set(everything) == set(whole)
    assert len({m["weights"] for m in everything.values()}) == len(whole)
    for part in (whole[3:], whole[4:], whole[1:2], whole[::2]):
        for point, measured in perform(RUN, part).items():
            assert comparable(measured) == comparable(everything[point])


def test_what_is_evaluated() -> None:
    trunk, mixed, special = (runs.Point(*RUN, CYCLE, *rest) for rest in ((), ("mixture", CYCLE), ("b", CYCLE)))
    found = perform(RUN, [trunk, mixed, special])
    assert sorted(found[trunk]["bits"]) == [*NAMES]
    assert sorted(found[mixed]["bits"]) == [*NAMES, "x"]
    assert sorted(found[special]["bits"]) == ["b"]


@pytest.mark.parametrize("arm", ["adamw", "unit", "nexus:0.2", "muon+nexus:0.2"])
def test_the_learning_rate_rises_stays_and_falls(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WARM_UP", 3)
    run = RUN._replace(arm=arm)
    seen: list[list[float]] = []
    build = arms.build

    def recorded(*arguments):
        optimizer = build(*arguments)
        optimizer.step = lambda step=optimizer.step: (seen.append(optimizer.param_groups[0]["lr"]), step())
        return optimizer

    if arm == "adamw":
        monkeypatch.setattr(arms, "build", recorded)
        perform(run, [runs.Point(*run, CYCLE * 5)])
        assert seen == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])
    assert runs.warm_up(1, 4, 0.3) == pytest.approx([0.2, 0.3, 0.3])
    assert runs.falling(4, 1.0) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert perform(run, [runs.Point(*run, CYCLE * 5, "mixture", CYCLE * 4)])


def test_cycles_hold_equal_shares_of_all_domains() -> None:
    training, _ = texts()
    for inner_steps in (5, 10):
        stream = runs.micro_batches(training, NAMES, TINY, inner_steps, [1], "cpu")
        for _ in range(3):
            batches = next(stream)
            assert len(batches) == inner_steps
            assert {batch.shape for batch in batches} == {(10 // inner_steps, 17)}
            # the letters of a domain are eight, the first of which is four behind that of the one before
            owners = [int(batch.min() - 97) // 4 for batch in batches]
            assert sorted(owners) == sorted(list(range(5)) * (inner_steps // 5))


def test_arms_see_the_same_text() -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for arm in ("adamw", "nexus:0.2"):
        run = RUN._replace(arm=arm)
        trainer = runs.Trainer(run, "cpu", "float32", lambda: None)
        forward = trainer.model.forward
        trainer.model.forward = lambda batch, arm=arm, f=forward: (seen.setdefault(arm, []).append(batch), f(batch))[1]
        stream = runs.micro_batches(texts()[0], NAMES, TINY, 5, [run.seed], "cpu")
        trainer.train((next(stream) for _ in range(3)), [1e-3] * 3)
    assert len(seen["adamw"]) == 15
    assert all(a.equal(b) for a, b in zip(seen["adamw"], seen["nexus:0.2"], strict=True))


@pytest.mark.parametrize("arm", ["adamw", "nexus:0.2"])
def test_a_run_that_diverges(arm: str) -> None:
    """Its points say so, and the search passes over its learning rate."""
    run = RUN._replace(arm=arm, lr=1e6)
    points = [runs.Point(*run, CYCLE * n, *rest) for n in (30, 60) for rest in ((), ("mixture", CYCLE))]
    found = perform(run, points)
    assert len(found) == 4
    assert all(measured["diverged"] for measured in found.values())
    json.dumps([*found.values()], allow_nan=False)
    assert plan.mean_bits(found[points[0]], NAMES) == math.inf


# The plan


def wanted(**changes) -> plan.Wanted:
    of = {"arms": ["adamw", "unit"], "sizes": ["tiny"], "inner_steps": [5], "seeds": 2, "tokens": [480.0]}
    of |= {"domains": [], "domain_tokens": [160.0], "search_tokens": 320.0}
    return plan.Wanted(**{**of, **changes})


def measured_as(bits: float) -> dict:
    return {"diverged": False, "bits": dict.fromkeys((*NAMES, "x", "y"), bits)}


@pytest.mark.parametrize("best", [2e-3, 8e-3, 64e-3])
def test_a_search_ends_between_worse_neighbors(best: float) -> None:
    asked, have = wanted(arms=["adamw"], seeds=1), {}
    for _ in range(20):
        ahead = plan.pending(asked, have, NAMES)
        if not any(run.seed == plan.SEARCHED for run in ahead):
            break
        for run, points in ahead.items():
            assert run.seed == plan.SEARCHED
            have |= {point: measured_as(abs(math.log2(run.lr / best))) for point in points}
    (run,) = ahead
    assert run.lr == best
    tried = {point.lr for point in have}
    assert {best / 2, best, best * 2} <= tried
    assert len(tried) <= 6


def test_a_search_leaves_what_diverges() -> None:
    assert plan.next_rates({8e-3: math.inf}, 8e-3) == [4e-3]
    assert plan.next_rates({8e-3: math.inf, 4e-3: 2.0}, 8e-3) == [2e-3]
    with pytest.raises(StudyError, match="diverged"):
        plan.next_rates({2.0**-20: math.inf}, 8e-3)


def searched(*names: str) -> dict[runs.Point, dict]:
    """A search that ended at 8e-3, for each arm."""
    have = {}
    for arm in names:
        for lr, bits in ((4e-3, 2.0), (8e-3, 1.0), (16e-3, 2.0)):
            have[plan.annealed(runs.Run(arm, "tiny", 5, plan.SEARCHED, lr), 320.0)] = measured_as(bits)
    return have


def test_what_is_pending() -> None:
    """Searches first; an arm whose search has ended is run meanwhile, seed by seed; nothing that is there again."""
    asked = wanted(domains=["b"], tokens=[480.0, 960.0])
    have = searched("adamw")
    ahead = plan.pending(asked, have, NAMES)
    assert [(run.arm, run.seed) for run in ahead] == [("unit", 100), ("adamw", 0), ("adamw", 1)]
    points = ahead[runs.Run("adamw", "tiny", 5, 0, 8e-3)]
    assert [point[5:] for point in points] == [
        (480, "", 0), (480, "mixture", 160), (480, "b", 160), (960, "", 0), (960, "mixture", 160), (960, "b", 160),
    ]  # fmt: skip
    have |= {point: measured_as(1.0) for point in points[:4]}
    ahead = plan.pending(asked, have, NAMES)
    assert ahead[runs.Run("adamw", "tiny", 5, 0, 8e-3)] == points[4:]
    have |= {point: measured_as(1.0) for point in points}
    assert runs.Run("adamw", "tiny", 5, 0, 8e-3) not in plan.pending(asked, have, NAMES)
    assert plan.work(runs.Run("adamw", "tiny", 5, 0, 8e-3), points) == 6 * runs.parameters("tiny") * (960 + 4 * 160)


# The file


SETTINGS = {"dtype": "float32", "search": {"tokens": 320.0, "seed": 100}}
STAMP = {"commit": "abc", "processor": "a processor"}


def line(bits: float = 1.0) -> dict:
    return {**measured_as(bits), "alignment": None, "weights": "00", "seconds": 0.1, **STAMP}


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path, points = tmp_path / "deep" / "study.jsonl", [runs.Point(*RUN, n) for n in (1, 2, 3)]
    with results.Results(path, SETTINGS) as file:
        file.add(points[0], line())
        with pytest.raises(StudyError, match="another study is writing"):
            results.Results(path, SETTINGS)
    with results.Results(path, SETTINGS) as file:
        assert file.measured == {points[0]: line()}
        file.add(points[1], line(2.0))
    before = path.read_bytes()
    path.write_bytes(before + b'{"arm": "nex')  # power cut
    assert set(results.read(path)[1]) == set(points[:2])
    with results.Results(path, SETTINGS) as file:
        assert file.cut_off == 12
        assert path.read_bytes() == before
        file.add(points[2], line())
    assert results.read(path) == (SETTINGS, {point: line(1.0 + (point == points[1])) for point in points})


def test_files_that_are_refused(tmp_path: Path) -> None:
    path, point = tmp_path / "study.jsonl", runs.Point(*RUN, 1)
    with results.Results(path, SETTINGS) as file:
        file.add(point, line())
    head, row = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        (b"{}\n" + row, "line 1 of .* is not the head of a study"),
        (b"hello\n", "line 1 of .* is not the head"),
        (head + row[:-5] + b"\n" + row, "line 2 of .* is damaged"),
        (head + b"[]\n", "line 2 of .* is damaged"),
        (head + row.replace(b'"seed"', b'"sead"'), "line 2 of .* is damaged"),
        (head + row.replace(b'"weights"', b'"w"'), "line 2 of .* is damaged"),
        (head + row + row, "line 3 of .* measures again"),
    ):
        path.write_bytes(content)
        with pytest.raises(StudyError, match=message):
            results.Results(path, SETTINGS)
        assert path.read_bytes() == content
    path.write_bytes(head + row)
    for other, message in (
        ({**SETTINGS, "dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' here"),
        ({**SETTINGS, "search": {"tokens": 320.0, "seed": 7}}, "search.seed is 100 there and 7 here"),
        ({"dtype": "float32"}, "search is"),
    ):
        with pytest.raises(StudyError, match=message):
            results.Results(path, other)
    assert path.read_bytes() == head + row


# The command line


def main(*arguments: object) -> int:
    return __main__.main([str(argument) for argument in arguments])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"sha256": "0", "python": "3", "cap_mb": 6.0}
    monkeypatch.setattr(__main__, "load", lambda *_: (*texts(), manifest))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "adamw", "sgd"], "no arm 'sgd'"),
        (["--sizes", "7B"], "no size '7B'"),
        (["--domains", "code"], "no domain 'code'"),
        (["--inner-steps", "4"], "multiple of the domains"),
        (["--inner-steps", "15"], "multiple of the domains"),
        (["--tokens", "1", "-1"], "--tokens"),
        (["--seeds", "0"], "--seeds"),
        (["--search-tokens", "0"], "--search-tokens"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:  # fmt: skip
    assert main("run", tmp_path / "study.jsonl", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("report", tmp_path / "none.jsonl") == 1
    assert "No such file" in capsys.readouterr().err
    with results.Results(tmp_path / "study.jsonl", SETTINGS):
        pass
    assert main("report", tmp_path / "study.jsonl") == 1
    assert "no finished run" in capsys.readouterr().err


PROGRAM = """
import sys
sys.path[:0] = ["", "tests"]
import test_study
from bench.study import __main__, pool, runs
runs.SIZES["tiny"] = test_study.TINY
if __name__ == "__main__":
    __main__.load = lambda *_: (*test_study.texts(), {"sha256": "0", "python": "3", "cap_mb": 6.0})
    sys.exit(__main__.main(sys.argv[1:]))
"""


def test_stopped_anywhere_and_gone_on_with(tmp_path: Path) -> None:
    """Ctrl-C and the end of the time lose no measurement and repeat none, and all are what an unbroken study finds."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--arms", "adamw", "nexus:0.2", "--sizes", "tiny", "--seeds", "2", "--tokens", "0.003", "0.006"]
    options += ["--search-tokens", "0.002", "--domains", "b", "--domain-tokens", "0.001", "--workers", "2"]

    def start(file: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(program), "run", str(tmp_path / file), *options, *more]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    unbroken = start("unbroken.jsonl")
    broken, path = start("broken.jsonl"), tmp_path / "broken.jsonl"
    until = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 4):
        assert broken.poll() is None, broken.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    broken.send_signal(signal.SIGINT)
    _, errors = broken.communicate(timeout=60)
    assert broken.returncode == 130
    assert "Traceback" not in errors
    assert "the same command goes on" in errors
    kept = results.read(path)[1]
    assert len(kept) >= 4

    timed = start("broken.jsonl", "--minutes", "0.0001")
    said, _ = timed.communicate(timeout=60)
    assert timed.returncode == 0
    assert "The time is over" in said
    last = start("broken.jsonl")
    said, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert f"has {len(results.read(path)[1])} measurements." in said
    _, errors = unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0, errors
    again, whole = results.read(path)[1], results.read(tmp_path / "unbroken.jsonl")[1]
    assert {p: comparable(m) for p, m in again.items()} == {p: comparable(m) for p, m in whole.items()}
    assert all(again[point] == kept[point] for point in kept)
    idle = start("broken.jsonl")
    assert "0 runs are ahead" in idle.communicate(timeout=60)[0]

    assert main("report", path, "--pictures", tmp_path / "pictures", "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["runs"] == 4
    assert {row["seeds"] for row in found["arms"]} == {2}
    assert {(row["arm"], row["other"]) for row in found["differences"]} == {("nexus:0.2", "adamw")}
    assert "3 sizes" in found["law"]["missing"]["adamw on b"]
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {"study_loss.svg", "study_differences.svg", "study_specialized.svg"}


# Figures


def study_of(values: dict[tuple[str, int], tuple[float, float]], **changes) -> figures.Study:
    """A study with bits (trained, unseen) by arm and seed."""
    have = searched(*{arm for arm, _ in values})
    for (arm, seed), (trained, unseen) in values.items():
        run = runs.Run(arm, "tiny", 5, seed, 8e-3)
        trunk = {**line(trained), "bits": dict.fromkeys(NAMES, trained), "alignment": 0.5}
        mixed = {**line(trained), **changes.get(f"{arm} {seed}", {})}
        mixed["bits"] = {**mixed["bits"], "x": unseen, "y": unseen}
        have |= {runs.Point(*run, 480): trunk, plan.annealed(run, 480.0): mixed}
    return figures.Study(SETTINGS, have)


def test_differences_are_taken_seed_by_seed() -> None:
    values = {("adamw", s): (2.0 + s, 3.0 + s) for s in range(4)}
    values |= {("unit", s): (1.9 + s, 3.0 + s) for s in range(4)}
    values |= {("nexus:0.2", s): (1.8 + s + 0.01 * s, 3.1 + s - 0.1 * s) for s in range(3)}
    study = study_of(values)
    assert (study.trained, study.unseen) == ([*NAMES], ["x", "y"])
    rows = {(row["arm"], row["other"]): row for row in figures.differences(study)}
    assert set(rows) == {("unit", "adamw"), ("nexus:0.2", "unit"), ("nexus:0.2", "adamw")}
    row = rows["nexus:0.2", "unit"]
    assert row["seeds"] == 3
    assert row["trained"] == {
        "mean": -0.09, "standard_error": round(0.01 / 3**0.5, 5), "by_seed": [-0.1, -0.09, -0.08], "certain": True,
    }  # fmt: skip
    assert row["unseen"]["certain"] is False
    assert rows["unit", "adamw"]["trained"]["mean"] == -0.1
    means = {row["arm"]: row for row in figures.means(study)}
    assert means["adamw"]["trained"]["mean"] == 3.5
    assert means["adamw"]["lr"] == 8e-3
    assert means["unit"]["alignment"]["mean"] == 0.5


def test_diverged_runs_are_counted_and_left_out() -> None:
    values = {(arm, s): (2.0, 3.0) for arm in ("adamw", "unit") for s in range(2)}
    study = study_of(values, **{"unit 1": {"diverged": True}})
    (row,) = figures.differences(study)
    assert row["seeds"] == 1
    assert row["trained"]["standard_error"] is None
    assert [point.seed for point in study.diverged] == [1]


# The law


def surface(form: law.Form, p: np.ndarray, noise: float = 0.0) -> figures.Rows:
    rng = np.random.default_rng(0)
    rows = [
        (
            n,
            d,
            s,
            form.predict(p, np.array(n), np.array(d), np.array(s)) * math.exp(noise * rng.standard_normal()),
            seed,
        )
        for n in (0.1, 0.2, 0.4, 0.8)
        for d in (0.5, 1.0, 2.0, 4.0)
        for s in (0.05, 0.15, 0.4)
        for seed in range(2)
    ]
    return np.array(rows, dtype=float)


TRUE = {
    "additive": [1.0, 0.3, 0.3, 0.8, 0.4, 0.2],
    "multiplicative": [1.0, 0.3, 0.3, 0.5, 0.3, 0.15],
    "transfer gap": [1.0, 0.3, 0.3, 0.6, 0.4, 0.2, 0.1, 0.4],
}


@pytest.mark.parametrize("form", law.FORMS, ids=lambda form: form.name)
def test_a_form_is_found_again(form: law.Form) -> None:
    """From values with a tenth of a percent of noise, its own predictions come back within that, also beyond."""
    table = surface(form, np.array(TRUE[form.name]), 1e-3)
    out = figures.held_out(table)
    assert out.sum() == 2 * 3 * (4 + 3)
    p = law.fit(form, *table[~out, :4].T)
    assert law.relative_error(form, p, *table[~out, :4].T) < 1.5e-3
    assert law.relative_error(form, p, *table[out, :4].T) < 6e-3
    assert np.array_equal(p, law.fit(form, *table[~out, :4].T))
    near = law.fit(form, *figures.resampled(table[~out], np.random.default_rng(0))[:, :4].T, start=p)
    assert law.relative_error(form, near, *table[:, :4].T) < 1e-2


def test_what_a_law_lacks() -> None:
    table = surface(law.FORMS[0], np.array(TRUE["additive"]))
    assert figures.missing(table) == ""
    assert "3 sizes, where there are 2 (0.1M, 0.2M)" in figures.missing(table[table[:, 0] < 0.3])
    assert "amounts of D′" in figures.missing(table[table[:, 2] > 0.3])
    assert "none" in figures.missing(table[:0])
    lacking = table[~((table[:, 0] == 0.2) & (table[:, 1] == 1.0) & (table[:, 2] == 0.05))]
    assert figures.missing(lacking) == "N = 0.2M, D = 1M, D′ = 0.05M"
    beyond = table[~((table[:, 0] == 0.8) & (table[:, 1] == 1.0))]  # what is held out may be incomplete
    assert figures.missing(beyond) == ""


def test_the_best_split_of_a_budget() -> None:
    """Against what calculus says of a loss whose optimum is known: D^-1 + M·D′^-1 at D = D′ for M domains of weight 1.

    With d + M·s = T and loss 1/d + M/s the derivatives are equal where d² = s², so d = s = T/(1 + M).
    """

    def losses(n, d, s):
        return 1 / d + 3 / s + 0.1 / n

    best = law.best_split(losses, 6 * 0.5 * 8.0, 3, (0.5,))
    assert best["d"] == pytest.approx(best["d_prime"], rel=0.03)
    assert best["d"] + 3 * best["d_prime"] == pytest.approx(8.0)
    assert best["share"] == pytest.approx(0.75, abs=0.006)
    assert best["n"] == 0.5
    assert law.best_split(lambda n, d, s: 10 / n + 1 / d + 1 / s, 24.0, 2, (0.5, 1.0))["n"] == 1.0


# The page


def test_tables_of_a_page(tmp_path: Path) -> None:
    """What the page says around the tables stays, and a second time changes nothing."""
    values = {("adamw", s): (2.0 + s, 3.0 + s) for s in range(3)} | {("unit", s): (1.9 + s, 3.0 + s) for s in range(3)}
    values |= {("nexus:0.2", s): (1.8 + s + 0.01 * s, 3.1 + s - 0.1 * s) for s in range(3)}
    study = study_of(values)
    found = figures.figures(study, figures.Laws(study))
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n<!-- study: differences -->\nold\n<!-- end -->\n\ntext\n<!-- study: runs -->\n<!-- end -->\n"
    )
    report.insert(found, page)
    made = page.read_text()
    (row,) = (line for line in made.splitlines() if "γ = 0.2" in line)
    assert [cell.strip() for cell in row.split("|")[5:-1]] == [
        "Nexus, γ = 0.2", "3", "**−0.190 ± 0.006**", "**−0.090 ± 0.006**", "+0.000 ± 0.058", "+0.000 ± 0.058",
    ]  # fmt: skip
    assert made.startswith("# Title\n\n<!-- study: differences -->\n| N ")
    assert "18 measurements of 9 runs, of which 0 diverged. Commits: abc. Machines: a processor." in made
    assert "old" not in made
    report.insert(found, page)
    assert page.read_text() == made
    page.write_text("<!-- study: nothing -->\n<!-- end -->\n")
    with pytest.raises(StudyError, match="asks for 'nothing'"):
        report.insert(found, page)
