"""The CUDA backend: starts the kernels of csrc/cuda.cu on the current stream of the tables' device. reference.py
defines its functions. Nothing returns to the host. A step of one table takes 2 launches: the norm, then the inner
step, end of the walk or outer step, which also advances the scalars. `gradients` takes 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C
from .cycle import Cycle, MicroBatch
from .table import Table


def why_not_on(device: torch.device, dtype: torch.dtype, displacement_dtype: torch.dtype) -> str | None:
    """Returns None if the kernels can update tensors on `device`, else the reason and the remedy."""
    if not _C.CUDA_TARGETS:
        return (
            "nexus_fused was built without a CUDA compiler: install NVIDIA's CUDA toolkit 12.0 or newer (nvcc on PATH, "
            "with a C++ compiler that it supports) and then this package again, in its checkout: pip install -v "
            "--force-reinstall --no-deps ., whose output tells why nvcc was not used"
        )
    if torch.version.hip is not None:
        return "its kernels run on NVIDIA's GPUs and this PyTorch is built for AMD's: use backend='triton'"
    if not torch.cuda.is_available():
        return "its kernels run on an NVIDIA GPU and PyTorch sees none (torch.cuda.is_available() is False)"
    if device.type != "cuda":
        return f"its kernels run on a GPU and a parameter is on {device}: move the model before the optimizer is built"
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return _C.cuda_why_not(index) or None


def _on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)


def _where(device: torch.device, *, first: bool = True, last: bool = True) -> tuple[int, int, bool, bool]:
    """Returns what a launch needs of `struct Where`."""
    return device.index, torch.cuda.current_stream(device).cuda_stream, first, last


def _table(table: Table, on_device: tuple[Tensor, Tensor, Tensor, int] | None = None) -> tuple[int, ...]:
    """Returns `struct Table`. on_device: None takes `table.on_device()`."""
    rows, row_of_chunk, starts, touch = on_device or table.on_device()
    pointers = rows.data_ptr(), row_of_chunk.data_ptr(), starts.data_ptr()
    return *pointers, starts.shape[0] - 1, table.chunks, touch, table.parts


def _scalars(cycle: Cycle, micro_batch: MicroBatch | None) -> tuple[tuple[int, ...], list[int], tuple[int, int, int]]:
    """Returns `struct Cycle`, the norms and the rest of `struct MicroBatch`."""
    finished_sums, finished_counts = cycle.results
    tensors = cycle.hyper, cycle.sums, cycle.totals, cycle.counts, finished_sums, finished_counts
    of_cycle = *(tensor.data_ptr() for tensor in tensors), len(cycle.factor), cycle.room
    if micro_batch is None:
        return of_cycle, [], (0, 0, 0)
    norms = [norm.data_ptr() for norm in micro_batch.sq_norms]
    scale, found = (0 if t is None else t.data_ptr() for t in (micro_batch.grad_scale, micro_batch.found_inf))
    return of_cycle, norms, (micro_batch.position, scale, found)


def _readable(micro_batch: MicroBatch | None, device: torch.device) -> MicroBatch | None:
    """Returns the micro-batch as kernels read it: on `device`, few norms of one element each, a GradScaler's in
    float32.
    """
    if micro_batch is None:
        return None
    sq_norms, position, grad_scale, found_inf = micro_batch.on(device)
    sq_norms = [norm if norm.numel() == 1 else norm.sum() for norm in sq_norms]  # another backend's partial sums
    if len(sq_norms) > _C.CUDA_MAX_NORMS:
        sq_norms = [sum(sq_norms[1:], sq_norms[0])]
    scale, found = (None if t is None else t.to(torch.float32) for t in (grad_scale, found_inf))
    return MicroBatch(sq_norms, position, scale, found)


def sq_norm(table: Table) -> Tensor:
    """Returns ‖g‖² over the table's gradients: [1], float64. Reads 4 bytes per float32 element, 2 below."""
    with _on(table.device):
        partials, norm = table.partials.data_ptr(), table.sq_norm.data_ptr()
        _C.cuda_sq_norm(_table(table), partials, norm, table.arrivals.data_ptr(), _where(table.device))
    return table.sq_norm


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """D ← Q(D + γ·g/n), w ← θ − D. Moves 16 bytes per element in float32, 14 below; 2 less the first time."""
    with _on(cycle.device):
        readable = _readable(micro_batch, cycle.device)  # lives as long as its addresses are used
        of_cycle, norms, rest = _scalars(cycle, readable)
        for table in tables:
            ends = _where(cycle.device, last=table is tables[-1])
            _C.cuda_inner_step(_table(table), table.dtypes, of_cycle, norms, rest, table.counts_parameters, ends)


def outer_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int) -> None:
    """Takes the last inner step, ends the walk and applies AdamW in one pass: 30 bytes per element in float32, 28
    below.
    """
    _outer_step(tables, cycle, micro_batch, None, taken)


def end_walk(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Takes the last inner step; w ← θ, D ← Q(D · share): 16 bytes per element in float32, 14 below."""
    with _on(cycle.device):
        readable = _readable(micro_batch, cycle.device)  # lives as long as its addresses are used
        of_cycle, norms, rest = _scalars(cycle, readable)
        for table in tables:
            ends = _where(cycle.device, last=table is tables[-1])
            _C.cuda_end_walk(_table(table), table.dtypes, of_cycle, norms, rest, share, ends)


def gradients(table: Table, cycle: Cycle, scale: Tensor, targets: list[Tensor | None]) -> None:
    """Writes D · scale into memory of its own, and sums ‖D‖²: 6 bytes per element in float32, 4 below."""
    with _on(table.device):
        sums = cycle.displacement_sq.data_ptr(), table.displacement_sq.data_ptr(), table.arrivals.data_ptr()
        of_table = _table(table, table.on_device_with(targets)), table.dtypes
        _C.cuda_gradients(*of_table, scale.data_ptr(), *sums, _where(table.device))


def adamw(tables: list[Table], cycle: Cycle, moved: list[Tensor], taken: int) -> None:
    """Applies AdamW to θ and D after `end_walk`: 26 bytes per element, in float32 and below."""
    _outer_step(tables, cycle, None, moved, taken)


def _outer_step(
    tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, moved: list[Tensor] | None, taken: int
) -> None:
    """Launches the outer step. moved: who takes part, for each table; None if the walk has not ended."""
    with _on(cycle.device):
        readable = _readable(micro_batch, cycle.device)  # lives as long as its addresses are used
        of_cycle, norms, rest = _scalars(cycle, readable)
        nobody: list[None] = [None] * len(tables)
        for table, who in zip(tables, moved or nobody, strict=True):
            amsgrad = any(bucket.amsgrad for bucket in table.buckets)
            memory = table.displacement_sq.data_ptr(), table.arrivals.data_ptr()
            ends = _where(cycle.device, first=table is tables[0], last=table is tables[-1])
            of_table = _table(table, who if who is None else table.on_device_after_walk(who)), table.dtypes, amsgrad
            _C.cuda_outer_step(*of_table, of_cycle, norms, rest, moved is not None, taken, *memory, ends)
    cycle.finished = cycle.results
