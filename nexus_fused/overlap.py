"""The norm under the backward pass: a hook per parameter sums its gradient's squares as soon as autograd has it.

On a CPU the gradient is still in cache then; on a GPU the sums run on a stream of their own, beside what is left of the
backward pass. `step()` finds the partial sums of every chunk in `Table.partials` and only adds them up, in the same
order as ever: the norm is the same bit for bit. A gradient that has changed since is summed again.
"""

from __future__ import annotations

import functools
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .distributed import is_dtensor
from .flat import Segment
from .table import CHUNK_ELEMENTS, Table


def check_choice(overlap_norm: Any) -> None:
    """TypeError where the constructor's `overlap_norm` is no bool, RuntimeError where it cannot be right."""
    if not isinstance(overlap_norm, bool):
        raise TypeError(f"overlap_norm must be True or False, but is {overlap_norm!r}")
    if overlap_norm:
        check_processes()


def check_processes() -> None:
    """RuntimeError in a run of several processes: they reduce gradients after the hooks, which leaves no trace."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"overlap_norm=True in a run of {distributed.get_world_size()} processes: gradients are reduced across "
            "them after their squares were summed, and the norm would be wrong: use overlap_norm=False"
        )


def check_params(params: list[Tensor]) -> None:
    """RuntimeError for DTensors: FSDP2 sets their gradients after the hooks."""
    if any(map(is_dtensor, params)):
        raise RuntimeError(
            "overlap_norm=True, but parameters are DTensors, whose gradients are set without calling hooks: use "
            "overlap_norm=False"
        )


def check_backend(backend: ModuleType, device: torch.device) -> None:
    """RuntimeError where the backend of a device cannot sum gradients one by one."""
    if not hasattr(backend, "sum_squares"):
        name = backend.__name__.rpartition(".")[2]
        raise RuntimeError(
            f"overlap_norm=True, but on {device} the backend is {name!r}, which sums the norm in step(): use "
            "overlap_norm=False or another backend"
        )


class Overlap:
    """The hooks of an optimizer's parameters and what they have summed.

    Only the optimizer holds it: hooks know it weakly, and are removed when it goes.
    """

    def __init__(self) -> None:
        self._sums: dict[Table, _Sums] = {}
        self._hooked: set[Segment] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles).atexit = False

    def watch(self, table: Table, backend: ModuleType) -> None:
        """Puts hooks on the table's parameters that have none; those too small or frozen are summed in `step()`."""
        sums = self._sums.setdefault(table, _Sums(table))
        sums.backend = backend
        for segment in table.segments:
            large = segment.numel >= backend.SMALLEST_HOOKED
            if large and segment not in self._hooked and segment.param.requires_grad:
                hook = functools.partial(_sum, weakref.ref(sums), segment)
                self._handles.append(segment.param.register_post_accumulate_grad_hook(hook))
                self._hooked.add(segment)

    def forget(self) -> None:
        """All gradients may have changed: the next `sq_norm` of each table sums them again."""
        for sums in self._sums.values():
            sums.forget()

    def stop(self) -> None:
        """Has `sq_norm` sum everything from here on: replays of a graph write gradients and partial sums unseen."""
        for sums in self._sums.values():
            sums.stopped = True

    def sq_norm(self, table: Table) -> Tensor:
        """The backend's `sq_norm(table)`, bit for bit, after `table.read_gradients`."""
        return self._sums[table].sq_norm()


class _Sums:
    """What of one table's gradients stands summed in `table.partials`.

    Of each row: the gradient (weakly: memory is freed, and buffers are handed on, as without us), its address and its
    version before it was summed. A gradient that takes the place of another may get its id, address and version.
    `filled`: rows whose partial sums may be other than 0. `partials`: the tensor that all this is true of.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.backend: ModuleType
        self.partials: Tensor | None = None
        self.gradients: list[weakref.ref[Tensor] | None] = []
        self.addresses: list[int] = []
        self.versions: list[int] = []
        self.filled: set[int] = set()
        self.stream = None if table.device.type == "cpu" else torch.Stream(table.device)
        self.launched = False  # on `stream`, and nobody has waited for it
        self.stopped = False

    def forget(self) -> None:
        self.gradients = [None] * len(self.table.segments)

    def _start_anew(self) -> None:
        """After the table did: other rows, other memory."""
        n = len(self.table.segments)
        self.gradients, self.addresses, self.versions = [None] * n, [0] * n, [0] * n
        self.filled = set(range(n))  # new memory holds anything
        self.partials = self.table.partials
        if self.stream is not None:  # it may still write when the optimizer is gone
            self.partials.record_stream(self.stream)

    def add(self, segment: Segment, gradient: Tensor) -> None:
        """Sums a gradient that has just been accumulated, unless `step()` must look at it first."""
        table, row = self.table, segment.row
        if self.stopped or not table.is_current:
            return
        if self.partials is not table.partials:
            self._start_anew()
        self.gradients[row] = None  # until all is done: whatever fails on the way is summed in step()
        if not table.can_read(segment, gradient):
            return
        version = gradient._version  # before: what changes from here on is seen
        self.filled.add(row)
        if self.stream is None:
            self.backend.sum_squares(table, segment, gradient)
        elif not self._sum_aside(segment, gradient):
            return
        self.addresses[row], self.versions[row] = gradient.data_ptr() or -1, version
        self.gradients[row] = weakref.ref(gradient)

    def _sum_aside(self, segment: Segment, gradient: Tensor) -> bool:
        """The same on the side stream, after what the current one has been given so far; False: it cannot be.

        The gradient's memory is not recorded on the side stream, which would hold every gradient back after it was
        freed. `step()` waits before that; without one, and where a second backward pass accumulates in place, the sums
        may be of memory in flux, and nobody uses them: that pass's hook sums again, behind, on the same stream. (Only
        with expandable segments could memory be unmapped so early: by empty_cache() after a backward pass whose
        gradients were dropped without a step.)
        """
        device = self.table.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.stopped = True  # the graph's replays change gradients without calling hooks
            return False
        assert self.stream is not None
        self.stream.wait_stream(torch.accelerator.current_stream(device))
        self.launched = True
        with self.stream:
            self.backend.sum_squares(self.table, segment, gradient)
        return True

    def sq_norm(self) -> Tensor:
        table = self.table
        if (
            self.launched and self.stream is not None and not table.capturing
        ):  # a graph cannot wait for what is not in it
            torch.accelerator.current_stream(table.device).wait_stream(self.stream)
            self.launched = False
        if self.partials is not table.partials:
            self._start_anew()
        changed = [row for row, address in enumerate(table.addresses) if address and not self._stands(row, address)]
        given = {row for row, address in enumerate(table.addresses) if address}
        if len(changed) == len(given) or self.stopped:
            self.filled = given
            norm: Tensor = self.backend.sq_norm(table)
            return norm
        for row in changed:
            segment = table.segments[row]
            gradient = table.gradient(segment)
            assert gradient is not None
            self.filled.add(row)
            self.backend.sum_squares(table, segment, gradient)
        for row in self.filled - given:
            segment = table.segments[row]
            table.partials[segment.chunk :][: -(-segment.numel // CHUNK_ELEMENTS)] = 0
        self.filled &= given
        norm = self.backend.sq_norm(table, summed=True)
        return norm

    def _stands(self, row: int, address: int) -> bool:
        """Whether the gradient at `address` is the one that was summed, and nobody has written into it."""
        known = self.gradients[row]
        if known is None or address != self.addresses[row]:
            return False
        gradient = self.table.params[row].grad
        return known() is gradient and gradient._version == self.versions[row]  # type: ignore[union-attr]


def _sum(sums: weakref.ref[_Sums], segment: Segment, param: Tensor) -> None:
    """The hook. Under torch.compile's eyes (compiled autograd) it does nothing, and `step()` sums."""
    if torch.compiler.is_compiling():
        return
    known, gradient = sums(), param.grad
    if known is not None and gradient is not None:
        known.add(segment, gradient)


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
