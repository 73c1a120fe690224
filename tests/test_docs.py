"""README and the pages of docs: what a first screen may take, and that links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def prose(text: str) -> list[str]:
    """The sentences of a page, without code, tables, headings and HTML."""
    text = re.sub(r"```.*?```|<[a-z/!][^>]*>", "", text, flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=\* )", re.sub(r"^(\||#).*$", "", text, flags=re.MULTILINE))
    return [s for block in blocks for s in re.split(r"(?<=[.:!?])\s+(?=[A-Z`*θ])", " ".join(block.split())) if s]


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1300
    long = [sentence for sentence in prose(text) if len(sentence.split()) > 35]
    assert not long


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_citation():
    """CITATION.cff is of the version that CHANGELOG.md begins with, which is the package's."""
    version, date = re.search(r"^## (\S+)\n\n(\S+)\n", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert f'__version__ = "{version}"' in (ROOT / "nexus_fused" / "__init__.py").read_text()
    assert f"\nversion: {version}\ndate-released: {date}\n" in (ROOT / "CITATION.cff").read_text()
