"""Flat, aligned buffers for weights and optimizer state, and the segments of them that belong to a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dtensor import as_part_of, local_part, part_like

BUCKET_BYTES = 512 * 2**20  # bounds what construction needs beside parameters and state
ALIGNMENT = 64  # bytes: a cache line, the widest vector register

# Storage dtype of a parameter -> dtype its walk, master and moments are computed and kept in.
STATE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real pairs for a complex dtype, the dtype itself otherwise."""
    return dtype.to_real() if dtype.is_complex else dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether `tensor` fills a range of memory without gaps or overlaps, its dimensions in any order."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat_view(tensor: Tensor) -> Tensor:
    """One-dimensional real view of a dense tensor in the order of its memory; writes bump `tensor._version`."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def owns_its_memory(param: Tensor) -> bool:
    """Whether nobody would notice that `param` moves to other memory: no view, alias, NumPy array, shared memory."""
    storage = param.untyped_storage()
    return (
        storage.nbytes() == param.numel() * param.element_size()
        and storage.resizable()  # False for memory that another library lent
        and not (param.device.type == "cpu" and param.is_shared())
        # 2: the parameter and the variable `storage` above.
        and torch._C._storage_Use_Count(storage._cdata) == 2
    )


@dataclass(slots=True, eq=False)
class Bucket:
    """Flat buffers of some parameters of one group, device and dtype; each parameter starts at an aligned offset."""

    group: int
    numel: int
    state_dtype: torch.dtype
    device: torch.device
    amsgrad: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)
    flat: Tensor | None = None  # weights of the parameters that could be moved, each at its offset

    def ensure(self, name: str) -> bool:
        """Allocates the buffer `name`, zeros, unless it exists; returns whether it had to."""
        if name in self.buffers:
            return False
        self.buffers[name] = torch.zeros(self.numel, dtype=self.state_dtype, device=self.device)
        return True


@dataclass(slots=True, eq=False)
class Segment:
    """One parameter: where its memory is and what shape that has; of a DTensor, this rank's part."""

    param: Tensor
    dtype: torch.dtype
    group: int
    index: int  # within its group
    shape: torch.Size
    param_strides: tuple[int, ...]
    strides: tuple[int, ...]  # of the dense memory that kernels walk
    numel: int  # real elements
    low_precision: bool
    state: dict[str, Any]
    staged: Tensor | None = None  # dense twin of a parameter with gaps, copied in and out
    bucket: Bucket = field(init=False)
    start: int = 0
    step: Tensor = field(init=False)
    cycle_view: Tensor | None = None  # anchor or walk as the state shows it in mid-cycle
    touched: bool = False  # had a gradient in this cycle, so theta and walk are both valid
    row: int = -1  # in its table

    @property
    def where(self) -> str:
        """How an error names this parameter."""
        return f"parameter {self.index} of group {self.group} (shape {tuple(self.param.shape)})"

    @property
    def local(self) -> Tensor:
        """The parameter's part on this rank, wherever it lies now."""
        return local_part(self.param)

    @property
    def version(self) -> int:
        """Grows with every write that autograd sees: through a DTensor, or into its local part."""
        local = self.local
        return self.param._version + (local._version if local is not self.param else 0)

    @property
    def theta_name(self) -> str:
        """The buffer that holds θ during a cycle: a persistent float32 master below float32, else the anchor."""
        return "master" if self.low_precision else "anchor"

    @property
    def cycle_key(self) -> str:
        """The state key that exists in mid-cycle only: the buffer that is dead at a boundary."""
        return "walk" if self.low_precision else "anchor"

    @property
    def weight(self) -> Tensor:
        """Flat view of the values the model runs on (of their dense twin for a parameter with gaps)."""
        return flat_view(self.local if self.staged is None else self.staged)

    def buffer(self, name: str) -> Tensor:
        """Flat view of this parameter's part of a bucket's buffer."""
        return self.bucket.buffers[name][self.start : self.start + self.numel]

    @property
    def theta(self) -> Tensor:
        return self.buffer(self.theta_name)

    @property
    def walk(self) -> Tensor:
        return self.buffer("walk") if self.low_precision else self.weight

    def shaped(self, name: str) -> Tensor:
        """The parameter's part of a buffer, in its shape and with a storage of just its own bytes; a DTensor for one.

        DLPack makes that storage. A plain view would drag the whole buffer into every checkpoint of one parameter.
        """
        return as_part_of(shaped_like(self.buffer(name), self), self.param)

    def theta_versions(self) -> list[tuple[str, int]]:
        """Of θ and the walk, where the state shows them: each grows with every write through the state's tensor."""
        shown = [(name, self.state.get(name)) for name in (self.theta_name, self.cycle_key)]
        return [(name, local_part(value)._version) for name, value in shown if isinstance(value, Tensor)]

    def adopt(self, *, restart: bool, shown: Tensor | None = None, with_state: bool = False) -> None:
        """Takes over values that somebody else wrote into the parameter; with_state: and into θ and the walk as well.

        Full precision: they are θ already; with `restart` a walk under way starts anew from them. Below float32: an
        element that no longer is the rounding of `shown` (by default the walk, or θ where there is none) replaces its
        float32 value; the others keep their precision.
        """
        if self.staged is not None:
            self.staged.copy_(self.local.detach())
        if with_state:
            return
        if self.low_precision:
            if shown is None:
                shown = self.walk if self.touched else self.theta
            written = self.weight != shown.to(self.weight.dtype)
            values = self.weight.to(self.theta.dtype)
            for kept in (self.theta, self.walk) if self.touched else (self.theta,):
                kept.copy_(torch.where(written, values, kept))
        elif self.touched and restart:
            self.theta.copy_(self.weight)

    def restore(self, entry: dict[str, Any] | None) -> None:
        """Copies a checked state entry into place; zero state without one. A master in it wins over the parameter."""
        for name in ("step", *self.bucket.buffers):
            own = self.state.get(name)
            if own is None:  # a walk's buffer, at a boundary
                continue
            if entry and name in entry:
                value = entry[name]
                if name == "step":
                    own.copy_(value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu"))
                else:
                    local_part(own).copy_(part_like(value, self.param))
            elif name == "master":
                self.theta.copy_(self.weight)
            else:
                local_part(own).zero_()
        if entry and "master" in entry and not self.low_precision:
            self.local.detach().copy_(part_like(entry["master"], self.param))


def shaped_like(flat: Tensor, segment: Segment) -> Tensor:
    """`flat` (real, one-dimensional) with the shape, strides and complexness of the segment, own storage."""
    own = torch.from_dlpack(flat) if flat.numel() else torch.empty_like(flat)
    if segment.dtype.is_complex:
        own = torch.view_as_complex(own.view(-1, 2))
    return own.as_strided(segment.shape, segment.strides)


def make_segment(param: Tensor, *, group: int, index: int, state: dict[str, Any]) -> Segment:
    """Describes `param`; nothing is allocated for it but the dense twin of a parameter with gaps."""
    dtype, local = real_dtype(param.dtype), local_part(param)
    staged = None
    if not is_dense(local):
        staged = local.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return Segment(
        param=param,
        dtype=param.dtype,
        group=group,
        index=index,
        shape=local.shape,
        param_strides=local.stride(),
        strides=local.stride() if staged is None else staged.stride(),
        numel=local.numel() * (2 if param.is_complex() else 1),
        low_precision=STATE_DTYPE[dtype] != dtype,
        state=state,
        staged=staged,
    )


def bucketed(segments: list[Segment], itemsize: int) -> Iterator[tuple[list[Segment], int]]:
    """Splits segments, in their order, into buckets of at most BUCKET_BYTES (or one larger parameter); sets `start`."""
    aligned = ALIGNMENT // itemsize
    members: list[Segment] = []
    numel = 0
    for segment in segments:
        padded = -(-segment.numel // aligned) * aligned
        if members and (numel + padded) * itemsize > BUCKET_BYTES:
            yield members, numel
            members, numel = [], 0
        segment.start = numel
        members.append(segment)
        numel += padded
    if members:
        yield members, numel
