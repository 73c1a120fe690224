"""Downloads, cleans, splits and caches the demo's text.

Everything in the cache is written under a temporary name first and checked by sha256 before it is used, so an
interrupted or damaged cache is noticed and made again.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from . import DemoError
from .corpora import FAR, NEAR, TRAINING, Document, Reader
from .progress import Progress

REQUIREMENTS = Path(__file__).with_name("data_requirements.txt")
RECIPE = 1
"""Raise this when the preparation changes, so that no older cache is taken for a current one."""

GRAM = 13
MAX_OVERLAP = 0.3
HELD_OUT = 0.05
EVALUATION_MB = 1.0
SEPARATOR = "\n\n"

Texts = dict[str, np.ndarray]
"""Domain name → its bytes, uint8, 1-D."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which never holds a part of it; raises OSError as the system does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def digest(content: bytes) -> str:
    """Return the sha256 of `content` in hex."""
    return hashlib.sha256(content).hexdigest()


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex, "" if there is none."""
    return digest(path.read_bytes()) if path.is_file() else ""


def pinned_hashes(requirements: Path = REQUIREMENTS) -> set[str]:
    """Return the sha256 sums that the requirements file demands."""
    return {word[14:] for word in requirements.read_text().split() if word.startswith("--hash=sha256:")}


def pip(arguments: Sequence[str], packages: int) -> tuple[int, str]:
    """Run pip under a bar that counts the packages it takes up; return its exit status and what it wrote on stderr."""
    command, environment = [sys.executable, "-m", "pip", *arguments], {**os.environ, "PIP_QUIET": "0"}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        Progress(total=packages, desc="Downloading 78 MB of text") as bar,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace", env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                bar.update(line.startswith(("Collecting ", "Processing ")))
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        stderr.seek(0)
        return status, stderr.read()


def download(folder: Path, requirements: Path = REQUIREMENTS) -> None:
    """Bring the pinned wheels into `folder`, unless they are there, whole and alone; pip checks their hashes.

    Raises DemoError when pip fails. Wheels arrive in a temporary folder, so none in `folder` is half written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if pinned_hashes(requirements) == {sha256(path) for path in folder.glob("*.whl")}:
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download.") as temporary:
        arguments = ["download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--ignore-requires-python"]
        arguments += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
        arguments += ["--dest", temporary, "-r", str(requirements)]
        status, stderr = pip(arguments, len(pinned_hashes(requirements)))
        if status != 0:
            raise DemoError(explain_pip_failure(stderr, folder))
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in Path(temporary).glob("*.whl"):
            os.replace(wheel, folder / wheel.name)


def explain_pip_failure(stderr: str, folder: Path) -> str:
    """Turn what pip wrote on stderr into one message with a remedy."""
    lines = stderr.strip().splitlines() or ["(nothing)"]
    quoted = f"\npip said: {lines[-1].strip()}"
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            "a downloaded wheel differs from the pinned one (a broken download or another mirror). "
            "Try again; `python -m pip cache purge` drops a broken copy that pip kept." + quoted
        )
    if "No space left on device" in stderr or "Errno 28" in stderr:
        room = f"Free about 400 MB for {folder} and in the temporary folder, or pass --cache."
        return f"the disk is full. {room}{quoted}"
    if "No module named pip" in stderr:
        return f"this Python has no pip. Run `{sys.executable} -m ensurepip`, then try again."
    return (
        "the text could not be downloaded. Check the network connection (or the package index in pip's "
        f"settings) and try again, or copy the wheels of {REQUIREMENTS.name}, and no others, into {folder}.{quoted}"
    )


_FACTORS = [int(x) | 1 for x in np.random.Generator(np.random.PCG64(13)).integers(1, 2**63, GRAM)]


def gram_hashes(text: str) -> np.ndarray:
    """Return one 28-bit hash per run of 13 words, int64 (a shorter text counts as one run)."""
    words = text.split()
    codes = np.fromiter((zlib.crc32(w.encode(errors="replace")) for w in words), np.uint64, len(words))
    hashes = np.zeros(max(len(words) - GRAM + 1, 1), np.uint64)
    for j in range(min(GRAM, len(words))):
        hashes += codes[j : j + len(hashes)] * np.uint64(_FACTORS[j])
    indices: np.ndarray = (hashes >> np.uint64(36)).astype(np.int64)
    return indices


class SeenGrams:
    """Which runs of words have occurred: a table of 2^28 flags (256 MB); chance hits stay near 1 %."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.flags = np.zeros(1 << 28, dtype=bool)

    def share(self, text: str) -> float:
        """Return the share of the text's runs that have been seen."""
        return float(self.flags[gram_hashes(text)].mean())

    def add(self, text: str) -> None:
        """Note the text's runs."""
        self.flags[gram_hashes(text)] = True


def select(documents: Iterable[Document], seen: SeenGrams, limit: float) -> list[Document]:
    """Take documents up to `limit` bytes; return those that do not nearly repeat earlier ones."""
    kept, size = [], 0
    for document in documents:
        size += len(document.text.encode(errors="replace"))
        if document.text.strip() and seen.share(document.text) < MAX_OVERLAP:
            seen.add(document.text)
            kept.append(document)
        if size >= limit:
            break
    return kept


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Split by whole groups into (training, held out: about 5 % of the characters); no randomness."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += len(document.text)
    target, held, size = HELD_OUT * sizes.total(), set[str](), 0
    for group in sorted(sizes, key=lambda g: digest(g.encode(errors="replace"))):
        if size < target and size + sizes[group] <= 1.5 * target:
            held.add(group)
            size += sizes[group]
    if not held and len(sizes) > 1:
        held.add(min(sizes, key=lambda g: (sizes[g], g)))
    return [d for d in documents if d.group not in held], [d for d in documents if d.group in held]


def leaked_share(training: list[Document], held_out: list[Document]) -> float:
    """Return the share of the held-out text's runs of 13 words that stand in the training text too."""
    known, found = (
        np.concatenate([np.zeros(0, np.int64), *(gram_hashes(d.text) for d in part)]) for part in (training, held_out)
    )
    return float(np.isin(found, known).sum()) / max(1, len(found))


class Part(NamedTuple):
    """One file of the prepared text; `leaked` is meaningful for the held-out part of a training domain."""

    file: str
    documents: list[Document]
    leaked: float | None = None


def clean(
    wheels: Path, cap_mb: float, training: Mapping[str, Reader], evaluation: Mapping[str, Reader]
) -> Iterator[Part]:
    """Yield the files of the data set; a training domain has two.

    `cap_mb` limits what is read per training domain before near duplicates are removed (0: everything).
    """
    seen, limit = SeenGrams(), cap_mb * 1e6 or float("inf")
    with Progress({**training, **evaluation}.items(), desc="Preparing the text") as progress:
        for name, reader in progress:
            progress.set_postfix_str(name)
            documents = reader(wheels, Random(name))
            if name in training:
                train, held_out = split(select(documents, seen, limit))
                yield Part(f"{name}.train.txt", train)
                yield Part(f"{name}.heldout.txt", held_out, leaked_share(train, held_out))
            else:
                yield Part(f"{name}.heldout.txt", select(documents, seen, min(limit, EVALUATION_MB * 1e6)))


def prepare(folder: Path, cap_mb: float, parts: Iterable[Part]) -> dict[str, Any]:
    """Write the parts into `folder` and return the manifest; it is written last and vouches for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    files, sizes = {}, {}
    for name, documents, leaked in parts:
        content = SEPARATOR.join(d.text for d in documents).encode("utf-8", errors="replace")
        write_atomically(folder / name, content)
        files[name] = digest(content)
        sizes[name] = {"bytes": len(content), "documents": len(documents), "leaked": leaked}
    manifest = {"recipe": RECIPE, "wheels": sha256(REQUIREMENTS), "python": platform.python_version()}
    manifest |= {"cap_mb": cap_mb, "sizes": sizes}
    manifest |= {"files": files, "sha256": digest(json.dumps(files, sort_keys=True).encode())}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def verify(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a prepared cache, None if it is missing, damaged, incomplete or made from other wheels."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        whole = all(sha256(folder / name) == expected for name, expected in manifest["files"].items())
        made_so = manifest["recipe"] == RECIPE and manifest["wheels"] == sha256(REQUIREMENTS)
        return manifest if whole and made_so else None
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None


def load(cache: Path, cap_mb: float) -> tuple[Texts, Texts, dict[str, Any]]:
    """Return (training texts, held-out texts of all domains, manifest), preparing the cache when needed.

    Raises DemoError when the download fails, OSError when the disk refuses.
    """
    folder = cache / f"prepared-{RECIPE}-python{platform.python_version()}-{cap_mb:g}MB"
    manifest = verify(folder)
    if manifest is None:
        if folder.exists():
            print(f"The prepared text in {folder} is damaged, incomplete or out of date; making it again.", flush=True)
        download(cache / "wheels")
        manifest = prepare(folder, cap_mb, clean(cache / "wheels", cap_mb, TRAINING, {**FAR, **NEAR}))
    texts = {name: np.frombuffer((folder / name).read_bytes(), np.uint8) for name in manifest["files"]}
    train, held_out = (
        {name.removesuffix(end): text for name, text in texts.items() if name.endswith(end)}
        for end in (".train.txt", ".heldout.txt")
    )
    return train, held_out, manifest
