"""Processes that do jobs: what they tell, and what becomes of jobs that fail, die or are called off."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from nexus_fused.demo import DemoError, workers


def shout(shared: str, tell: workers.Tell, word: str) -> None:
    tell(shared + word)
    tell(shared + word.upper())


def wait(shared: str, tell: workers.Tell) -> None:
    while True:
        tell("tick")
        time.sleep(0.01)


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("of the job")
        self.held = lambda: None


def fail(shared: str, tell: workers.Tell, how: str) -> None:
    if how == "raise":
        raise Unpicklable
    os.kill(os.getpid(), signal.SIGKILL)  # as a system does that runs out of memory


def test_workers() -> None:
    """Each job is heard until its end, and its messages come in order; at the end of `with` nothing is left running."""
    with workers.Workers(3, 1, "so ") as pool:
        for word in ("a", "b", "c"):
            pool.submit(word, shout, word)
        heard: dict[str, list[str | None]] = {}
        while pool.running:
            if message := pool.hear():
                heard.setdefault(message[0], []).append(message[1])
        assert heard == {word: [f"so {word}", f"so {word.upper()}", None] for word in ("a", "b", "c")}
        pool.submit("endless", wait)
        while pool.hear() != ("endless", "tick"):
            pass
    assert not multiprocessing.active_children()


def test_workers_that_are_called_off() -> None:
    """What they still tell is heard, then they end."""
    with workers.Workers(1, 1, "") as pool:
        pool.submit("endless", wait)
        while pool.hear() != ("endless", "tick"):
            pass
        told = list(pool.stop())
    assert told[-1] == ("endless", None)
    assert set(told[:-1]) <= {("endless", "tick")}


@pytest.mark.parametrize(
    ("how", "error"), [("raise", "Unpicklable: of the job"), ("die", "process died in the middle")]
)
def test_workers_that_fail(how: str, error: str) -> None:
    """What a job raises is told, and a process that dies is an error that says so; the other job is ended."""
    with workers.Workers(2, 1, "") as pool:
        pool.submit("endless", wait)
        pool.submit("bad", fail, how)
        with pytest.raises(DemoError, match=error):  # noqa: PT012 - whichever call hears of it
            while True:
                pool.hear()


def test_an_interrupt_while_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is not lost: it comes when all have started, and ends them."""
    process = multiprocessing.get_context("spawn").Process
    started, start = [], process.start

    def interrupted(self: multiprocessing.process.BaseProcess) -> None:
        start(self)
        started.append(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.Workers(2, 1, None)
    assert len(started) == 2
    for one in started:
        one.join(timeout=60)
        assert not one.is_alive()
