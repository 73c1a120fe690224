"""Runs jobs in processes of their own, several at a time, and hears from them.

Small models gain little from a second thread, so two runs with one thread each are faster than one after the other with
two. A second thread also waits for the first a thousand times in a run, which takes ten times as long where other work
holds a core.

Each process has a pipe, and nothing is shared between them: one that dies, or whose parent dies, is noticed at the
other end. (concurrent.futures may wait forever for a process that died soon after its start.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from . import DemoError

Tell = Callable[[Any], None]
"""Sends a message, not None, to the process that gave the work; raises Stopped once it has been called off."""


class Stopped(Exception):
    """The work has been called off."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(connection: Connection, threads: int) -> None:
    """Do the jobs that come through a pipe until None comes, or the other end is closed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gave the work
    if threads:
        torch.set_num_threads(threads)

    def tell(content: Any) -> None:
        connection.send((content, None))
        if connection.poll():  # in the middle of a job nothing comes but the end
            raise Stopped

    with suppress(EOFError, OSError):
        shared = connection.recv()
        while job := connection.recv():
            function, arguments = job
            failure = None
            try:
                function(shared, tell, *arguments)
            except Stopped:
                pass
            except Exception as error:
                traceback.print_exc()
                failure = error
            connection.send((None, failure))


class Workers:
    """Up to `count` processes with `threads` threads of torch each (0: as many as it takes), each sent `shared` once.

    As a context manager: jobs that are running at its end are called off, and end when they next tell something.
    """

    def __init__(self, count: int, threads: int, shared: Any) -> None:
        """Start nothing yet: processes begin with the first jobs."""
        self.count, self._threads, self._shared = count, threads, shared
        self.running: dict[Hashable, Connection] = {}
        self._idle: list[Connection] = []
        self._ready: deque[Hashable] = deque()
        self._processes: list[BaseProcess] = []

    @property
    def free(self) -> int:
        """Number of jobs that can be submitted now."""
        return self.count - len(self.running)

    def submit(self, key: Hashable, function: Callable[..., None], *arguments: Any) -> None:
        """Run `function(shared, tell, *arguments)` in a process that is free."""
        if not self._idle:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._threads), daemon=True)
            process.start()
            theirs.close()  # or the end of the process could not be seen here
            self._processes.append(process)
            self._idle.append(ours)
            ours.send(self._shared)
        self.running[key] = self._idle.pop()
        self.running[key].send((function, arguments))

    def hear(self) -> tuple[Any, Any] | None:
        """Return the next message as (key, content), content None: the job has ended; None after a second without one.

        Raises what a job has raised, and DemoError where a process died; that job is over then.
        """
        if not self._ready:
            of_pipe = {connection: key for key, connection in self.running.items()}
            self._ready.extend(of_pipe[connection] for connection in wait(list(of_pipe), timeout=1.0))  # type: ignore[index]
            if not self._ready:
                return None
        key = self._ready.popleft()
        connection = self.running[key]
        try:
            content, failure = connection.recv()
        except (EOFError, OSError) as error:
            del self.running[key]
            connection.close()
            raise DemoError(f"a process died in the middle of its work, {key} (out of memory?).") from error
        if content is None:
            self._idle.append(self.running.pop(key))
        if failure:
            raise failure
        return key, content

    def stop(self) -> Iterator[tuple[Any, Any]]:
        """Call everything off, and yield what is still told until all have ended."""
        for connection in self.running.values():
            with suppress(OSError):
                connection.send(None)
        while self.running:
            with suppress(Exception):  # what is wrong is on its way as an exception already, or of no interest
                heard = self.hear()
                if heard:
                    yield heard
        self._idle.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for _heard in self.stop():
            pass
        for process in self._processes:
            process.terminate()
            process.join()
