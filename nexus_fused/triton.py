"""The Triton backend: starts the kernels of triton_kernels/ on the current stream of the tables' device.

Functions are those of reference.py, where they are defined. Nothing returns to the host. An inner step of one table is
3 launches (norm, scalars, step), as is a displacement, an outer step 4 (and sums).
"""

from __future__ import annotations

import functools
import sys

import torch
import triton
from torch import Tensor

from .cycle import Cycle, MicroBatch
from .flat import make_segment
from .table import Table
from .triton_kernels import displace as _displace
from .triton_kernels import inner_step as _inner_step
from .triton_kernels import outer_step as _outer_step
from .triton_kernels import scalars as _scalars
from .triton_kernels import sq_norm as _sq_norm

# Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on CPU tensors then, and only there.
INTERPRETED = not isinstance(_sq_norm.sq_norm_kernel, triton.JITFunction)


def why_not_on(device: torch.device, dtype: torch.dtype, *, displaced: bool = False) -> str | None:
    """None where the kernels can update tensors of `dtype` on `device`, else why not.

    displaced: also those of `displace` and displaced outer steps, which take time to compile and few need.
    """
    if INTERPRETED:
        return (
            None if device.type == "cpu" else "TRITON_INTERPRET=1 is set, so its kernels run on CPU tensors: unset it"
        )
    if not torch.accelerator.is_available():
        return "its kernels run on a GPU and PyTorch sees none (torch.accelerator.is_available() is False)"
    if device.type not in ("cuda", "xpu"):
        return f"its kernels run on a GPU and a parameter is on {device}: move the model before the optimizer is built"
    try:
        _try_out(device, dtype)
        if displaced:
            _try_out_displaced(device, dtype)
    except RuntimeError as error:
        return str(error)
    return None


def _made_to_try(device: torch.device, dtype: torch.dtype) -> tuple[list[Table], Cycle]:
    """Three tables of one small parameter each, so that one is neither first nor last, and their cycle."""
    tables, cycle = [Table(device, dtype) for _ in range(3)], Cycle(device, 2, sys.modules[__name__])
    for table in tables:
        param = torch.ones(8, dtype=dtype, device=device, requires_grad=True)
        param.grad = torch.ones_like(param)
        table.extend([make_segment(param, group=0, index=0, state={})], flatten=False)
    cycle.grow(1)
    cycle.set_hyper([[0.01, 0.01, 0.9, 0.9, 1e-8, 0.0, 1.0, 1.0]])
    return tables, cycle


@functools.cache  # of successes: an error is tried again
def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles every variant of every kernel for `dtype`, by four cycles of three tables of one small parameter each.

    So nothing is left to be compiled, or to fail, in the middle of a step. RuntimeError if something does.
    """
    tables, cycle = _made_to_try(device, dtype)
    one = torch.ones((), device=device)
    for amsgrad, grad_scale, found_inf in (False, None, None), (True, one, one), (False, one, None), (False, None, one):
        for table in tables:
            table.set_amsgrad(0, amsgrad)
            table.ensure_cycle_buffers()
            table.read_gradients(use=True)
        sq_norms = [sq_norm(table) for table in tables]
        inner_step(tables, cycle, MicroBatch(sq_norms, 0))
        for table in tables:
            table.finish_inner_step()
        outer_step(tables, cycle, MicroBatch(sq_norms, 1, grad_scale, found_inf), 2)
        for table in tables:
            table.finish_outer_step()
    outer_step(tables[:1], cycle, None, 0)


@functools.cache
def _try_out_displaced(device: torch.device, dtype: torch.dtype) -> None:
    """The same for displaced cycles, after `_try_out`."""
    tables, cycle = _made_to_try(device, dtype)
    for amsgrad in (False, True):
        for table in tables:
            table.set_amsgrad(0, amsgrad)
            table.ensure_cycle_buffers()
            table.read_gradients(use=True)
            table.moved = torch.ones(1, dtype=torch.int64, device=device)
        displace(tables, cycle, MicroBatch([sq_norm(table) for table in tables], 0), 0.5)
        outer_step(tables, cycle, None, 1, displaced=True)
        for table in tables:
            table.finish_outer_step(displaced=True)


def sq_norm(table: Table) -> Tensor:
    """‖g‖² over the table's gradients, as a partial sum per chunk: [chunks], float64."""
    with torch.accelerator.device_index(table.device.index):
        partials: Tensor = _sq_norm.sq_norm(table)
        return partials


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """w ← w − γ·g/n. Moves 12 bytes per element, the first time in a cycle 16 (float32) or 12 (below)."""
    with torch.accelerator.device_index(cycle.device.index):
        _scalars.advance(cycle, micro_batch, ends_cycle=False)
        for table in tables:
            _inner_step.inner_step(table, cycle)


def outer_step(
    tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int, *, displaced: bool = False
) -> None:
    """Last inner step, displacement, AdamW and w ← θ in one pass: 32 bytes per element, displaced 28 (float32)."""
    with torch.accelerator.device_index(cycle.device.index):
        _scalars.advance(cycle, None if displaced else micro_batch, ends_cycle=True)
        on_device = [table.displaced_on_device() if displaced else table.on_device() for table in tables]
        for table, what in zip(tables, on_device, strict=True):
            _outer_step.outer_step(table, what, cycle, displaced=displaced)
        _scalars.finish(tables, on_device, cycle, taken)


def displace(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Last inner step and w ← D · share. Moves 16 bytes per element (float32), 14 or 12 (below)."""
    with torch.accelerator.device_index(cycle.device.index):
        _scalars.advance(cycle, micro_batch, ends_cycle=False)
        for table in tables:
            _displace.displace(table, cycle, share)
