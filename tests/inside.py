"""The door to what an optimizer, a table and the backends keep private: tests and benchmarks name it here.

(Exceptions: stand-ins for the compiled CUDA kernels, `cuda._C`, in bench.gpu_sweep and the tests of those kernels.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_fused import NexusAdamW
from nexus_fused import flat as _flat
from nexus_fused import observer as _observer
from nexus_fused import passes as _passes
from nexus_fused import table as _table
from nexus_fused import walk as _walk
from nexus_fused.cycle import Cycle
from nexus_fused.ranks import Spread
from nexus_fused.table import Table

compiled_look = _observer._quick_look is not None
"""Whether the extension looks at parameters and gradients, or Python does."""

python_hook = _passes._in_python
"""What takes the place of the extension's hook where it was not built."""

# Of an optimizer


def tables(optimizer: NexusAdamW) -> list[Table]:
    """One for each device and dtype."""
    return list(optimizer._walk.tables.values())


def only_table(optimizer: NexusAdamW) -> Table:
    (table,) = tables(optimizer)
    return table


def segments(optimizer: NexusAdamW) -> list[Any]:
    """What is known of each parameter, table by table."""
    return [segment for table in tables(optimizer) for segment in table.segments]


def cycles(optimizer: NexusAdamW) -> list[Cycle]:
    """The scalars of the running cycle, one for each device."""
    return list(optimizer._walk.cycles.values())


def work(optimizer: NexusAdamW) -> list[tuple[Cycle, list[Table]]]:
    """Each cycle with its tables."""
    return optimizer._walk.work


def split_work(optimizer: NexusAdamW) -> None:
    """Has two cycles share the two tables of one device, as those of two devices do."""
    walk = optimizer._walk
    ((cycle, both),) = walk.work
    second = Cycle(cycle.device, cycle.room, cycle.backend)
    second.grow(len(optimizer.param_groups))
    walk.work = [(cycle, both[:1]), (second, both[1:])]
    walk.cycles = {(cycle.device, Spread()): cycle, (torch.device("meta"), Spread()): second}


def state_is_known(optimizer: NexusAdamW) -> bool:
    """Whether others may change `optimizer.state`."""
    return optimizer._state.entries.known


def backends_of(optimizer: NexusAdamW) -> list[str]:
    """The name of the backend that runs on each device."""
    return [cycle.backend.__name__.rpartition(".")[2] for cycle in cycles(optimizer)]


def demand_backend(optimizer: NexusAdamW, name: str) -> None:
    """Has parameters that come later use this one."""
    optimizer._walk.backend = name


def frozen(optimizer: NexusAdamW) -> list[Any]:
    """Parameters that wait for their first gradient."""
    return optimizer._state._frozen


def thaw(optimizer: NexusAdamW) -> None:
    """Gives frozen parameters that have a gradient by now state and a place in a table."""
    optimizer._state._thaw()


def set_position(optimizer: NexusAdamW, position: int) -> None:
    """Has the optimizer believe that it took so many inner steps in this cycle."""
    optimizer._walk.position = position
    optimizer._state.show_position()


def look(optimizer: NexusAdamW, *, gradients: bool) -> None:
    """Does what `step()` does before it starts a kernel."""
    optimizer._state.refresh(gradients=gradients)


def sq_norms(optimizer: NexusAdamW) -> list[Tensor]:
    """‖g‖² of all tables, after `look`."""
    return optimizer._walk.sq_norms(None)


# Of a table


def rebuild(table: Table) -> None:
    """Has its rows say where everything lies now."""
    table._outdated = True
    table.refresh()


def keep_anchors(optimizer: NexusAdamW) -> None:
    """Has θ kept beside w, as with a `displacement_group`; before the first step or right after parameters came."""
    for table in tables(optimizer):
        table.keeps_anchor = True
        if optimizer.cycle_position:
            table.ensure_displacements()


def look_at_all(table: Table) -> tuple[list[int], bool, bool]:
    """Rows that need another look, whether anything changed, and whether all have a gradient."""
    observer = table.observer
    return _observer._quick_look(observer.params, table.rows.data_ptr(), True, observer._objects.buffer_info()[0])


def copies(table: Table) -> dict[int, Tensor]:
    """This micro-batch's gradients that had other strides, by row."""
    return table.observer.copies


def look_in_python(patch: Any) -> None:
    """Leaves the extension's look away. patch: what has pytest's `monkeypatch.setattr`."""
    patch.setattr(_observer, "_quick_look", None)


def offload_on_cpu(patch: Any, pinned_zeros: Any, wait_for: Any) -> None:
    """Has the CPU count as a device with memory of its own. pinned_zeros(numel, dtype) allocates what is on the host
    then; wait_for(device) is what waits. patch: what has pytest's `monkeypatch.setattr`."""
    patch.setattr(_table, "is_apart", lambda device: True)
    patch.setattr(_flat, "pinned_zeros", pinned_zeros)
    patch.setattr(_walk, "wait_for", wait_for)


# Of backends and the demo


def try_out(device: torch.device, dtype: torch.dtype, displacement_dtype: torch.dtype = torch.bfloat16) -> None:
    """Compiles and runs Triton's kernels, whether or not it was done before."""
    from nexus_fused import triton

    triton._try_out.__wrapped__(device, dtype, displacement_dtype)


def replace_try_out(patch: Any, instead: Any) -> None:
    from nexus_fused import triton

    patch.setattr(triton, "_try_out", instead)
