"""The file of a study: one line of JSON with its settings, then one for each measurement, written as it is finished."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from . import StudyError
from .runs import Point

MEASURED = {"diverged", "bits", "alignment", "weights", "seconds", "commit", "processor"}


def read(path: Path) -> tuple[dict[str, Any], dict[Point, dict[str, Any]]]:
    """Return the settings and the measurements of a file; raises StudyError where a line is not as it was written.

    A last line that was cut off while it was written is left out.
    """
    head, *rest = path.read_bytes().split(b"\n")
    measured: dict[Point, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    for number, line in enumerate([head, *rest[:-1]], 1):
        try:
            content = json.loads(line)
            if number == 1:
                settings = dict(content["settings"])
                continue
            point = Point(**{name: content.pop(name) for name in Point._fields})
            if content.keys() != MEASURED or not isinstance(content["bits"], dict):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            remedy = "name another file" if number == 1 else "take the line out, and what it held is measured again"
            what = "is not the head of a study" if number == 1 else "is damaged"
            raise StudyError(f"line {number} of {path} {what}; {remedy}.") from None
        if point in measured:
            raise StudyError(f"line {number} of {path} measures again what an earlier line has: {point}. Remove one.")
        measured[point] = content
    return settings, measured


def difference(asked: Any, found: Any, name: str = "") -> str:
    """Name the first setting that is not the same in both; "" where there is none."""
    if isinstance(asked, dict) and isinstance(found, dict):
        for key in sorted(asked.keys() | found.keys()):
            inner = difference(asked.get(key), found.get(key), f"{name}.{key}" if name else key)
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
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StudyError(f"another study is writing to {path}; wait for it, or name another file.") from None
            size = os.fstat(self._file).st_size
            if not size:
                self.measured: dict[Point, dict[str, Any]] = {}
                self._write({"settings": settings})
                return
            found, self.measured = read(path)
            if other := difference(settings, found):
                raise StudyError(f"{path} is of a study with other settings: {other}. Name another file.")
            self.cut_off = len(path.read_bytes().rpartition(b"\n")[2])
            if self.cut_off:
                os.ftruncate(self._file, size - self.cut_off)
        except BaseException:
            os.close(self._file)
            raise

    def _write(self, content: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(content, ensure_ascii=False).encode() + b"\n")
        os.fsync(self._file)

    def add(self, point: Point, measured: dict[str, Any]) -> None:
        """Write a measurement to the disk; raises OSError as the system does."""
        self._write({**point._asdict(), **measured})
        self.measured[point] = measured

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._file)
