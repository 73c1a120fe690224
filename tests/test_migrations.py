"""The diffs of docs/migrating.md and docs/trainers.md: each changes one line of an AdamW script, which then trains."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch
from conftest import OF_LIBRARIES
from processes import on_ranks

import nexus_fused

ROOT = Path(__file__).parent.parent
PAGES = "".join((ROOT / "docs" / page).read_text() for page in ("migrating.md", "trainers.md"))
DIFFS = {
    Path(path).name: (ROOT / "docs" / path, removed, added)
    for path, removed, added in re.findall(r"\]\(([^)]+\.py)\)\):\n\n```diff\n-(.*)\n\+(.*)\n```", PAGES)
}
NEEDS = {
    "accelerate_loop.py": ("accelerate",),
    "fabric_loop.py": ("lightning",),
    "huggingface.py": ("transformers", "accelerate"),
    "lightning_module.py": ("lightning",),
}
pytestmark = OF_LIBRARIES


def script(name: str, changed: bool, **replaced: str) -> types.ModuleType:
    """The script as a module, with AdamW or with the line changed, and with other values of its keywords."""
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[trainers]'")
    path, removed, added = DIFFS[name]
    source = path.read_text()
    assert source.count(removed + "\n") == 1
    if changed:
        source = source.replace(removed, added)
    for keyword, value in replaced.items():
        source, count = re.subn(rf"\b{keyword}=[\d.e-]+", f"{keyword}={value}", source)
        assert count > 0
    module = types.ModuleType(path.stem)
    module.nexus_fused = nexus_fused
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def test_which_scripts_there_are():
    own = {path.name for path in (ROOT / "docs" / "migrations").glob("*.py")}
    assert DIFFS.keys() == {"accumulating_loop.py", *own}
    assert all("nexus_fused.Nexus" in added for _, _, added in DIFFS.values())


def walked(optimizer, model) -> bool:
    """Whether AdamW has stepped on walks of four inner steps, and weights are finite."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's and Lightning's wrappers
    assert isinstance(optimizer, nexus_fused.NexusAdamW | nexus_fused.Nexus)
    assert all(p.isfinite().all() for p in model.parameters())
    return optimizer.at_boundary and len(optimizer.metrics()["grad_norms"]) == 4


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", sorted({*DIFFS} - {"accumulating_loop.py", "torchrun_ddp.py"}))
def test_a_line_is_all_that_changes(name: str, request: pytest.FixtureRequest):
    """Weights go about as far as AdamW's, and about where AdamW's go."""
    if "accelerate" in NEEDS.get(name, ()):
        request.getfixturevalue("accelerate_reset")
    start = flat(script(name, changed=False, lr="0.0").main()[1])
    adamw = flat(script(name, changed=False).main()[1]) - start
    optimizer, model = script(name, changed=True).main()
    assert walked(optimizer, model)
    ours = flat(model) - start
    assert 0.5 < ours.norm() / adamw.norm() < 2
    assert torch.dot(ours, adamw) > 0.5 * ours.norm() * adamw.norm()
    assert not torch.equal(ours, adamw)


def test_a_line_in_a_loop_like_nanogpts(tmp_path: Path):
    """Its loss falls as with AdamW, and its checkpoint resumes."""
    model, optimizer, losses, evaluations = script("accumulating_loop.py", changed=True).main(tmp_path / "saved")
    assert walked(optimizer, model)
    assert evaluations[-1] < evaluations[0]
    assert len(losses) == 24 * 4
    script("accumulating_loop.py", changed=True).main(tmp_path / "saved", resume=True)


def ranks() -> list[torch.Tensor]:
    optimizer, model = script("torchrun_ddp.py", changed=True).main()
    assert walked(optimizer, model)
    return [p.detach() for p in model.parameters()]


def test_a_line_under_torchrun():
    first, second = on_ranks(2, ranks)
    assert all(map(torch.equal, first, second))
