"""The documentation's site: it builds without a warning, and its pages open in a browser without an error."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 420)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # strict: of a warning too
    return folder


def test_every_page_is_there(site: Path):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "changelog", "contributing", "404"}
    assert pages == {path.stem for path in site.glob("*.html")}
    api = (site / "api.html").read_text()
    for name in ("NexusAdamW", "Nexus", "split_matrices", "NexusAdamW.metrics", "Nexus.step"):
        assert f'id="nexus_fused.{name}"' in api, name


def test_every_link_leads_somewhere(site: Path):
    """To a file, and where it names a place in a page, to that place; nothing is fetched from elsewhere."""
    for page in site.glob("*.html"):
        if page.name == "404.html":  # its links are the server's
            continue
        text = page.read_text()
        assert not re.findall(r'<link (?!rel="canonical")[^>]*href="[a-z]+:[^>]*>', text), page.name
        for kind, target in re.findall(r'(href|src|srcset)="([^"]*)"', text):
            if re.match(r"[a-z]+:", target):
                assert kind == "href", f"{page.name} fetches {target}"
                continue
            path, _, place = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{page.name}: {target}"
            if place and not place.startswith("__") and file.suffix == ".html":
                assert f'id="{place}"' in file.read_text(), f"{page.name}: {target}"


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send_error(self, code: int, *_: object) -> None:
            lacking.append(f"{code} {self.path}")
            super().send_error(code)

    lacking: list[str] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    assert [what for what in lacking if "favicon" not in what] == []


FRAMES = """<!doctype html><title>all pages</title><script>
for (const page of %s) {
  const frame = document.createElement("iframe")
  frame.width = %d
  frame.height = 900
  frame.src = "../" + page
  frame.onload = () => console.log("width", page, frame.contentDocument.documentElement.scrollWidth)
  document.documentElement.append(frame)
}
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_has_an_error_in_the_console(site: Path, served: str, tmp_path: Path, width: int):
    """All are opened in frames of a width at once; nor is a page wider than its frame."""
    pages = sorted(page.name for page in site.glob("*.html"))
    (site / "frames").mkdir(exist_ok=True)
    (site / "frames" / f"{width}.html").write_text(FRAMES % (pages, width))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    command += ["--dump-dom", f"{served}/frames/{width}.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    console = re.findall(r'CONSOLE[^"]*"(.*?)", source: ', done.stderr, re.DOTALL)
    widths = {line.split()[1]: int(line.split()[2]) for line in console if line.startswith("width ")}
    assert [line for line in console if not line.startswith("width ")] == []
    assert sorted(widths) == pages, done.stderr
    assert {page: found for page, found in widths.items() if found > width} == {}
