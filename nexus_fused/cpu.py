"""The CPU backend: hands the addresses of a table and a cycle to the compiled kernels of `nexus_fused._C`.

Functions are those of reference.py, where they are defined. Threads: `torch.get_num_threads()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C
from .cycle import Cycle, MicroBatch
from .table import Table

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def why_not_on(device: torch.device, dtype: torch.dtype, *, displaced: bool = False) -> str | None:
    """None on a CPU, else why these kernels cannot update tensors there."""
    return None if device.type == "cpu" else f"its kernels run on CPU tensors and a parameter is on {device}"


def _table(table: Table, *, displaced: bool = False) -> tuple[int, int, int, int]:
    rows = table.displaced_on_device()[0] if displaced else table.rows
    return rows.data_ptr(), len(rows), table.chunks, _DTYPES[table.dtype]


def sq_norm(table: Table) -> Tensor:
    """‖g‖² over the table's gradients: 0-dim float64. Reads 4 bytes per float32 element, 2 below."""
    norm = _C.sq_norm(*_table(table), table.partials.data_ptr(), torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """w ← w − γ·g/n. Moves 12 bytes per element, the first time in a cycle 16 (float32) or 12 (below)."""
    cycle.advance(micro_batch)
    for table in tables:
        _C.inner_step(
            *_table(table),
            cycle.factor.data_ptr(),
            cycle.moves.data_ptr(),
            cycle.lost_moves.data_ptr(),
            torch.get_num_threads(),
        )


def outer_step(
    tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int, *, displaced: bool = False
) -> None:
    """Last inner step, displacement, AdamW and w ← θ in one pass: 32 bytes per element, displaced 28 (float32)."""
    if not displaced:
        cycle.advance(micro_batch)
    for table in tables:
        _C.outer_step(
            *_table(table, displaced=displaced),
            cycle.hyper.data_ptr(),
            cycle.factor.data_ptr(),
            cycle.walk_length.data_ptr(),
            cycle.displacement_sq.data_ptr(),
            table.displacement_sq.data_ptr(),
            displaced,
            torch.get_num_threads(),
        )
    cycle.finish(taken)


def displace(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Last inner step and w ← D · share. Moves 16 bytes per element (float32), 14 or 12 (below)."""
    cycle.advance(micro_batch)
    for table in tables:
        _C.displace(
            *_table(table), cycle.factor.data_ptr(), share, table.displacement_in_weight, torch.get_num_threads()
        )
