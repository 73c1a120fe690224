"""What others did since we last looked: gradients that came, parameters that moved."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import dtensor_type, is_dtensor, local_part, same_layout
from .flat import DTYPES, GRAD, GRAD_DTYPE, WEIGHT, Segment, has_memory, real_dtype

# The extension's quick look at parameters and gradients; without it Python looks at each.
_quick_look = None
with contextlib.suppress(ImportError):
    from . import _C

    if _C.prepare_to_look(Tensor, torch.nn.Parameter):
        _quick_look = _C.look


class Shown:
    """Tensors of ours that entries of a state show, to find out whether they still do, and in our memory. items: an
    entry, its key and the tensor.
    """

    def __init__(self, items: Sequence[tuple[dict[str, Any], str, Tensor]]) -> None:
        self._entries, self._keys, self._tensors = map(list, zip(*items, strict=True)) if items else ([], [], [])
        self._addresses = array("q", (local_part(tensor).data_ptr() for tensor in self._tensors))

    def unchanged(self) -> bool:
        """Returns whether nobody replaced them or moved their memory."""
        if _quick_look is not None:
            return _C.unchanged(self._entries, self._keys, self._tensors, self._addresses.buffer_info()[0])
        found = (entry.get(key) for entry, key in zip(self._entries, self._keys, strict=True))
        pairs = zip(found, self._tensors, self._addresses, strict=True)
        return all(value is own and local_part(own).data_ptr() == address for value, own, address in pairs)


class Observer:
    """Looks at the parameters of one table, and keeps the gradients that had to be copied. versions: whether to look
    for writes of others. copies: this micro-batch's gradients that had other strides, by row. complete: whether
    every row has a gradient.
    """

    def __init__(self, segments: list[Segment], device: torch.device, *, versions: bool) -> None:
        self._segments, self._device = segments, device
        self.params = [segment.param for segment in segments]
        self._has_dtensors = any(map(is_dtensor, self.params))
        if _quick_look is not None and self._has_dtensors:
            _C.prepare_to_look_at_dtensors(dtensor_type())
        self._objects = array("q", bytes(8 * len(segments)))  # of `_quick_look`
        self.copies: dict[int, Tensor] = {}
        self.complete = not segments
        self._compares_versions = versions
        self._versions: list[int] = []  # since we wrote the parameters

    def look(self, rows: Tensor, *, use: bool) -> tuple[bool, bool]:
        """Writes the addresses of gradients (0: none, -1: one without elements) and their dtypes into the rows of the
        table. use: False counts every parameter as without a gradient. Returns whether any of these changed, and
        whether a parameter lies elsewhere than its row says. Raises RuntimeError for a gradient that does not fit
        its parameter, or a parameter that was converted.
        """
        self.copies.clear()
        if _quick_look is None:
            changed, unusual = True, list(range(len(self._segments)))
            rows[:, GRAD] = 0
        else:
            # Else each attribute of a DTensor is preceded by a search for its `__torch_function__`.
            with torch._C.DisableTorchFunctionSubclass() if self._has_dtensors else contextlib.nullcontext():
                found = _quick_look(self.params, rows.data_ptr(), use, self._objects.buffer_info()[0])
            unusual, changed, self.complete = found
        elsewhere = False
        for row in unusual:
            segment = self._segments[row]
            elsewhere |= self._look_at_parameter(segment, int(rows[row, WEIGHT]))
            grad = segment.param.grad if use else None
            if grad is not None:
                grad = self._readable(segment, grad)
                rows[row, GRAD_DTYPE] = DTYPES[real_dtype(grad.dtype)]
                rows[row, GRAD] = grad.data_ptr() or -1  # an empty gradient is one all the same, without memory
        if unusual:
            changed, self.complete = True, bool((rows[:, GRAD] != 0).all())
        return changed, elsewhere

    def take_versions(self) -> None:
        """Remembers the parameters as they are, if writes of others are looked for."""
        if self._compares_versions:
            self._versions = self._versions_now()

    def forget_versions(self) -> None:
        """Lets writes up to the next step pass: they may be the walk that belongs to a state just loaded."""
        self._versions = []

    def written(self) -> list[Segment]:
        """Returns the segments that others wrote into since we did, if that is looked for."""
        if not self._versions:
            return []
        versions = zip(self._segments, self._versions_now(), self._versions, strict=True)
        return [segment for segment, now, then in versions if now != then]

    def _versions_now(self) -> list[int]:
        """Returns numbers that grow with every write that autograd sees, through a DTensor or into its part."""
        return [s.param._version + (s.local._version if is_dtensor(s.param) else 0) for s in self._segments]

    def gradient(self, segment: Segment) -> Tensor | None:
        """Returns this micro-batch's gradient of a segment, dense with its strides; None without one."""
        copied = self.copies.get(segment.row)
        return copied if copied is not None else local_part(segment.param.grad)

    def let_go(self) -> None:
        """Drops all gradients."""
        self.copies.clear()
        for param in self.params:
            param.grad = None

    def _look_at_parameter(self, segment: Segment, address: int) -> bool:
        """Returns whether a parameter lies elsewhere than at `address`; updates the dense twin of one with gaps."""
        local = segment.local
        if not segment.fits:
            raise RuntimeError(
                f"{segment.where} was {segment.dtype} on {self._device} with strides {segment.param_strides} when the "
                f"optimizer was built and is now {tuple(local.shape)} {local.dtype} on {local.device} with strides "
                f"{local.stride()}: convert or move the model (model.half(), model.to(...)) first and build the "
                "optimizer after it"
            )
        if segment.staged is not None:
            segment.staged.copy_(local.detach())
            return False
        return local.data_ptr() != address

    def _readable(self, segment: Segment, grad: Tensor) -> Tensor:
        """Returns the gradient as kernels can read it, this rank's part of a DTensor; a copy if it lies otherwise."""
        kept = grad
        if not same_layout(grad, segment.param):
            kept = grad = _redistributed(segment, grad)
        grad = local_part(grad)
        fits = grad.layout is torch.strided and grad.shape == segment.shape and grad.device == self._device
        if not fits or real_dtype(grad.dtype) not in DTYPES or grad.is_complex() != segment.dtype.is_complex:
            raise RuntimeError(_misfit(segment, grad))
        if not has_memory(grad):
            raise RuntimeError(
                f"the gradient of {segment.where} has no memory, like tensors of FakeTensorMode: set p.grad to None or "
                "to a tensor like p"
            )
        if grad.stride() != segment.strides or grad.is_neg() or grad.is_conj():
            dense = torch.empty_strided(segment.shape, segment.strides, dtype=grad.dtype, device=self._device)
            kept = grad = dense.copy_(grad.detach())
        if kept is not segment.param.grad:
            self.copies[segment.row] = grad
        return grad


def _redistributed(segment: Segment, grad: Tensor) -> Tensor:
    """Returns this rank's part of a gradient that is spread otherwise than its parameter, or not reduced yet."""
    param: Any = segment.param
    if is_dtensor(grad) and is_dtensor(param) and grad.device_mesh == param.device_mesh:  # type: ignore[attr-defined]
        return local_part(grad.redistribute(param.device_mesh, param.placements))  # type: ignore[attr-defined]
    raise RuntimeError(
        f"the gradient of {segment.where} is a {type(grad).__name__} and its parameter a {type(param).__name__}, or "
        "they are DTensors on different meshes: set p.grad to None or to a tensor that is spread as p is"
    )


def _misfit(segment: Segment, grad: Tensor) -> str:
    """Says why this gradient cannot be used, and what to do."""
    if grad.layout is not torch.strided:
        return (
            f"the gradient of {segment.where} is sparse ({grad.layout}), which the walk does not support: "
            "use nn.Embedding(sparse=False), or torch.optim.SparseAdam by itself for this parameter"
        )
    return (
        f"the gradient of {segment.where} has shape {tuple(grad.shape)}, {grad.dtype} on {grad.device}, its parameter "
        f"{tuple(segment.shape)}, {segment.param.dtype} on {segment.local.device}: "
        "set p.grad to None or to a tensor like p (its floating dtype may differ)"
    )
