"""The file of a study: one line of JSON with its settings, then one for each measurement, written as it is finished."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from . import StudyError
from .runs import SIZES, Point

MEASURED = {
    "diverged": bool,
    "bits": dict,
    "alignment": (float, type(None)),
    "weights": str,
    "seconds": float,
    "commit": str,
    "torch": str,
    "shape": list,
    "processor": str,
}
"""What a line holds beside its point."""
OF_POINT = {"arm": str, "size": str, "inner_steps": int, "seed": int, "lr": float, "tokens": int, "domain": str}
OF_POINT |= {"decay_tokens": int}
VERSION = 1
"""Of the file's format."""


def parse(line: bytes) -> tuple[Point, dict[str, Any]]:
    """Return what a line holds; raises ValueError where it is not as it was written."""
    content = json.loads(line)
    if not isinstance(content, dict) or content.keys() != MEASURED.keys() | set(Point._fields):
        raise ValueError
    point = Point(**{name: content.pop(name) for name in Point._fields})
    right = all(isinstance(content[name], kind) for name, kind in MEASURED.items())
    right = right and all(isinstance(getattr(point, name), kind) for name, kind in OF_POINT.items())
    if not right or not all(isinstance(bits, float | None) for bits in content["bits"].values()):
        raise ValueError
    return point, content


def read(path: Path) -> tuple[dict[str, Any], dict[Point, dict[str, Any]], int]:
    """Return settings, measurements and the length of a last line that was cut off while it was written.

    Raises StudyError where a line is not as it was written, or is of a size that is not what it was.
    """
    *lines, last = path.read_bytes().split(b"\n")
    measured: dict[Point, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            if number == 1:
                settings = json.loads(line)["settings"]
                if settings["version"] != VERSION or settings["search"].keys() != {"seeds", "start", "tokens"}:
                    raise ValueError
                continue
            point, content = parse(line)
        except (ValueError, TypeError, KeyError, AttributeError):
            remedy = "name another file" if number == 1 else "take the line out, and what it held is measured again"
            what = "is not the head of a study" if number == 1 else "is damaged"
            raise StudyError(f"line {number} of {path} {what}; {remedy}.") from None
        if point in measured:
            raise StudyError(f"line {number} of {path} measures again what an earlier line has: {point}. Remove one.")
        if point.size not in SIZES or content["shape"] != SIZES[point.size].shape:
            known = SIZES[point.size].shape if point.size in SIZES else "unknown"
            raise StudyError(f"line {number} of {path}: size {point.size} is {content['shape']} there, {known} here.")
        measured[point] = content
    return settings, measured, len(last)


def mismatch(asked: Any, found: Any, name: str = "") -> str:
    """Name the first setting that is not the same in both; "" where there is none."""
    if isinstance(asked, dict) and isinstance(found, dict):
        for key in sorted(asked.keys() | found.keys()):
            inner = mismatch(asked.get(key), found.get(key), f"{name}.{key}" if name else key)
            if inner:
                return inner
        return ""
    return "" if asked == found else f"{name} is {found!r} there and {asked!r} here"


class Results:
    """A file that a study adds to; nobody else can while it is open. `measured` holds what it has."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open or begin a file; raises StudyError if it is another study's, damaged or in use, OSError as usual."""
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.cut_off = path, 0
        self.measured: dict[Point, dict[str, Any]] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StudyError(f"another study is writing to {path}; wait for it, or name another file.") from None
            found, self.measured, self.cut_off = read(path)
            if found and (other := mismatch(settings, found)):
                raise StudyError(f"{path} is of a study with other settings: {other}. Name another file.")
            os.ftruncate(self._file, os.fstat(self._file).st_size - self.cut_off)
            if not found:  # an empty file, or a head that was cut off
                self._write({"settings": settings})
        except BaseException:
            os.close(self._file)
            raise

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)  # or the next line would be appended to a part of this one
            raise

    def add(self, point: Point, measured: dict[str, Any]) -> None:
        """Write a measurement to the disk; raises OSError as the system does."""
        assert point not in self.measured
        self._write({**point._asdict(), **measured})
        self.measured[point] = measured

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
