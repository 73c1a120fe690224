"""What mkdocs cannot do by itself: pages and files that lie outside of docs."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the repository's root, by their name in the site."""
LINK = re.compile(r"(\]\(|src(?:set)?=\")([^)\"\s]+)")
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def of_the_site(markdown: str, page: str) -> str:
    """Return a page whose links lead to where the site has what they mean; `page` is its path in the repository."""
    at = Path(page).parent

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        file = (ROOT / at / target).resolve()
        if not file.is_relative_to(ROOT):
            return match[0]  # mkdocs says that there is no such page
        path = file.relative_to(ROOT).as_posix()
        found = PAGES.get(path, path.removeprefix("docs/"))
        return match[1] + found + (f"#{anchor}" if anchor else "")

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and what pages link to outside of docs."""
    for name, page in PAGES.items():
        content = of_the_site((ROOT / name).read_text(), name)
        files.append(File.generated(config, page, content=content))
    for source in [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        for _, target in LINK.findall(CODE.sub("", (ROOT / source).read_text())):
            path = (ROOT / Path(source).parent / target.partition("#")[0]).resolve()
            outside = path.is_file() and path.suffix != ".md" and not path.is_relative_to(ROOT / "docs")
            name = path.relative_to(ROOT).as_posix() if outside else ""
            if outside and not files.get_file_from_path(name):
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links to files outside of docs into links to their copies."""
    source = page.file.src_uri
    return markdown if source in PAGES.values() else of_the_site(markdown, f"docs/{source}")
