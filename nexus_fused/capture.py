"""Whether steps are being captured into a CUDA graph, and in which capture."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch

_kernels: ModuleType | None = None
with contextlib.suppress(ImportError):
    from . import _C

    _kernels = _C if _C.CUDA_TARGETS else None


def capture_id(devices: list[torch.device]) -> int | None:
    """None unless the current stream of an optimizer's devices (of the current device, for the CPU) is being captured,
    else a number of the capture: its own where the CUDA kernels were built, else the same for all.

    RuntimeError where the optimizer's work would not be part of the capture.
    """
    if not torch.cuda.is_initialized() or not any(map(_is_captured, devices)):  # to ask anything else needs a driver
        return None
    if len(devices) > 1 or devices[0].type != "cuda":
        raise RuntimeError(
            "step() is being captured into a CUDA graph, but parameters lie on "
            f"{' and '.join(map(str, devices))}: only an optimizer of one CUDA device can be captured"
        )
    return _kernels.cuda_capture_id(torch.cuda.current_stream(devices[0]).cuda_stream) if _kernels else 0


def _is_captured(device: torch.device) -> bool:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return torch.cuda.is_current_stream_capturing()


def check_hyperparameters(param_groups: list[dict[str, Any]]) -> None:
    """Whether every group may be captured: RuntimeError names the one that may not, and the remedy."""
    for index, group in enumerate(param_groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"step() is being captured into a CUDA graph, but capturable is False in parameter group {index}: "
                "build NexusAdamW with capturable=True, or leave step() out of the graph"
            )
        for name, value in group.items():
            values = value if name == "betas" and isinstance(value, (tuple, list)) else (value,)
            hyper = name in ("lr", "inner_lr", "betas", "eps", "weight_decay", "max_lr", "base_lr")
            if hyper and any(isinstance(v, torch.Tensor) and v.device.type == "cpu" for v in values):
                raise RuntimeError(
                    f"{name} of parameter group {index} is a tensor on the CPU, whose value of now every replay of the "
                    f"CUDA graph would use: put it on the device, for example {name}=torch.tensor(..., device='cuda')"
                )
