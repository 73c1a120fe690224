"""bench.study on tiny synthetic text: what a run is, that a study can stop anywhere, its file, its figures, its law."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("threadpoolctl")
pytest.importorskip("matplotlib")

import numpy as np

from bench.study import StudyError, __main__, arms, figures, law, plan, plots, report, results, runs
from nexus_fused import NexusAdamW
from nexus_fused.demo import data
from nexus_fused.demo.model import ByteTransformer

ROOT = Path(__file__).parent.parent
TINY = runs.Size(dim=16, layers=1, heads=2, context=16, windows=10)
NAMES = ("a", "b", "c", "d", "e")
SEARCH = plan.HowToSearch([100, 101, 102], 8e-3, 320.0)


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
        ("nexus:0.001", (False, 1e-3)),
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


@pytest.mark.parametrize("arm", ["adamw", "unit", "nexus:0.2", "muon", "muon+nexus:0.2"])
def test_a_run_repeats_bit_for_bit_whatever_is_measured_on_the_way(arm: str) -> None:
    """Branches leave the run as it is, and a resumed study takes other points than the first one did."""
    run = RUN._replace(arm=arm)
    whole = [
        runs.Point(*run, CYCLE * 3),
        runs.Point(*run, CYCLE * 3, "mixture", CYCLE * 2),
        runs.Point(*run, CYCLE * 3, "b", CYCLE),
        runs.Point(*run, CYCLE * 7),
        runs.Point(*run, CYCLE * 7, "b", CYCLE * 2),
    ]
    everything = perform(run, whole)
    assert set(everything) == set(whole)
    assert len({m["weights"] for m in everything.values()}) == len(whole)
    for part in (whole[3:], whole[4:], whole[1:2], whole[::2]):
        for point, measured in perform(run, part).items():
            assert comparable(measured) == comparable(everything[point])


def test_what_is_evaluated() -> None:
    trunk, mixed, special = (runs.Point(*RUN, CYCLE, *rest) for rest in ((), ("mixture", CYCLE), ("b", CYCLE)))
    found = perform(RUN, [trunk, mixed, special])
    assert sorted(found[trunk]["bits"]) == [*NAMES]
    assert sorted(found[mixed]["bits"]) == [*NAMES, "x"]
    assert sorted(found[special]["bits"]) == ["b"]


@pytest.mark.parametrize("arm", ["adamw", "nexus:0.2"])
def test_the_learning_rate_rises_stays_and_falls(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run and in a branch; AdamW takes one step in a cycle, Nexus K."""
    monkeypatch.setattr(runs, "WARM_UP", 3)
    run = RUN._replace(arm=arm)
    seen: list[float] = []
    optimizer = torch.optim.AdamW if arm == "adamw" else NexusAdamW
    step = optimizer.step

    def recorded(self, *arguments):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(optimizer, "step", recorded)
    perform(run, [runs.Point(*run, CYCLE * 5, "mixture", CYCLE * 4)])
    rates = [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 0.8e-2, 0.6e-2, 0.4e-2, 0.2e-2]
    each = 1 if arm == "adamw" else 5
    assert seen == pytest.approx([rate for rate in rates for _ in range(each)])


def test_bfloat16() -> None:
    """The forward pass alone is in it: it differs from float32 by its rounding."""
    points = [runs.Point(*RUN, CYCLE * 2)]
    (plain,) = perform(RUN, points).values()
    ((_, low),) = runs.perform(RUN, points, *texts(), "cpu", "bfloat16", lambda: None)
    assert low["bits"] != plain["bits"]
    assert low["bits"]["a"] == pytest.approx(plain["bits"]["a"], rel=2e-2)


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
    of |= {"domains": [], "domain_tokens": [160.0], "search": SEARCH}
    return plan.Wanted(**{**of, **changes})


def measured_as(bits: float) -> dict:
    return {"diverged": False, "bits": dict.fromkeys((*NAMES, "x", "y"), bits)}


def end_search(bits, at_a_time: int) -> tuple[plan.Search, dict]:
    """Measure what a search asks for, so many at a time, always the last ones that it names, until it ends."""
    run, have = runs.Run("adamw", "tiny", 5, 0, 1.0), {}
    for _ in range(200):
        found = plan.search(have, run, SEARCH, NAMES)
        if found.best is not None:
            return found, have
        have |= {p: bits(p.lr, p.seed) for p in found.missing[-at_a_time:]}
    raise AssertionError


@pytest.mark.parametrize("best", [2e-3, 8e-3, 64e-3])
def test_a_search_ends_between_worse_neighbors(best: float) -> None:
    found, have = end_search(lambda lr, seed: measured_as(abs(math.log2(lr / best))), 1)
    assert found.best == best
    tried = {point.lr for point in have}
    assert {best / 2, best, best * 2} <= tried
    assert {lr: found.bits[lr] for lr in (best / 2, best, best * 2)} == {best / 2: 1.0, best: 0.0, best * 2: 1.0}
    assert len(tried) <= 6
    assert len(have) == 3 * len(tried)


def test_a_search_ends_alike_whatever_comes_first() -> None:
    """Where there are two valleys: in the deeper one of those beside the start."""
    bits = {2e-3: 2.75, 4e-3: 2.69, 8e-3: 2.70, 16e-3: 2.695, 32e-3: 2.72}

    ends = {end_search(lambda lr, seed: measured_as(bits[lr]), n)[0].best for n in range(1, 10)}
    assert ends == {4e-3}


def test_a_search_leaves_what_diverges() -> None:
    found, _ = end_search(lambda lr, seed: {**measured_as(1.0), "diverged": lr > 1e-3 and seed == 101}, 9)
    assert found.best == 1e-3
    assert found.bits[2e-3] == math.inf


def test_an_arm_that_always_diverges_is_left_out() -> None:
    """What it was asked for is no longer pending, the others go on, and the report says so."""
    have = searched("adamw")
    for _ in range(200):
        ahead, _ = plan.pending(wanted(), have, NAMES)
        trials = [point for run, points in ahead.items() if run.arm == "unit" for point in points]
        if not trials:
            break
        have |= {point: line(9.0) | {"diverged": True} for point in trials}
    asked = wanted()
    ahead, later = plan.pending(asked, have, NAMES)
    assert {run.arm for run in ahead} == {"adamw"}
    assert not later
    assert [run.arm for run in plan.hopeless(asked, have, NAMES)] == ["unit"]
    run = runs.Run("adamw", "tiny", 5, 0, 8e-3)
    trunk = {**line(2.0), "bits": dict.fromkeys(NAMES, 2.0)}
    study = figures.Study(SETTINGS, have | {runs.Point(*run, 480): trunk, plan.annealed(run, 480.0): line(2.0)})
    assert study.left_out() == ["unit gradients at tiny with K = 5 diverged at every learning rate."]
    assert "diverged at every" in report.sections(figures.figures(study, figures.Laws(study)))["runs"]


def test_measurements_that_wait_for_a_search_are_named() -> None:
    have = searched("adamw", "unit")
    for arm in ("adamw", "unit"):
        run = runs.Run(arm, "tiny", 5, 0, 8e-3)
        have |= {
            runs.Point(*run, 480): {**line(2.0), "bits": dict.fromkeys(NAMES, 2.0)},
            plan.annealed(run, 480.0): line(),
        }
    del have[plan.trials(run, 16e-3, SEARCH)[0]]
    study = figures.Study(SETTINGS, have)
    assert {p.arm for p in study.measured} == {"adamw"}
    assert study.left_out() == [
        "2 measurements of unit gradients at tiny with K = 5 are left out until its search has ended."
    ]


def searched(*names: str) -> dict[runs.Point, dict]:
    """A search that ended at 8e-3, for each arm."""
    have = {}
    for arm in names:
        for lr, bits in ((4e-3, 2.0), (8e-3, 1.0), (16e-3, 2.0)):
            have |= {point: line(bits) for point in plan.trials(runs.Run(arm, "tiny", 5, 0, 1.0), lr, SEARCH)}
    return have


def test_what_is_pending() -> None:
    """Searches first; an arm whose search has ended is run meanwhile, seed by seed; nothing that is there again."""
    asked = wanted(domains=["b"], tokens=[480.0, 960.0])
    have = searched("adamw")
    ahead, later = plan.pending(asked, have, NAMES)
    trials = [("unit", seed) for _ in range(3) for seed in SEARCH.seeds]
    assert [(run.arm, run.seed) for run in ahead] == [*trials, ("adamw", 0), ("adamw", 1)]
    assert [(run.arm, run.seed) for run in later] == [("unit", 0), ("unit", 1)]
    assert {len(points) for points in later.values()} == {6}
    points = ahead[runs.Run("adamw", "tiny", 5, 0, 8e-3)]
    assert [point[5:] for point in points] == [
        (480, "", 0), (480, "mixture", 160), (480, "b", 160), (960, "", 0), (960, "mixture", 160), (960, "b", 160),
    ]  # fmt: skip
    have |= {point: line() for point in points[:4]}
    ahead, _ = plan.pending(asked, have, NAMES)
    assert ahead[runs.Run("adamw", "tiny", 5, 0, 8e-3)] == points[4:]
    have |= {point: line() for point in points}
    assert runs.Run("adamw", "tiny", 5, 0, 8e-3) not in plan.pending(asked, have, NAMES)[0]
    jobs = {runs.Run("adamw", "tiny", 5, 0, 8e-3): points}
    assert plan.work(jobs) == 6 * runs.parameters("tiny") * (960 + 4 * 160)


def test_amounts_that_come_to_the_same_cycles_are_one_point() -> None:
    asked = wanted(tokens=[480.0, 500.0, 480.0], domains=["b", "b"], domain_tokens=[160.0, 170.0])
    points = plan.points_of(asked, RUN)
    assert [point[5:] for point in points] == [(480, "", 0), (480, "mixture", 160), (480, "b", 160)]


# The file


SETTINGS = {"version": 1, "dtype": "float32", "search": SEARCH._asdict()}
STAMP = {"commit": "abc", "torch": "2", "processor": "a processor"}


def line(bits: float = 1.0) -> dict:
    return {**measured_as(bits), "alignment": None, "weights": "00", "seconds": 0.1, **STAMP, "shape": TINY.shape}


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
    assert results.read(path)[2] == 12
    with results.Results(path, SETTINGS) as file:
        assert file.cut_off == 12
        assert path.read_bytes() == before
        file.add(points[2], line())
    assert results.read(path) == (SETTINGS, {point: line(1.0 + (point == points[1])) for point in points}, 0)


def test_a_head_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    for cut in (0, 1, 20):
        path.write_bytes(json.dumps({"settings": SETTINGS}).encode()[:cut])
        with results.Results(path, SETTINGS) as file:
            assert file.cut_off == cut
        assert results.read(path) == (SETTINGS, {}, 0)


def test_a_line_that_the_disk_takes_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, points = tmp_path / "study.jsonl", [runs.Point(*RUN, n) for n in (1, 2)]
    with results.Results(path, SETTINGS) as file:
        before = path.read_bytes()
        write = os.write
        with monkeypatch.context() as patch:
            patch.setattr(results.os, "write", lambda descriptor, content: write(descriptor, content[:30]))
            with pytest.raises(OSError, match="No space left"):
                file.add(points[0], line())
        assert path.read_bytes() == before
        file.add(points[1], line())
    assert set(results.read(path)[1]) == {points[1]}


def test_files_that_are_refused(tmp_path: Path) -> None:
    path, point = tmp_path / "study.jsonl", runs.Point(*RUN, 1)
    with results.Results(path, SETTINGS) as file:
        file.add(point, line())
    head, row = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        (b"{}\n" + row, "line 1 of .* is not the head of a study"),
        (b"hello\n", "line 1 of .* is not the head"),
        (b'{"settings": {}}\n', "line 1 of .* is not the head"),
        (b'{"settings": 3}\n', "line 1 of .* is not the head"),
        (head.replace(b'"version": 1', b'"version": 7'), "line 1 of .* is not the head"),
        (head.replace(b'"start"', b'"begin"'), "line 1 of .* is not the head"),
        (head + row[:-5] + b"\n" + row, "line 2 of .* is damaged"),
        (head + b"[]\n", "line 2 of .* is damaged"),
        (head + row.replace(b'"seed"', b'"sead"'), "line 2 of .* is damaged"),
        (head + row.replace(b'"weights"', b'"w"'), "line 2 of .* is damaged"),
        (head + row.replace(b'"nexus:0.2"', b'["nexus:0.2"]'), "line 2 of .* is damaged"),
        (head + row.replace(b'"a": 1.0', b'"a": "1"'), "line 2 of .* is damaged"),
        (head + row.replace(b'"decay_tokens": 0', b'"decay_tokens": "0"'), "line 2 of .* is damaged"),
        (head + row.replace(b'"tiny"', b'"7B"'), "line 2 of .*: size 7B is .*, unknown here"),
        (head + row.replace(b"[16, 1", b"[32, 1"), "line 2 of .*: size tiny is .32, 1, 2, 16, 10. there, .16, 1"),
        (head + row + row, "line 3 of .* measures again"),
    ):
        path.write_bytes(content)
        with pytest.raises(StudyError, match=message):
            results.Results(path, SETTINGS)
        assert path.read_bytes() == content
    path.write_bytes(head + row)
    for other, message in (
        ({**SETTINGS, "dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' here"),
        ({**SETTINGS, "search": SEARCH._replace(seeds=[7])._asdict()}, r"search.seeds is .* there and \[7\] here"),
        ({"dtype": "float32"}, "search is"),
    ):
        with pytest.raises(StudyError, match=message):
            results.Results(path, other)
    assert path.read_bytes() == head + row


# The command line


def main(*arguments: object) -> int:
    return __main__.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "adamw", "sgd"], "no arm 'sgd'"),
        (["--sizes", "7B"], "no size '7B'"),
        (["--domains", "poems"], "no domain 'poems'"),
        (["--inner-steps", "4"], "multiple of the domains"),
        (["--inner-steps", "15"], "multiple of the domains"),
        (["--tokens", "1", "-1"], "--tokens"),
        (["--seeds", "0"], "--seeds"),
        (["--search-tokens", "0"], "--search-tokens"),
        (["--device", "gpu"], "cpu and cuda can"),
        (["--arms", "nexus:0.20"], "write nexus:0.2 for"),
        (["--search-from", "0"], "--search-from"),
        (["--search-from", "16"], "to 8."),
        (["--search-seeds", "0"], "--search-seeds"),
        (["--seeds", "101"], "100 at most"),
        (["--tokens", "nan"], "--tokens"),
        (["--minutes", "inf"], "--minutes"),
        (["--cap-mb", "-1"], "--cap-mb"),
        (["--sizes", "100M"], "hardly more than the warm-up; take 2.4576 or more"),
        (["--search-tokens", "0.01"], "hardly more than the warm-up; take 0.2048 or more"),
        (["--device", "meta"], "--device meta"),
    ],
)
def test_wrong_usage(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    """Before anything is downloaded or written."""
    monkeypatch.delattr(__main__, "load")
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
from bench.study import __main__, plan, pool, runs
runs.SIZES["tiny"] = test_study.TINY
runs.WARM_UP = __main__.WARM_UP = 2
__main__.TRAINING = dict.fromkeys(test_study.NAMES)
if __name__ == "__main__":
    __main__.load = lambda *_: (*test_study.texts(), {"sha256": "0", "python": "3", "cap_mb": 6.0})
    sys.exit(__main__.main(sys.argv[1:]))
"""


def test_stopped_anywhere_and_gone_on_with(tmp_path: Path) -> None:
    """Ctrl-C and the end of the time lose no measurement and repeat none, and all are what an unbroken study finds."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--arms", "adamw", "nexus:0.2", "--sizes", "tiny", "--seeds", "2", "--tokens", "0.003", "0.006"]
    options += ["--search-tokens", "0.002", "--domains", "b", "--domain-tokens", "0.001"]

    def start(file: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(program), "run", str(tmp_path / file), *options, "--workers", "1", *more]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def stopped(file: str, lines: int, how: signal.Signals) -> dict:
        """Start, and stop the whole process group, as a terminal does, once the file has so many lines more."""
        path, until = tmp_path / file, time.monotonic() + 120
        study = start(file)
        lines += path.read_bytes().count(b"\n") if path.exists() else 0
        while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            assert study.poll() is None, study.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        if how == signal.SIGINT:
            os.killpg(study.pid, how)
        else:
            study.kill()  # its workers notice
        _, errors = study.communicate(timeout=60)
        if how == signal.SIGINT:
            assert study.returncode == 130, errors
            assert "the same command goes on" in errors
        assert "Traceback" not in errors
        return results.read(path)[1]

    unbroken = start("unbroken.jsonl", "--workers", "2")
    path = tmp_path / "broken.jsonl"
    stopped("broken.jsonl", 1, signal.SIGINT)  # its head alone: while the workers start
    kept = stopped("broken.jsonl", 4, signal.SIGINT)
    assert len(kept) >= 4
    kept = stopped("broken.jsonl", 4, signal.SIGKILL)
    assert len(kept) >= 8
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
    assert "4 sizes" in found["law"]["missing"]["AdamW on b"]
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
    near = law.fit(form, *figures.resampled(table[~out], [1.0, 1.0])[:, :4].T, start=p)
    assert law.relative_error(form, near, *table[:, :4].T) < 1e-2


def test_what_a_law_lacks() -> None:
    table = surface(law.FORMS[0], np.array(TRUE["additive"]))
    assert figures.missing(table) == ""
    assert "4 sizes: there are 2 (0.1M, 0.2M)" in figures.missing(table[table[:, 0] < 0.3])
    assert "3 amounts of D′" in figures.missing(table[table[:, 2] > 0.1])
    assert "none" in figures.missing(table[:0])
    lacking = table[~((table[:, 0] == 0.2) & (table[:, 1] == 1.0) & (table[:, 2] == 0.05))]
    assert figures.missing(lacking) == "N = 0.2M, D = 1M, D′ = 0.05M"
    beyond = table[~((table[:, 0] == 0.8) & (table[:, 1] == 1.0))]  # what is held out may be incomplete
    assert figures.missing(beyond) == ""


@pytest.fixture
def split_study(monkeypatch: pytest.MonkeyPatch) -> figures.Study:
    """Four sizes, five seeds, three arms, two K, two domains: bits of the transfer gap, Nexus' a twentieth lower."""
    monkeypatch.setattr(figures, "RESAMPLED", 4)
    truth, rng = np.array(TRUE["transfer gap"]), np.random.default_rng(0)
    have: dict[runs.Point, dict] = {}
    for i, size in enumerate(("s1", "s2", "s3", "s4")):
        monkeypatch.setitem(runs.SIZES, size, runs.Size(dim=96 * 2**i, layers=1, heads=4, context=16, windows=10))
        n = runs.parameters(size) / 1e6
        for arm, inner_steps in (("adamw", 5), ("nexus:0.2", 5), ("unit", 5), ("nexus:0.2", 10), ("unit", 10)):
            start = runs.Run(arm, size, inner_steps, 0, 8e-3)
            shape = {"shape": runs.SIZES[size].shape}
            for lr, bits in ((4e-3, 2.0), (8e-3, 1.0), (16e-3, 2.0)):
                have |= {point: line(bits) | shape for point in plan.trials(start, lr, SEARCH)}
            for seed in range(5):
                run = start._replace(seed=seed)
                for tokens in (500_000, 1_000_000, 2_000_000, 4_000_000):
                    bits = (1.9 if arm == "nexus:0.2" else 2.0) + 1e-3 * rng.standard_normal()
                    trunk = runs.Point(*run, plan.whole(size, tokens))
                    have[trunk] = {**line(bits), "bits": dict.fromkeys(NAMES, bits), "alignment": 0.25}
                    have[plan.annealed(run, tokens)] = line(bits)
                    for decay in (50_000, 150_000, 400_000) if arm != "unit" and inner_steps == 5 else ():
                        of = [np.array(x) for x in (n, tokens / 1e6, decay / 1e6)]
                        bits = float(law.transfer_gap(truth, *of)) * (0.95 if arm == "nexus:0.2" else 1.0)
                        bits *= math.exp(1e-3 * rng.standard_normal())
                        for domain in ("a", "b"):
                            point = runs.Point(*run, plan.whole(size, tokens), domain, plan.whole(size, decay))
                            have[point] = {**line(), "bits": {domain: bits}}
    return figures.Study(SETTINGS, have)


def test_a_whole_study(split_study: figures.Study, tmp_path: Path) -> None:
    """Everything that a report has, of a study whose answers are known."""
    laws = figures.Laws(split_study)
    found = figures.figures(split_study, laws)
    json.dumps(found, allow_nan=False)
    assert (found["law"]["form"], found["law"]["missing"]) == ("transfer gap", {})
    assert [(row["arm"], row["domain"]) for row in found["law"]["fits"][::3]] == [
        ("adamw", "a"), ("adamw", "b"), ("nexus:0.2", "a"), ("nexus:0.2", "b"),
    ]  # fmt: skip
    for row in found["law"]["fits"]:
        assert row["measurements_within"] == 5 * 3 * 3 * 3
        assert row["measurements_held_out"] == 5 * 3 * (4 + 3)
        if row["form"] == "transfer gap":
            assert row["error_within"] < 1e-3
            assert row["error_held_out"] < 1e-2
    splits = found["law"]["splits"]
    assert [(row["arm"], row["domains"]) for row in splits[:4]] == [
        ("adamw", 2), ("nexus:0.2", 2), ("adamw", 5), ("nexus:0.2", 5),
    ]  # fmt: skip
    for adamw, nexus in zip(splits[::2], splits[1::2], strict=True):
        low, high = adamw["share_interval"]
        assert low - 0.02 <= adamw["share"] <= high + 0.02
        assert adamw["less_first"] is None
        assert nexus["share"] == pytest.approx(adamw["share"], abs=0.06)  # all losses are lower by the same factor
        assert nexus["loss"] / adamw["loss"] == pytest.approx(0.95, abs=0.01)
        low, high = nexus["less_first_interval"]
        assert low <= 0.05
        assert high >= -0.05
    row = next(r for r in found["specialized"] if (r["arm"], r["other"]) == ("nexus:0.2", "adamw"))
    assert row["seeds"] == 5
    assert row["difference"]["mean"] < -0.05
    drawn = plots.draw(found, laws, tmp_path)
    assert [path.name for path in drawn] == [
        f"study_{name}.svg" for name in ("loss", "differences", "gamma", "specialized", "law")
    ]
    first = [path.read_bytes() for path in drawn]
    assert all(content.startswith(b"<?xml") for content in first)
    assert [path.read_bytes() for path in plots.draw(found, laws, tmp_path)] == first
    made = report.sections(found)
    assert "**−0.10" in made["differences"]
    assert "transfer gap (chosen)" in made["law"]
    assert made["splits"].count("TFLOP") == 2 * 3 * 2
    assert made["splits"].count("(beyond)") == sum(sum(row["beyond"].values()) for row in splits)


def two_k(measured: dict[runs.Point, dict]) -> dict[runs.Point, dict]:
    """The same of one seed, at another K."""
    return {p._replace(inner_steps=5): m for p, m in measured.items() if p.seed != 1}


def test_pictures_of_less(tmp_path: Path) -> None:
    """Of another K alone, and of sizes without a common D, what can be drawn is drawn."""
    names = ("adamw", "unit", "nexus:0.2")
    study = study_of({(arm, s): (2.0, 3.0) for arm in names for s in range(2)})
    only = {p._replace(inner_steps=10): m for p, m in {**study.measured, **searched(*names)}.items()}
    study = figures.Study(SETTINGS, only)
    laws = figures.Laws(study)
    found = figures.figures(study, laws)
    assert [path.name for path in plots.draw(found, laws, tmp_path)] == ["study_loss.svg", "study_differences.svg"]
    one = figures.Study(SETTINGS, {p: m for p, m in only.items() if p.seed != 1} | two_k(only))
    assert plots.draw(figures.figures(one, figures.Laws(one)), laws, tmp_path / "one") == []
    for row, size, tokens in zip(found["differences"], ("0.1M", "0.1M", "0.2M"), (1, 1, 2), strict=True):
        row |= {
            "size": size,
            "tokens": tokens,
            "parameters": runs.parameters(size),
            "arm": "nexus:0.2",
            "other": "unit",
        }
    assert plots.draw(found, laws, tmp_path)


def test_what_lies_beyond_what_was_measured() -> None:
    """A D of the smaller sizes alone is beyond between the others, and so is a D′ below the smallest."""
    table = surface(law.FORMS[0], np.array(TRUE["additive"]))
    table = table[(table[:, 0] < 0.3) | (table[:, 1] < 3)]
    inside = {"n": 0.3, "d": 1.5, "d_prime": 0.1}
    assert not any(figures.beyond(inside, table).values())
    for change in ({"d": 3.0}, {"d": 0.4}, {"d_prime": 0.01}, {"d_prime": 0.5}, {"n": 0.1}, {"n": 0.8}):
        assert [name for name, out in figures.beyond(inside | change, table).items() if out] == [*change]
    assert not figures.beyond(inside | {"n": 0.15, "d": 3.0}, table)["d"]


def test_no_interval_of_few_seeds(split_study: figures.Study) -> None:
    """A bootstrap over two seeds has three outcomes, and shows half the variance."""
    of_two = {p: m for p, m in split_study.every.items() if p.seed in (0, 1, 100, 101, 102)}
    study = figures.Study(SETTINGS, of_two)
    laws = figures.Laws(study)
    assert laws.seeds == [0, 1]
    assert "No intervals: 2 seeds" in report.sections(figures.figures(study, laws))["missing"]
    for row in figures.splits(laws):
        assert (row["share_interval"], row["less_first_interval"]) == (None, None)
        assert "(" not in report.percent(row["share"], row["share_interval"])


def test_a_measurement_more_takes_no_law_and_no_row_away(split_study: figures.Study) -> None:
    """Of a D that one size has alone, and of a D′ that one seed has."""
    run = runs.Run("adamw", "s1", 5, 0, 8e-3)
    of = {domain: {**line(), "bits": {domain: 2.0}} for domain in ("a", "b")}
    more = {runs.Point(*run, 8_000_000, domain, plan.whole("s1", 50_000)): m for domain, m in of.items()}
    more |= {
        runs.Point(*run, plan.whole("s1", 500_000), domain, plan.whole("s1", 800_000)): m for domain, m in of.items()
    }
    before, after = split_study, figures.Study(SETTINGS, {**split_study.every, **more})
    assert figures.specialized(after) == figures.specialized(before)
    table = figures.table_of(after, "adamw", 5, "a")
    assert table[:, 1].max() < 5
    assert figures.missing(table) == figures.missing(figures.table_of(before, "adamw", 5, "a")) == ""


def test_all_arms_of_a_place_are_compared_over_the_same_amounts() -> None:
    """Of three seeds one arm has the smallest D′ alone: the two others count, for all pairs."""
    have = searched("adamw", "unit", "nexus:0.2")
    for arm, seed in product(("adamw", "unit", "nexus:0.2"), range(5)):
        run = runs.Run(arm, "tiny", 5, seed, 8e-3)
        have[runs.Point(*run, 480)] = {**line(2.0), "bits": dict.fromkeys(NAMES, 2.0)}
        for decay in (160, 320, 480) if arm != "unit" or seed > 2 else (160,):
            have[runs.Point(*run, 480, "a", decay)] = {**line(), "bits": {"a": 2.0 - decay / 1000}}
    rows = figures.specialized(figures.Study(SETTINGS, have))
    assert {(r["arm"], r["other"], r["seeds"], tuple(r["domain_tokens"])) for r in rows} == {
        ("unit", "adamw", 2, (160, 320, 480)),
        ("nexus:0.2", "unit", 2, (160, 320, 480)),
        ("nexus:0.2", "adamw", 5, (160, 320, 480)),
    }


def test_which_nexus_is_drawn() -> None:
    """Of those that most sizes have at most places the better one."""

    def row(arm: str, size: str, tokens: int, mean: float) -> dict:
        more = {"inner_steps": 5, "seeds": 3, "domain": "mixture", "other": "adamw", "parameters": 1}
        return {"arm": arm, "size": size, "tokens": tokens, "trained": {"mean": mean}, **more}

    means = {"nexus:0.05": -0.01, "nexus:0.2": -0.02}
    rows = [row(arm, "0.1M", tokens, mean) for arm, mean in means.items() for tokens in (1, 2, 3)]
    rows.append(row("nexus:0.8", "0.1M", 4, -0.9))
    assert {r["arm"] for r in plots.nexus(rows, "trained")} == {"nexus:0.2"}
    rows.append(row("nexus:0.05", "0.2M", 1, -0.01))
    assert {r["arm"] for r in plots.nexus(rows, "trained")} == {"nexus:0.05"}


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
        "Nexus, γ = 0.2", "3", "−0.190 ± 0.006", "−0.090 ± 0.006", "+0.000 ± 0.058", "+0.000 ± 0.058",
    ]  # fmt: skip
    assert made.startswith("# Title\n\n<!-- study: differences -->\n| N ")
    assert "18 measurements of 9 runs, of which 0 diverged.\nCommits: abc. torch 2. Machines: a processor." in made
    assert "old" not in made
    report.insert(found, page)
    assert page.read_text() == made
    page.write_text("<!-- study: nothing -->\n<!-- end -->\n")
    with pytest.raises(StudyError, match="asks for 'nothing'"):
        report.insert(found, page)
    unended = "<!-- study: runs -->\ntext\n<!-- study: differences -->\n<!-- end -->\n"
    for content, message in ((unended, "'runs' of .* does not end"), ("# Title\n", "has no section")):
        page.write_text(content)
        with pytest.raises(StudyError, match=message):
            report.insert(found, page)
        assert page.read_text() == content


def test_differences_of_unequal_seeds() -> None:
    """Seeds stand in the order of the columns: AdamW, then unit."""
    values = {("adamw", s): (2.0, 3.0) for s in range(2)} | {("unit", s): (1.9, 3.0) for s in range(4)}
    study = study_of(values | {("nexus:0.2", s): (1.8, 3.0) for s in range(4)})
    row = report.pivot(figures.differences(study))[-1]
    assert row[4:6] == ["Nexus, γ = 0.2", "2 and 4"]
