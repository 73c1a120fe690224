"""The Triton backend: starts the kernels of triton_kernels/ on the current stream of the tables' device. reference.py
defines its functions. Nothing returns to the host. Launches for one table: an inner step 3 (norm, scalars, step),
the end of a walk 3, an outer step 4 (sums too), AdamW after a walk 3, `gradients` 2.
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
from .triton_kernels import end_walk as _end_walk
from .triton_kernels import gradients as _gradients
from .triton_kernels import inner_step as _inner_step
from .triton_kernels import outer_step as _outer_step
from .triton_kernels import scalars as _scalars
from .triton_kernels import sq_norm as _sq_norm

# Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on CPU tensors then, and only there.
INTERPRETED = not isinstance(_sq_norm.sq_norm_kernel, triton.JITFunction)


def why_not_on(device: torch.device, dtype: torch.dtype, displacement_dtype: torch.dtype) -> str | None:
    """Returns None if the kernels can update tensors of `dtype` on `device`, else the reason."""
    if INTERPRETED:
        return (
            None if device.type == "cpu" else "TRITON_INTERPRET=1 is set, so its kernels run on CPU tensors: unset it"
        )
    if not torch.accelerator.is_available():
        return "its kernels run on a GPU and PyTorch sees none (torch.accelerator.is_available() is False)"
    if device.type not in ("cuda", "xpu"):
        return f"its kernels run on a GPU and a parameter is on {device}: move the model before the optimizer is built"
    try:
        _try_out(device, dtype, displacement_dtype)
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache  # of successes: an error is tried again
def _try_out(device: torch.device, dtype: torch.dtype, displacement_dtype: torch.dtype) -> None:
    """Compiles every variant of every kernel for these dtypes, so that nothing is left to compile, or to fail, in the
    middle of a step. Runs four cycles of three tables with one small parameter each: three, so that one is neither
    first nor last. Raises RuntimeError if something fails.
    """
    tables, cycle = (
        [Table(device, dtype, displacement_dtype) for _ in range(3)],
        Cycle(device, 2, sys.modules[__name__]),
    )
    for table in tables:
        param = torch.ones(8, dtype=dtype, device=device, requires_grad=True)
        param.grad = torch.ones_like(param)
        table.extend([make_segment(param, group=0, index=0)], flatten=False)
        table.ensure_displacements()
    cycle.grow(1)
    cycle.set_hyper([[0.01, 0.01, 0.9, 0.9, 1e-8, 0.0, 1.0, 1.0]])
    one = torch.ones((), device=device)
    for amsgrad, grad_scale, found_inf in (False, None, None), (True, one, one), (False, one, None), (False, None, one):
        for table in tables:
            table.follow_amsgrad([amsgrad])
            table.read_gradients(use=True)
        sq_norms = [sq_norm(table) for table in tables]
        inner_step(tables, cycle, MicroBatch(sq_norms, 0))
        for table in tables:
            table.finish_inner_step()
        outer_step(tables, cycle, MicroBatch(sq_norms, 1, grad_scale, found_inf), 2)
        for table in tables:
            table.finish_outer_step()
    end_walk(tables[:1], cycle, None, 1.0)
    gradients(tables[0], cycle, torch.ones_like(cycle.factor), [torch.empty(8, dtype=dtype, device=device)])
    adamw(tables[:1], cycle, [torch.ones(1, device=device)], 0)


def sq_norm(table: Table) -> Tensor:
    """Returns ‖g‖² over the table's gradients, as a partial sum for each chunk: [chunks], float64."""
    with torch.accelerator.device_index(table.device.index):
        partials: Tensor = _sq_norm.sq_norm(table)
        return partials


def inner_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch) -> None:
    """D ← Q(D + γ·g/n), w ← θ − D. Moves 16 bytes per element in float32, 14 below; 2 less the first time."""
    with torch.accelerator.device_index(cycle.device.index):
        _scalars.advance(cycle, micro_batch, ends_cycle=False)
        for table in tables:
            _inner_step.inner_step(table, cycle)


def outer_step(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, taken: int) -> None:
    """Takes the last inner step, ends the walk and applies AdamW in one pass: 30 bytes per element in float32, 28
    below.
    """
    _end_cycle(tables, cycle, micro_batch, None, taken)


def end_walk(tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, share: float) -> None:
    """Takes the last inner step; w ← θ, D ← Q(D · share): 16 bytes per element in float32, 14 below."""
    with torch.accelerator.device_index(cycle.device.index):
        _scalars.advance(cycle, micro_batch, ends_cycle=False)
        for table in tables:
            _end_walk.end_walk(table, cycle, share)


def gradients(table: Table, cycle: Cycle, scale: Tensor, targets: list[Tensor | None]) -> None:
    """Writes D · scale into memory of its own, and sums ‖D‖²: 6 bytes per element in float32, 4 below."""
    with torch.accelerator.device_index(table.device.index):
        _gradients.gradients(table, cycle, scale, targets)


def adamw(tables: list[Table], cycle: Cycle, moved: list[Tensor], taken: int) -> None:
    """Applies AdamW to θ and D after `end_walk`: 26 bytes per element, in float32 and below."""
    _end_cycle(tables, cycle, None, moved, taken)


def _end_cycle(
    tables: list[Table], cycle: Cycle, micro_batch: MicroBatch | None, moved: list[Tensor] | None, taken: int
) -> None:
    with torch.accelerator.device_index(cycle.device.index):
        _scalars.advance(cycle, micro_batch, ends_cycle=True)
        if moved is None:
            on_device = [table.on_device() for table in tables]
        else:
            on_device = [table.on_device_after_walk(who) for table, who in zip(tables, moved, strict=True)]
        for table, what in zip(tables, on_device, strict=True):
            _outer_step.outer_step(table, what, cycle, has_ended=moved is not None)
        _scalars.finish(tables, on_device, cycle, taken)
