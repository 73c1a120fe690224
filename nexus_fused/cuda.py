"""The CUDA backend: starts the kernels of csrc/cuda.cu on the current stream of the tables' device.

Functions are those of reference.py, where they are defined. Nothing returns to the host. A step of one table is 2
launches: the norm, and the inner step, displacement or outer step, which also advance the scalars.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C
from .cycle import Cycle, MicroBatch
from .table import Table

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def why_not_on(device: torch.device, dtype: torch.dtype, *, displaced: bool = False) -> str | None:
    """None where the kernels can update tensors on `device`, else why not and what to do."""
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
    """What a launch needs of `struct Where`."""
    return device.index, torch.cuda.current_stream(device).cuda_stream, first, last


def _table(table: Table, *, displaced: bool = False) -> tuple[tuple[int, ...], int]:
    """`struct Table` and the dtype."""
    rows, row_of_chunk, starts, touch = table.displaced_on_device() if displaced else table.on_device()
    pointers = rows.data_ptr(), row_of_chunk.data_ptr(), starts.data_ptr()
    return (*pointers, starts.shape[0] - 1, table.chunks, touch, table.parts), _DTYPES[table.dtype]


def _scalars(cycle: Cycle, micro_batch: MicroBatch | None) -> tuple[tuple[int, ...], list[int], tuple[int, int, int]]:
    """`struct Cycle`, the norms and the rest of `struct MicroBatch`."""
    finished_sums, finished_counts = cycle.results
    tensors = cycle.hyper, cycle.sums, cycle.totals, cycle.counts, finished_sums, finished_counts
    of_cycle = *(tensor.data_ptr() for tensor in tensors), len(cycle.factor), cycle.inner_steps
    if micro_batch is None:
        return of_cycle, [], (0, 0, 0)
    norms = [norm.data_ptr() for norm in micro_batch.sq_norms]
    scale, found = (0 if t is None else t.data_ptr() for t in (micro_batch.grad_scale, micro_batch.found_inf))
    return of_cycle, norms, (micro_batch.position, scale, found)


def _readable(micro_batch: MicroBatch | None, device: torch.device) -> MicroBatch | None:
    """The micro-batch as the kernels read it: on `device`, few norms of one element each, float32 from a GradScaler."""
    if micro_batch is None:
        return None
    sq_norms, position, grad_scale, found_inf = micro_batch.on(device)
    sq_norms = [norm if norm.numel() == 1 else norm.sum() for norm in sq_norms]  # another backend's partial sums
    if len(sq_norms) > _C.CUDA_MAX_NORMS:
        sq_norms = [sum(sq_norms[1:], sq_norms[0])]
    scale, found = (None if t is None else t.to(torch.float32) for t in (grad_scale, found_inf))
    return MicroBatch(sq_norms, position, scale, found)


def sq_norm(table: Table) -> Tensor:
    """‖g‖² over the table's gradients: [1], float64. Reads 4 bytes per float32 element, 2 below."""
    with _on(table.device):
        partials, norm = table.partials.data_ptr(), table.sq_norm.data_ptr()
        _C.cuda_sq_norm(*_table(table), partials, norm, table.arrivals.data_ptr(), _where(table.device))
    return table.sq_norm


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """w ← w − γ·g/n. Moves 12 bytes per element, the first time in a cycle 16 (float32) or 12 (below)."""
    with _on(cycle.device):
        readable = _readable(micro_batch, cycle.device)
        of_cycle, norms, rest = _scalars(cycle, readable)
        for table in tables:
            _C.cuda_inner_step(*_table(table), of_cycle, norms, rest, _where(cycle.device, last=table is tables[-1]))


def outer_step(
    tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int, *, displaced: bool = False
) -> None:
    """Last inner step, displacement, AdamW and w ← θ in one pass: 32 bytes per element, displaced 28 (float32)."""
    with _on(cycle.device):
        readable = None if displaced else _readable(micro_batch, cycle.device)
        of_cycle, norms, rest = _scalars(cycle, readable)
        for table in tables:
            amsgrad = any(bucket.amsgrad for bucket in table.buckets)
            memory = table.displacement_sq.data_ptr(), table.arrivals.data_ptr()
            ends = _where(cycle.device, first=table is tables[0], last=table is tables[-1])
            of_table = _table(table, displaced=displaced)
            _C.cuda_outer_step(*of_table, amsgrad, of_cycle, norms, rest, taken, *memory, displaced, ends)
    cycle.finished = cycle.results


def displace(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Last inner step and w ← D · share. Moves 16 bytes per element (float32), 14 or 12 (below)."""
    with _on(cycle.device):
        readable = _readable(micro_batch, cycle.device)
        of_cycle, norms, rest = _scalars(cycle, readable)
        for table in tables:
            in_weight, ends = table.displacement_in_weight, _where(cycle.device, last=table is tables[-1])
            _C.cuda_displace(*_table(table), of_cycle, norms, rest, share, in_weight, ends)
