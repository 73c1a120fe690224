"""Flat, aligned buffers for weights and optimizer state, and the segments of them that belong to a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .dtensor import as_part_of, local_part

BUCKET_BYTES = 512 * 2**20  # bounds what construction needs beside parameters and state
ALIGNMENT = 64  # bytes: a cache line, the widest vector register

# The columns of a table, all int64: addresses in bytes (0: none), `grad_dtype` a number of DTYPES, `length` in real
# elements, `chunk` the number of the segment's first chunk. `struct Segment` in csrc/nexus_math.h is the same list; a
# test compares the two.
COLUMNS = (
    "weight", "remainder", "displacement", "anchor", "grad", "grad_dtype", "exp_avg", "exp_avg_sq", "max_exp_avg_sq",
    "step", "length", "group", "touched", "chunk",
)  # fmt: skip
WEIGHT, GRAD, GRAD_DTYPE, TOUCHED, CHUNK = map(COLUMNS.index, ("weight", "grad", "grad_dtype", "touched", "chunk"))

# The numbers by which kernels know dtypes: `enum DType` of csrc/nexus_math.h.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

# Dtype of a parameter -> dtype of w, of all arithmetic and of the moments.
STATE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# The state by its keys, which are the names of buffers too: what always exists, and what does in mid-cycle only.
MOMENTS = ("exp_avg", "exp_avg_sq")
IN_CYCLE = ("displacement", "anchor")

# Those that exist at a boundary too, where AdamW is ours; others' optimizers keep their own.
KEPT = ("step", *MOMENTS, "max_exp_avg_sq", "remainder")
OFFLOADED = (*MOMENTS, "max_exp_avg_sq", "anchor")  # those that lie on the host with `offload`


def state_dtypes(dtype: torch.dtype, displacement_dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the dtype of each buffer that parameters of `dtype` may have; D's is as given, except for float64."""
    own = STATE_DTYPE[dtype]
    dtypes = dict.fromkeys((*MOMENTS, "max_exp_avg_sq", "anchor"), own)
    if own != dtype:
        dtypes["remainder"] = dtype
    return {**dtypes, "displacement": own if dtype == torch.float64 else displacement_dtype}


def is_apart(device: torch.device) -> bool:
    """Returns whether this device has memory of its own, apart from the host's."""
    return device.type != "cpu"


def pinned_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Returns zeros in host memory that kernels on a GPU reach by its address."""
    return torch.zeros(numel, dtype=dtype, device="cpu", pin_memory=True)


def wait_for(device: torch.device) -> None:
    """Waits until a device has done all that it was given, including replays of CUDA graphs, which nobody else sees."""
    torch.accelerator.synchronize(device)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the real pairs of a complex dtype; a real dtype unchanged."""
    return dtype.to_real() if dtype.is_complex else dtype


def is_dense(tensor: Tensor) -> bool:
    """Returns whether `tensor` fills a range of memory without gaps or overlaps, its dimensions in any order."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_memory(tensor: Tensor) -> bool:
    """Returns whether kernels can reach its elements, if it has any. Fake, functional and freed tensors have none."""
    try:
        fake = tensor.untyped_storage().device.type == "meta"  # the storage of a FakeTensor, not the tensor, tells
        return not fake and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    except RuntimeError:  # what torch.func wraps has no storage
        return False


def flat_view(tensor: Tensor) -> Tensor:
    """Returns a one-dimensional real view of a dense tensor in the order of its
    memory; writes bump `tensor._version`.
    """
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def owns_its_memory(param: Tensor) -> bool:
    """Returns whether nobody would notice `param` moving: no view, alias, NumPy array or shared memory."""
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
    """Flat buffers of parameters of one group, device and dtype. Each parameter starts at an aligned offset."""

    group: int
    numel: int
    device: torch.device
    keeps: tuple[str, ...] = ()  # KEPT, or nothing
    offload: bool = False  # OFFLOADED lie in pinned host memory
    amsgrad: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)  # by their key in the state

    def ensure(self, name: str, dtype: torch.dtype) -> bool:
        """Allocates the buffer `name`, zeros, unless it exists. Returns whether it had to. Raises RuntimeError, which
        names the bytes, if host memory cannot be pinned.
        """
        if name in self.buffers:
            return False
        if not (self.offload and name in OFFLOADED):
            self.buffers[name] = torch.zeros(self.numel, dtype=dtype, device=self.device)
            return True
        try:
            self.buffers[name] = pinned_zeros(self.numel, dtype)
        except RuntimeError as error:
            raise RuntimeError(
                f"offload=True: {self.numel * dtype.itemsize} bytes of host memory for {name} of parameter group "
                f"{self.group} could not be pinned: free some, raise the limits of this process (ulimit -l, those of "
                f"its container), or build with offload=False ({error})"
            ) from error
        return True

    def hold(self) -> None:
        """Keeps pinned memory that is let go from being reused before the kernels of the current stream are done: a
        copy from it tells its allocator.
        """
        for buffer in self.buffers.values():
            if buffer.device != self.device:
                buffer[:1].to(self.device, non_blocking=True)


@dataclass(slots=True, eq=False)
class Segment:
    """One parameter: where its memory is, and in what shape. Of a DTensor, this rank's part."""

    param: Tensor
    dtype: torch.dtype
    group: int
    index: int  # within its group
    shape: torch.Size
    param_strides: tuple[int, ...]
    strides: tuple[int, ...]  # of the dense memory that kernels walk
    numel: int  # real elements
    low_precision: bool
    staged: Tensor | None = None  # dense twin of a parameter with gaps, copied in and out
    bucket: Bucket = field(init=False)
    start: int = 0
    step: Tensor = field(init=False)  # 0-dim float32, in memory of ours as the buffers are
    shown: dict[str, Tensor] = field(default_factory=dict)  # see `show`
    row: int = -1  # in its table
    flags: bytearray = field(default_factory=lambda: bytearray(1))  # one for each row of the table; see `touched`

    @property
    def touched(self) -> bool:
        """Whether it had a gradient in this cycle, so that its displacement is valid."""
        return self.flags[self.row] != 0

    @property
    def place(self) -> tuple[int, int]:
        """Group and index: the order of parameters."""
        return self.group, self.index

    @property
    def where(self) -> str:
        """How an error names this parameter."""
        return f"parameter {self.index} of group {self.group} (shape {tuple(self.param.shape)})"

    @property
    def fits(self) -> bool:
        """Whether the parameter still is what is described here, wherever it lies on its device."""
        local, device = self.local, self.bucket.device
        kind = real_dtype(local.dtype) is real_dtype(self.dtype) and local.device == device
        return kind and local.shape == self.shape and local.stride() == self.param_strides

    @property
    def local(self) -> Tensor:
        """The parameter's part on this rank, wherever it lies now."""
        return local_part(self.param)

    @property
    def weight(self) -> Tensor:
        """A flat view of the values that the model runs on; of their dense twin if the parameter has gaps."""
        return flat_view(self.local if self.staged is None else self.staged)

    def buffer(self, name: str) -> Tensor:
        """Returns a flat view of this parameter's part of a bucket's buffer."""
        return self.bucket.buffers[name][self.start : self.start + self.numel]

    def names(self, *, in_cycle: bool = False) -> list[str]:
        """Returns the keys of its state, at a boundary or in mid-cycle."""
        keeps = self.bucket.keeps
        names = [name for name in self.bucket.buffers if in_cycle or name in keeps]
        return ["step", *names] if "step" in keeps else names

    def show(self, name: str) -> Tensor:
        """Returns what the state shows under a key: always the same tensor, unless others gave it new memory."""
        own = self.step.view(1) if name == "step" else self.buffer(name)
        shown = self.shown.get(name)
        if shown is None or (self.numel and local_part(shown).data_ptr() != own.data_ptr()):
            shown = torch.from_dlpack(own).view(()) if name == "step" else self.shaped(name)
            self.shown[name] = shown
        return shown

    def shaped(self, name: str) -> Tensor:
        """Returns the parameter's part of a buffer, in its shape, with a storage of just its own bytes; a DTensor for a
        DTensor. DLPack makes that storage: a plain view would drag the whole buffer into every checkpoint of one
        parameter.
        """
        return as_part_of(shaped_like(self.buffer(name), self), self.param)


def shaped_like(flat: Tensor, segment: Segment) -> Tensor:
    """Returns `flat` (real, one-dimensional) with the segment's shape and strides, complex if that is, and a storage of
    its own. PyTorch has no complex bfloat16, so such displacements are shown as pairs, in one more dimension.
    """
    own = torch.from_dlpack(flat) if flat.numel() else torch.empty_like(flat)
    if not segment.dtype.is_complex:
        return own.as_strided(segment.shape, segment.strides)
    if flat.dtype == torch.bfloat16:
        return own.as_strided((*segment.shape, 2), (*(2 * stride for stride in segment.strides), 1))
    return torch.view_as_complex(own.view(-1, 2)).as_strided(segment.shape, segment.strides)


def make_segment(param: Tensor, *, group: int, index: int) -> Segment:
    """Describes `param`. Allocates nothing but the dense twin of a parameter with gaps."""
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
        staged=staged,
    )


def bucketed(segments: list[Segment], itemsize: int) -> Iterator[tuple[list[Segment], int]]:
    """Splits segments, in their order, into buckets of one group and of at most BUCKET_BYTES, or one larger parameter.
    Sets `start`.
    """
    aligned = ALIGNMENT // itemsize
    members: list[Segment] = []
    numel = 0
    for segment in segments:
        padded = -(-segment.numel // aligned) * aligned
        if members and ((numel + padded) * itemsize > BUCKET_BYTES or segment.group != members[0].group):
            yield members, numel
            members, numel = [], 0
        segment.start = numel
        members.append(segment)
        numel += padded
    if members:
        yield members, numel
