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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..frameworks import uninterrupted
from . import DemoError

Tell = Callable[[Any], None]
"""Sends a message, not None, to the process that gave the work; raises Stopped once it has been called off."""


class Stopped(Exception):
    """The work has been called off."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(connection: Connection, threads: int) -> None:
    """Do the jobs that come through a pipe until the other end is closed."""
    import torch

    if threads:
        torch.set_num_threads(threads)

    def tell(content: Any) -> None:
        try:
            connection.send((content, None))
        except OSError:
            raise Stopped from None  # whoever gave the work is gone
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
            except DemoError as error:
                failure = str(error)
            except Exception as error:
                traceback.print_exc()
                failure = f"a run failed with {type(error).__name__}: {error} (more of it above)"
            connection.send((None, failure))


class Workers:
    """`count` processes with `threads` threads of torch each (0: as many as it takes), each sent `shared` once.

    As a context manager: at its end the processes are ended, whatever they do.
    """

    def __init__(self, count: int, threads: int, shared: Any) -> None:
        """Start the processes, all before the first is waited for; each imports torch."""
        self.running: dict[Hashable, Connection] = {}
        self._idle: list[Connection] = []
        self._ready: deque[Hashable] = deque()
        self._processes: list[BaseProcess] = []
        try:
            with uninterrupted():
                self._start(count, threads)
            for connection in self._idle:
                self._send(connection, shared)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, count: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # or the first process starts it, and that unblocks SIGINT
        # Processes inherit what is blocked: Ctrl-C is for this one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
                process.start()
                theirs.close()  # or the end of the process could not be seen here
                self._processes.append(process)
                self._idle.append(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def free(self) -> int:
        """Number of jobs that can be submitted now."""
        return len(self._idle)

    def _send(self, connection: Connection, content: Any) -> None:
        try:
            connection.send(content)
        except OSError as error:
            raise DemoError("a process died before it had anything to do (out of memory?).") from error

    def submit(self, key: Hashable, function: Callable[..., None], *arguments: Any) -> None:
        """Run `function(shared, tell, *arguments)` in a process that is free; `key` is of no job that is running."""
        assert key not in self.running
        connection = self._idle.pop()
        self._send(connection, (function, arguments))
        self.running[key] = connection

    def hear(self) -> tuple[Any, Any] | None:
        """Return the next message as (key, content), content None: the job has ended; None after a second without one.

        Raises DemoError where a job has failed or a process died; that job is over then.
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
            raise DemoError(f"a process died in the middle of its work, {key} (out of memory?).") from error
        if content is None:
            self._idle.append(self.running.pop(key))
        if failure:
            raise DemoError(failure)
        return key, content

    def stop(self) -> Iterator[tuple[Any, Any]]:
        """Call everything off, and yield what is still told until all have ended, each when it next tells something."""
        for connection in self.running.values():
            with suppress(OSError):
                connection.send(None)
        while self.running:
            with suppress(DemoError):  # the first one is on its way already
                heard = self.hear()
                if heard:
                    yield heard
        self._idle.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
