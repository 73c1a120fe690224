"""The tables of README, docs/benchmarks.md and docs/muon.md, and the main ones of docs/gpu.md, quote bench/results."""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BENCHMARKS, GPU, MUON = (ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "gpu", "muon"))
BACKENDS = ("cuda", "triton")
DTYPES = ("float32", "bfloat16")
# Kernels of bench/results/gpu-nvidia-h200.json, and their rows in docs/gpu.md.
KERNELS = {
    "sq_norm": "`sq_norm`",
    "inner_step, first": "`inner_step`, first",
    "inner_step, middle": "`inner_step`, later",
    "outer_step": "`outer_step`",
    "end_walk": "`end_walk`",
}


def figures_of(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["figures"]


def cells(path: Path, row: str) -> list[str]:
    """Of the first row of a table that begins so, without its name."""
    lines = path.read_text().splitlines()
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {row}")).split("|")[2:-1]]


def unwrapped(path: Path) -> str:
    return " ".join(path.read_text().split())


def test_figures_of_a_cpu():
    """Medians and quartiles in the tables of a CPU are those of cpu.json and training.json."""
    training = figures_of("training.json")
    rows = {
        **figures_of("cpu.json"),
        "whole cycle, forward and backward passes included": training["whole cycle / AdamW's"],
        "time in the optimizer, goal at most 1.00: missed": training["time in the optimizer / AdamW's"],
    }
    for name, figure in rows.items():
        quoted = f"{figure['median']:.2f} ({figure['quartile1']:.2f} to {figure['quartile3']:.2f})"
        assert quoted == cells(BENCHMARKS, f"{name} |")[0]


SMALL = "10M parameters in 200 tensors"
TRAINING = "decoder of 472M parameters, float32, K = 4, 2048 tokens"
# Of bench/results/gpu-nvidia-h200.json, and their rows in docs/benchmarks.md and docs/gpu.md.
OF_A_GPU = {
    f"time added to training / AdamW's, {TRAINING}": ("what the optimizer adds to it",) * 2,
    "whole cycle / AdamW's cycle, 1.3B parameters, float32": (
        "optimizer alone, float32, 1.3B parameters",
        "optimizer alone, 1.3B parameters, float32",
    ),
    "whole cycle / AdamW's cycle, 1.3B parameters, bfloat16": (
        "optimizer alone, bfloat16, 1.3B parameters",
        "optimizer alone, 1.3B parameters, bfloat16",
    ),
    f"whole cycle / AdamW's cycle, {SMALL}": (None, f"optimizer alone, {SMALL}, launched from Python"),
    f"whole cycle / AdamW, _foreach_add_'s cycle, {SMALL}": (
        f"optimizer alone, {SMALL}, AdamW accumulates with `_foreach_add_`",
        "the same, AdamW accumulates with `_foreach_add_`",
    ),
    f"in a CUDA graph: whole cycle / AdamW's captured cycle, {SMALL}": ("the same, both in a CUDA graph",) * 2,
    "host time of step() / AdamW's fused, 500 parameters, addresses unchanged": (
        "host time of one `step()`",
        "addresses unchanged, over AdamW's",
    ),
    "host time of step() / AdamW's fused, 500 parameters, addresses changed": (
        None,
        "gradients at new addresses, over AdamW's",
    ),
    "foreach Nexus / ours, 1.3B parameters": (None, "foreach Nexus over ours, 1.3B parameters"),
    f"foreach Nexus / ours, {SMALL}": (None, "foreach Nexus over ours, 10M in 200 tensors"),
}


def only_key(values: dict[str, Any], backend: str, name: str) -> str:
    """A backend's entry."""
    pattern = rf"{backend}(: |, | ){re.escape(name)}"
    (found,) = (key for key in values if re.fullmatch(pattern, key))
    return found


def median_on_gpu(backend: str, name: str) -> float:
    figures = figures_of("gpu-nvidia-h200.json")
    return figures[only_key(figures, backend, name)]["median"]


def test_ratios_on_a_gpu():
    for name, rows in OF_A_GPU.items():
        medians = [f"{median_on_gpu(backend, name):.2f}" for backend in BACKENDS]
        for path, row in zip((BENCHMARKS, GPU), rows, strict=True):
            if row:
                assert cells(path, row)[:2] == medians, (path, row)


def test_times_on_a_gpu():
    """Ratios of medians of milliseconds, and of bytes per second."""
    absolute = json.loads((RESULTS / "gpu-nvidia-h200.json").read_text())["absolute"]
    adamw = absolute[f"AdamW, {TRAINING}"]["milliseconds"]
    ours = [absolute[only_key(absolute, backend, TRAINING)]["milliseconds"] for backend in BACKENDS]
    for path in (BENCHMARKS, GPU):
        assert cells(path, "training, forward and backward included, ")[:2] == [f"{time / adamw:.2f}" for time in ours]
    of_adamw = absolute["AdamW, accumulation, clipping, 1.3B parameters, float32"]["gigabytes_per_second"]
    of_copy = absolute["copy beside torch.float32"]["gigabytes_per_second"]
    assert f"where AdamW's accumulation, clipping and step get {of_adamw / of_copy:.2f}." in unwrapped(BENCHMARKS)


def test_bandwidths_on_a_gpu():
    def bandwidth(backend: str, dtype: str, kernel: str) -> float:
        return median_on_gpu(backend, f"{dtype} {kernel}: bandwidth / copy's")

    for kernel, row in KERNELS.items():
        assert cells(GPU, row)[1:] == [f"{bandwidth(b, d, kernel):.2f}" for b in BACKENDS for d in DTYPES], kernel
    ranges = []
    for backend in BACKENDS:
        all_of = [bandwidth(backend, dtype, kernel) for dtype in DTYPES for kernel in KERNELS]
        ranges.append(f"{min(all_of):.2f} to {max(all_of):.2f}")
    assert "reach {} (CUDA) and {} (Triton)".format(*ranges) in unwrapped(BENCHMARKS)


def test_a_cpu_beside_a_gpu():
    """The last column of its first table."""
    cpu, training = figures_of("cpu.json"), figures_of("training.json")
    for row, figure in {
        "optimizer alone, float32": cpu["float32: whole cycle / AdamW's cycle"],
        "the same with `inner_steps=None`": cpu["float32: whole cycle with inner_steps=None / AdamW's cycle"],
        "optimizer alone, bfloat16": cpu["bfloat16: whole cycle / AdamW's cycle"],
        "host time of one `step()`": cpu["step() on 2,000 parameters of 64 / AdamW's fused step"],
        "training, forward and backward included, ": training["whole cycle / AdamW's"],
        "what the optimizer adds to it": training["time in the optimizer / AdamW's"],
    }.items():
        assert cells(BENCHMARKS, row)[2] == f"{figure['median']:.2f}"


def test_what_it_costs():
    """README's table: what training and the optimizer take on a GPU, and what they gain on the smallest model."""
    absolute = json.loads((RESULTS / "gpu-nvidia-h200.json").read_text())["absolute"]
    ours, adamw = (absolute[f"{name}, {TRAINING}"]["milliseconds"] for name in ("cuda", "AdamW"))
    assert cells(README, "time of training, 472M parameters on an H200, float32 |") == [f"{ours / adamw:.2f} times"]
    alone = {d: median_on_gpu("cuda", f"whole cycle / AdamW's cycle, 1.3B parameters, {d}") for d in DTYPES}
    quoted = "{float32:.2f} times in float32, {bfloat16:.2f} times in bfloat16".format(**alone)
    assert cells(README, "time of the optimizer alone, 1.3B parameters on an H200 |") == [quoted]
    cpu = figures_of("cpu.json")
    four, open_ = (cpu[f"float32: whole cycle{w} / AdamW's cycle"]["median"] for w in ("", " with inner_steps=None"))
    alone = "time of the optimizer alone, 51M parameters on a CPU, float32 |"
    assert cells(README, alone) == [f"{four:.2f} times; {open_:.2f} with `inner_steps=None`"]


def test_what_it_gains():
    """README's row of bits per byte, and the figures below it: of 0.12M parameters, five seeds."""
    found = json.loads((RESULTS / "study.json").read_text())
    of = {"size": "0.1M", "inner_steps": 5, "seeds": 5, "domain": "mixture"}

    def trained(rows: str, **what: str) -> list[dict[str, Any]]:
        """After the fewest and after the most tokens."""
        wanted = {**of, **what}
        points = {r["tokens"]: r["trained"] for r in found[rows] if all(r.get(k, v) == v for k, v in wanted.items())}
        assert [round(tokens / 1e6, 1) for tokens in sorted(points)] == [0.5, 1.0, 2.0, 4.0]
        return [points[min(points)], points[max(points)]]

    def gains(arm: str) -> list[str]:
        of_both = trained("differences", arm=arm, other="adamw")
        return [f"{g['mean']:.3f} ± {g['standard_error']:.3f}".replace("-", "−") for g in of_both]

    quoted = "{} after 0.5M tokens, {} after 4M".format(*gains("nexus:0.2"))
    assert cells(README, "bits per byte on text like the training text, less is better |") == [quoted]
    assert [g["certain"] for g in trained("differences", arm="nexus:0.2", other="adamw")] == [True, False]
    first, last = (found["mean"] for found in trained("arms", arm="adamw"))
    assert f"AdamW has {first:.3f} and {last:.3f}. The second difference is not certain." in unwrapped(README)
    assert "With γ = 0.05 they are {} and {}.".format(*gains("nexus:0.05")) in unwrapped(README)


def test_figures_of_muon():
    """Every row of the tables: mean ± standard error, with a sign where it is a difference of arms."""
    result = json.loads((RESULTS / "muon.json").read_text())
    for name, kinds in result["figures"].items():
        sign = "+" if " − " in name else ""
        quoted = [f"{v['mean']:{sign}.3f} ± {v['standard_error']:.3f}".replace("-", "−") for v in kinds.values()]
        assert cells(MUON, f"{name} |") == quoted, name
        assert len(kinds["trained"]["by_seed"]) >= 3
    rows = [line for line in MUON.read_text().splitlines() if " ± " in line and line.startswith("|")]
    assert len(rows) == len(result["figures"])


def test_what_is_said_of_muon():
    """The sentences below its tables, which name no figure."""
    result = json.loads((RESULTS / "muon.json").read_text())
    figures = result["figures"]
    unit, short, long = "Muon + unit gradients", "Muon + Nexus, γ = 0.05", "Muon + Nexus, γ = 0.2"

    def gains(arm: str, other: str, kind: str) -> list[float]:
        return [-difference for difference in figures[f"{arm} − {other}"][kind]["by_seed"]]

    for arm, other in ("Muon", "AdamW"), (unit, "Muon"), (short, unit), (long, unit):
        assert min(gains(arm, other, "trained")) > 0
    assert all(map(operator.gt, gains(long, unit, "trained"), gains(short, unit, "trained")))
    assert sum(gain < 0 for gain in gains(short, "Muon", "unseen")) == 2
    assert max(gains(short, unit, "unseen")) < 0
    share = sum(gains(unit, "Muon", "trained")) / sum(gains(long, "Muon", "trained"))
    assert 0.3 < share < 0.37
    bits = {(run["arm"], run["seed"]): run["bits"] for run in result["runs"]}
    for domain, sign in ("news", -1), ("case law", -1), ("ICD-10 codes", -1), ("Spanish", 1):
        assert all(sign * (bits[long, seed][domain] - bits["Muon", seed][domain]) > 0 for seed in range(3))
    assert all(abs(run["alignment"]) < 0.01 for run in result["runs"] if run["alignment"] is not None)


def test_learning_rates_of_muon():
    result = json.loads((RESULTS / "muon.json").read_text())
    searched = {run["lr"]: run["curve"][-1][1] for run in result["search"]["runs"]}
    assert min(searched, key=searched.__getitem__) == result["learning_rates"]["Muon"]
    assert result["search"]["seed"] not in {run["seed"] for run in result["runs"]}
    for run in result["runs"]:
        assert run["lr"] == result["learning_rates"]["AdamW" if run["arm"] == "AdamW" else "Muon"]
    quoted = ", ".join(f"{lr:g}: {searched[lr]:.3f}" for lr in sorted(searched))
    assert f"(seed {result['search']['seed']}; {quoted})" in unwrapped(MUON)


def test_tables_of_the_study():
    """docs/evidence.md shows what study.json holds, and its means and differences are what the measurements in
    study.jsonl come to (the law takes minutes to fit, and is not fitted again); the page of a GPU shows what those in
    study-gpu.jsonl come to."""
    for name in ("scipy", "matplotlib", "threadpoolctl"):
        pytest.importorskip(name)
    from bench.study import figures, report, results

    settings, measured, _ = results.read(RESULTS / "study.jsonl")
    study = figures.Study(settings, measured)
    found = json.loads((RESULTS / "study.json").read_text())
    for name, made in (
        ("arms", figures.means(study)),
        ("differences", figures.differences(study)),
        ("specialized", figures.specialized(study)),
    ):
        assert found[name] == json.loads(json.dumps(made)), name
    settings, measured, _ = results.read(RESULTS / "study-gpu.jsonl")
    study = figures.Study(settings, measured)
    on_gpu = figures.figures(study, figures.Laws(study))
    always = {"runs", "differences", "bits per byte", "learning rates"}
    for page, content, least in (
        ("evidence.md", found, {"specialized", "law", *always}),
        ("evidence_gpu.md", on_gpu, always),
    ):
        text = (ROOT / "docs" / page).read_text()
        shown = dict(re.findall(r"<!-- study: (.+?) -->\n(.*?)\n?<!-- end -->", text, flags=re.DOTALL))
        assert least <= shown.keys()
        made = report.sections(content)
        assert shown == {name: made[name] for name in shown}


def test_pictures_of_readme(tmp_path: Path):
    """They are what bench.pictures draws of study.json, with the matplotlib that is pinned."""
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    if f'matplotlib=={matplotlib.__version__}; python_version >= "3.11"' not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another matplotlib may draw the same in another way")
    from bench import pictures

    pictures.main(tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 4
    for path in drawn:
        assert path.read_bytes() == (pictures.PICTURES / path.name).read_bytes(), path.name
