"""The CPU backend: passes the addresses of a table and a cycle to the compiled kernels of `nexus_fused._C`.
reference.py defines its functions; `_threads` chooses their threads.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _C
from .cycle import Cycle, MicroBatch
from .table import Table

ONE_THREAD = 100_000  # elements up to here: to wake others takes longer than they save, on busy cores 16 ms

_forked: list[bool] = []  # not empty in a child of the process that loaded this: it has none of the threads
if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def why_not_on(device: torch.device, dtype: torch.dtype, displacement_dtype: torch.dtype) -> str | None:
    """Returns None on a CPU, else why these kernels cannot update tensors there."""
    return None if device.type == "cpu" else f"its kernels run on CPU tensors and a parameter is on {device}"


def _table(table: Table, rows: Tensor | None = None) -> tuple[int, int, int, int, int]:
    rows = table.rows if rows is None else rows
    return rows.data_ptr(), len(rows), table.chunks, *table.dtypes


def _threads(table: Table) -> int:
    """Returns `torch.get_num_threads()` for a table that is worth it, in a process that can have threads, else 1."""
    return 1 if table.elements <= ONE_THREAD or _forked else torch.get_num_threads()


def sq_norm(table: Table) -> Tensor:
    """Returns ‖g‖² over the table's gradients: [1] float64, in the table's own memory. Reads each gradient once."""
    return table.sq_norm.fill_(_C.sq_norm(*_table(table)[:3], table.partials.data_ptr(), _threads(table)))


def _advance(cycle: Cycle, micro_batch: MicroBatch | None) -> None:
    """Does what `Cycle.advance` does, without a PyTorch call for each number."""
    if micro_batch is None:
        cycle.advance(None)
        return
    sq_norms, position, grad_scale, found_inf = micro_batch.on(cycle.device)
    sq_norm = sum(float(partial if partial.numel() == 1 else partial.sum()) for partial in sq_norms)
    _C.advance(
        cycle.hyper.data_ptr(),
        cycle.factor.data_ptr(),
        cycle.sums.data_ptr(),
        cycle.totals.data_ptr(),
        len(cycle.factor),
        position,
        sq_norm,
        1.0 if grad_scale is None else float(grad_scale),
        found_inf is not None and bool(found_inf != 0),
    )


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """D ← Q(D + γ·g/n), w ← θ − D. Moves 16 bytes per element in float32, 14 below; 2 less the first time."""
    _advance(cycle, micro_batch)
    counts = cycle.moves.data_ptr(), cycle.lost_moves.data_ptr()
    for table in tables:
        _C.inner_step(*_table(table), cycle.factor.data_ptr(), table.counts_parameters, *counts, _threads(table))


def outer_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int) -> None:
    """Takes the last inner step, ends the walk and applies AdamW in one pass: 30 bytes per element in float32, 28
    below.
    """
    _advance(cycle, micro_batch)
    for table in tables:
        _outer_step(table, cycle, _table(table), has_ended=False)
    cycle.finish(taken)


def end_walk(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Takes the last inner step; w ← θ, D ← Q(D · share): 16 bytes per element in float32, 14 below."""
    _advance(cycle, micro_batch)
    for table in tables:
        _C.end_walk(*_table(table), cycle.factor.data_ptr(), share, _threads(table))


def gradients(table: Table, cycle: Cycle, scale: Tensor, targets: list[Tensor | None]) -> None:
    """Writes D · scale into memory of its own, and sums ‖D‖²: 6 bytes per element in float32, 4 below."""
    sums = cycle.displacement_sq.data_ptr(), table.displacement_sq.data_ptr()
    _C.gradients(*_table(table, table.on_device_with(targets)[0]), scale.data_ptr(), *sums, _threads(table))


def adamw(tables: list[Table], cycle: Cycle, moved: list[Tensor], taken: int) -> None:
    """Applies AdamW to θ and D after `end_walk`: 26 bytes per element, in float32 and below."""
    cycle.advance(None)
    for table, who in zip(tables, moved, strict=True):
        _outer_step(table, cycle, _table(table, table.on_device_after_walk(who)[0]), has_ended=True)
    cycle.finish(taken)


def _outer_step(table: Table, cycle: Cycle, of_table: tuple[int, int, int, int, int], *, has_ended: bool) -> None:
    _C.outer_step(
        *of_table,
        has_ended,
        cycle.hyper.data_ptr(),
        cycle.factor.data_ptr(),
        cycle.walk_length.data_ptr(),
        cycle.displacement_sq.data_ptr(),
        table.displacement_sq.data_ptr(),
        _threads(table),
    )
