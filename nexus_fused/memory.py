"""Bytes per parameter at the peak of a training step, from the dtypes that tables give their buffers."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from .flat import MOMENTS, STATE_DTYPE, state_dtypes
from .options import displacement_dtype


class Bytes(NamedTuple):
    """Bytes for each parameter that a rank has. weight: with its remainder or float32 master. moments: what the outer
    optimizer keeps. walk: D, and θ if ranks walk on their own. host: in the host's memory; all else is on the
    device.
    """

    weight: int
    gradient: int
    moments: float
    walk: int = 0
    host: int = 0

    @property
    def device(self) -> float:
        """The sum of all but `host`."""
        return self.weight + self.gradient + self.moments + self.walk


def adamw(
    dtype: torch.dtype, *, gradients: torch.dtype | None = None, master: bool = False, amsgrad: bool = False
) -> Bytes:
    """Counts torch.optim.AdamW, whose moments have its weights' dtype. master: these weights are float32 copies."""
    own = STATE_DTYPE[dtype] if master else dtype
    weight = dtype.itemsize + own.itemsize * (own != dtype)
    return Bytes(weight, (gradients or dtype).itemsize, own.itemsize * (len(MOMENTS) + amsgrad))


def nexus_adamw(
    dtype: torch.dtype,
    inner_steps: int,
    *,
    gradients: torch.dtype | None = None,
    displacements: torch.dtype | None = None,
    amsgrad: bool = False,
    offload: bool = False,
    local: bool = False,
) -> Bytes:
    """Counts NexusAdamW. displacements: its `displacement_dtype`. local: ranks walk on their own."""
    sizes = _sizes(dtype, inner_steps, displacements)
    walk = sizes["displacement"] * (inner_steps > 1 or local) + sizes["anchor"] * (inner_steps > 1 and local)
    moments = sum(sizes[name] for name in MOMENTS) + sizes["max_exp_avg_sq"] * amsgrad
    own = dtype.itemsize + sizes["remainder"], (gradients or dtype).itemsize
    return Bytes(*own, 0, walk, host=moments) if offload else Bytes(*own, moments, walk)


def nexus(dtype: torch.dtype, inner_steps: int, state: float, *, displacements: torch.dtype | None = None) -> Bytes:
    """Counts Nexus in front of an optimizer that keeps `state` bytes. It reads D/Γ in its weights' dtype."""
    sizes = _sizes(dtype, inner_steps, displacements or (torch.float32 if inner_steps == 1 else None))
    return Bytes(dtype.itemsize + sizes["remainder"], dtype.itemsize, state, sizes["displacement"])


def _sizes(dtype: torch.dtype, inner_steps: int, displacements: torch.dtype | None) -> dict[str, int]:
    dtypes = state_dtypes(dtype, displacement_dtype(displacements, inner_steps))
    return {"remainder": 0, **{name: kept.itemsize for name, kept in dtypes.items()}}


def compared(
    dtype: torch.dtype,
    inner_steps: int,
    *,
    gradients: torch.dtype | None = None,
    amsgrad: bool = False,
    state: float | None = None,
) -> dict[str, Bytes]:
    """Returns the rows of the command's table. state: bytes that an optimizer other than AdamW keeps."""
    ours = partial(nexus_adamw, dtype, inner_steps, gradients=gradients, amsgrad=amsgrad)
    found = {"AdamW": adamw(dtype, amsgrad=amsgrad)}
    if STATE_DTYPE[dtype] != dtype:
        found["AdamW, float32 master"] = adamw(dtype, gradients=gradients, master=True, amsgrad=amsgrad)
    found["NexusAdamW"] = ours()
    found["NexusAdamW, displacement_dtype=torch.float32"] = ours(displacements=torch.float32)
    found["NexusAdamW, offload=True"] = ours(offload=True)
    found["NexusAdamW, local walks"] = ours(local=True)
    found["Nexus(AdamW)"] = nexus(dtype, inner_steps, found["AdamW"].moments)
    if state is not None:
        found["another optimizer"] = Bytes(dtype.itemsize, dtype.itemsize, state)
        found["Nexus(another optimizer)"] = nexus(dtype, inner_steps, state)
    return found
