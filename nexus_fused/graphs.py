"""CUDA graphs: whether steps are being captured, what may be captured, and the memory that replays use."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PREPARED_CYCLES = 4  # that can be captured without a step outside of a graph in between
PREPARED_PASSES = 8  # for each of them, where the number is open

_kernels: ModuleType | None = None
with contextlib.suppress(ImportError):
    from . import _C

    _kernels = _C if _C.CUDA_TARGETS else None


def capture_id(devices: list[torch.device]) -> int | None:
    """Returns None unless the current stream of an optimizer's devices (for the CPU, of the current device) is being
    captured, else a number for the capture: its own if the CUDA kernels were built, else one for all. Raises
    RuntimeError if the optimizer's work would not be part of the capture.
    """
    if not torch.cuda.is_initialized() or not any(map(_is_captured, devices)):  # to ask anything else needs a driver
        return None
    if len(devices) > 1 or devices[0].type != "cuda":
        raise RuntimeError(
            "step() is being captured into a CUDA graph, but parameters lie on "
            f"{' and '.join(map(str, devices))}: only an optimizer of one CUDA device can be captured"
        )
    return _kernels.cuda_capture_id(torch.cuda.current_stream(devices[0]).cuda_stream) if _kernels else 0


def may_be_captured(devices: list[torch.device]) -> bool:
    """Returns whether an optimizer of these devices can be captured at all."""
    return len(devices) == 1 and devices[0].type == "cuda"


def _is_captured(device: torch.device) -> bool:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return torch.cuda.is_current_stream_capturing()


def check_can_be_replayed(
    param_groups: list[dict[str, Any]], *, communicates: bool, ready: bool, inner_steps: int | None
) -> None:
    """Raises RuntimeError, with the remedy, for what a CUDA graph could not replay. ready: all memory that a cycle
    needs is there.
    """
    _check_hyperparameters(param_groups)
    if communicates:
        raise RuntimeError(
            "step() is being captured into a CUDA graph, but it communicates with other ranks, which is not "
            "supported there: leave step() out of the graph"
        )
    if not ready:
        steps = "" if inner_steps is None else f" ({inner_steps} steps)"
        raise RuntimeError(
            "step() is being captured into a CUDA graph, but memory would have to be allocated for it: run at "
            f"least one whole cycle{steps} before the capture, and after adding or unfreezing parameters or changing "
            "amsgrad"
        )


def _check_hyperparameters(param_groups: list[dict[str, Any]]) -> None:
    """Raises RuntimeError, with the remedy, for the first group that may not be captured."""
    for index, group in enumerate(param_groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"step() is being captured into a CUDA graph, but capturable is False in parameter group {index}: "
                "build NexusAdamW with capturable=True, or leave step() out of the graph"
            )
        for name, value in group.items():
            values = value if name == "betas" and isinstance(value, (tuple, list)) else (value,)
            hyper = name in ("lr", "inner_lr", "betas", "eps", "weight_decay", "max_lr", "base_lr")
            if hyper and any(isinstance(v, Tensor) and v.device.type == "cpu" for v in values):
                raise RuntimeError(
                    f"{name} of parameter group {index} is a tensor on the CPU, whose present value every replay of "
                    f"the CUDA graph would use: put it on the device, such as {name}=torch.tensor(..., device='cuda')"
                )


class Capture:
    """The capture into a CUDA graph in which the running cycle began. known: its number; ever: there has been one."""

    def __init__(self) -> None:
        self.known: int | None = None
        self.ever = False

    def cut(self, devices: list[torch.device], taken: int, inner_steps: int | None) -> RuntimeError | None:
        """Returns the error for a capture that begins or ends in mid-cycle, as one
        has now, after `taken` inner steps.
        """
        if taken == 0 or capture_id(devices) == self.known:
            return None
        if self.known is None:
            return RuntimeError(
                f"step() is being captured into a CUDA graph in mid-cycle, after {taken} of {inner_steps} inner steps: "
                "begin the capture at a boundary (optimizer.at_boundary), if need be after outer_step()"
            )
        return RuntimeError(
            f"a capture into a CUDA graph ended in mid-cycle, after {taken} of {inner_steps} inner steps: capture all "
            "steps of a cycle in one graph, and do not replay this one. What was captured has not run: the optimizer "
            "is where the cycle began"
        )

    def begin(self, number: int | None) -> None:
        """Notes the capture, if any, that the running cycle is part of."""
        self.known = number
        self.ever |= number is not None


class Replayed:
    """Memory that captured steps use at every replay: never reused, and never freed while the optimizer lives. Host
    memory that their copies read is pinned in advance, outside of captures, where that is allowed.
    """

    def __init__(self) -> None:
        self._prepared: list[Tensor] = []
        self._in_use: list[Tensor] = []

    def prepare(self, shape: torch.Size, dtype: torch.dtype, count: int) -> None:
        """Pins memory for `count` copies of CPU tensors."""
        self._prepared = [memory for memory in self._prepared if memory.shape == shape]
        for _ in range(count - len(self._prepared)):
            self._prepared.append(torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True))

    def keep(self, values: Tensor) -> Tensor:
        """Returns a copy of a CPU tensor that stays, in pinned memory. Raises RuntimeError if none is left."""
        if not self._prepared:
            raise RuntimeError(
                "too many steps were captured into CUDA graphs at once: run a step outside of a graph after every "
                f"{PREPARED_CYCLES} cycles that are captured"
            )
        self._in_use.append(self._prepared.pop().copy_(values))
        return self._in_use[-1]

    def hold(self, *tensors: Tensor) -> None:
        """Keeps alive device memory that a graph writes, whatever takes its place here."""
        self._in_use += tensors


def upload(values: Tensor, target: Tensor, replayed: Replayed | None = None) -> None:
    """Copies a CPU tensor that nobody else holds to `target`'s device, on its current stream, without waiting.
    replayed: given while the stream is captured; keeps the values for the replays.
    """
    if replayed is not None:
        target.copy_(replayed.keep(values), non_blocking=True)
    elif target.device.type == "cpu":
        target.copy_(values)
    else:  # the allocator of pinned memory keeps it until the copy is done
        target.copy_(values.pin_memory(), non_blocking=True)


def follow(owner: Any, uploaded: Tensor, capturing: bool, prepared: int) -> None:
    """Tells a table or a cycle whether it is captured, so that what replays use stays. prepared: the number of copies
    that pinned memory must be ready for, before.
    """
    owner.capturing = capturing
    if capturing:
        owner.hold()
    elif prepared:
        owner.replayed.prepare(uploaded.shape, uploaded.dtype, prepared)
