"""The options of a parameter group: a table of names and ranges, every check, and the rows that kernels read."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import dtensor
from .flat import STATE_DTYPE, has_memory, real_dtype

BFLOAT16_STEPS = 32  # roundings of D that leave it good enough
INNER_LR_FLOOR = 0.1  # of inner_lr: keeps the walk above float32's resolution at both ends of a schedule


class Range(NamedTuple):
    """The interval [low, high) of a number, or (low, high) with `open_low`."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False


# The columns of `Cycle.hyper`, all float64. `struct Hyper` in csrc/nexus_math.h is the same list; a test compares.
HYPER = {
    "inner_lr": Range(open_low=True),
    "lr": Range(),
    "beta1": Range(high=1),
    "beta2": Range(high=1),
    "eps": Range(),
    "weight_decay": Range(),
    "sign": None,  # of `maximize`
    "normalize": None,  # of `normalize_displacement`
}
INNER_LR, LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN, NORMALIZE = range(len(HYPER))

# The other options of a group, with the values that they may have.
FLAGS: dict[str, tuple[bool | None, ...]] = dict.fromkeys(
    ("amsgrad", "maximize", "capturable", "differentiable", "normalize_displacement", "inner_lr_follows_lr"),
    (True, False),
)
FLAGS["fused"] = (None, True, False)
FLAGS["replicated"] = (True, False)  # only of groups: see norm_group
_MAY_BE_NONE = ("amsgrad", "maximize", "capturable", "differentiable")  # which AdamW takes for False

# The options of a group that are the walk's, whatever optimizer follows it; with the key that says whose group it is.
WALK_OPTIONS = ("inner_lr", "inner_steps", "normalize_displacement", "inner_lr_follows_lr", "base_lr", "replicated")
OPTIMIZER = "nexus_optimizer"  # of Nexus: which of the optimizers behind the walk, from 0

KeptRows = list[tuple[tuple[Any, ...], list["float | Tensor"]]]  # what each group's row was made of, and the row
_VALUES = (*FLAGS, "inner_steps", "lr", "inner_lr", "eps", "weight_decay", "base_lr", "betas", "max_lr")

# Keys of a parameter group that belong to the running cycle; the same keys at every position, and lists of the same
# length: where it changes, torch.distributed.checkpoint mixes them with those that were there. What is one for the
# optimizer stands in the first group that has parameters: in each, checkpoints would grow with groups times K.
OPTIMIZER_KEYS = ("grad_norms", "skipped_inner_steps", "skipped_outer_steps")
GROUP_KEYS = ("cycle_position", "walk_length", "walk_sq_length", "touched", *OPTIMIZER_KEYS)


def number(value: Any, name: str, allowed: Range) -> float | Tensor:
    """Returns `value` as a float, or unchanged if it is a tensor of one element on a device other than the CPU. Raises
    TypeError for anything but a number, ValueError for a number out of range.
    """
    usual = type(value) is float  # asking for the other types takes longer than all the rest, at every step
    if not usual and isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, but is a tensor of shape {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, but is a {value.dtype} tensor")
        if value.device.type != "cpu":
            return value.detach().reshape(())  # reading it would wait for the device
        value = value.item()
    if not usual and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(
            f"{name} must be a number or a tensor of one element, but is {value!r} ({type(value).__name__})"
        )
    result, (low, high, open_low) = float(value), allowed
    if not (low < result if open_low else low <= result) or not result < high:
        interval = f"> {low}" if open_low else f">= {low}"
        raise ValueError(
            f"{name} must be {interval}{'' if high == math.inf else f' and < {high}'} and finite, but is {result}"
        )
    return result


def inner_steps(value: Any) -> int | None:
    """Returns `value`, the micro-batches in a cycle, at least 1; or None, where `step()` ends the cycle."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"inner_steps must be an int or None, but is {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"inner_steps must be at least 1, but is {value}")
    return int(value)


def displacement_dtype(value: Any, steps: int | None) -> torch.dtype:
    """Returns the dtype of D: `value`, or by default bfloat16 up to 32 inner steps, where its roundings do little, or
    an unknown number of them, and float32 beyond.
    """
    if value not in (None, torch.bfloat16, torch.float32):
        raise ValueError(
            f"displacement_dtype must be None (torch.bfloat16 up to {BFLOAT16_STEPS} inner steps, else torch.float32), "
            f"torch.bfloat16 or torch.float32, but is {value!r}; float64 parameters have float64 displacements "
            "whatever it is"
        )
    return value or (torch.bfloat16 if steps is None or steps <= BFLOAT16_STEPS else torch.float32)


def offload(value: Any) -> bool:
    """Returns `value`, which must be True or False."""
    if value is not True and value is not False:
        raise TypeError(f"offload must be True or False, but is {value!r} ({type(value).__name__})")
    return value


def plain(name: str, value: Any) -> Any:
    """Returns an option of a group in Python's own types, where torch.optim.AdamW takes others for the same: numbers
    and arrays of NumPy, fractions, lists of betas, 0 and 1 for a flag, None for some flags. Anything else comes back
    unchanged. torch.load(weights_only=True) reads no other types.
    """
    is_array = hasattr(value, "tolist") and not isinstance(value, Tensor)
    if name == "betas" and (is_array or isinstance(value, (Sequence, Tensor))) and not isinstance(value, str):
        return tuple(plain("", beta) for beta in value) if getattr(value, "ndim", 1) else value
    if is_array and getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        value = float(value)
    if name in FLAGS and ((value is None and name in _MAY_BE_NONE) or (type(value) is int and value in (0, 1))):
        value = bool(value)
    return value


def tidy(group: dict[str, Any]) -> None:
    """Makes the options of a group `plain`, in place; with others' optimizers only the walk's own."""
    ours = WALK_OPTIONS if OPTIMIZER in group else [key for key in group if key not in ("params", *GROUP_KEYS)]
    group.update((key, plain(key, group[key])) for key in ours if key in group)


def group_row(group: dict[str, Any], index: int, steps: int | None) -> list[float | Tensor]:
    """Checks a group and returns its row of `Cycle.hyper`. On a TypeError makes options `plain`, and tries again."""
    row = _walk_row if OPTIMIZER in group else _row
    try:
        return row(group, index, steps)
    except TypeError:
        tidy(group)  # here only: it takes longer than all the rest
    return row(group, index, steps)


def _walk_row(group: dict[str, Any], index: int, steps: int | None) -> list[float | Tensor]:
    """Returns the row of another optimizer's group, zeros in AdamW's columns. Without `lr` (or None) γ is constant."""
    ours = {key: group[key] for key in WALK_OPTIONS} | {"lr": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    ours |= dict.fromkeys(FLAGS, False) | {key: group[key] for key in FLAGS if key in WALK_OPTIONS}
    ours |= {key: bool(group.get(key)) for key in ("maximize", "differentiable")}
    ours |= {key: group[key] for key in ("lr", "max_lr") if group.get(key) is not None}
    return _row(ours, index, steps)


def _row(group: dict[str, Any], index: int, steps: int | None) -> list[float | Tensor]:
    """Returns the row with γ_k scheduled: γ_k = inner_lr · max(lr / base_lr, 0.1). base_lr is the peak that a
    OneCycleLR recorded, or the group's learning rate when it was added. γ_k = inner_lr where base_lr is 0 or
    `inner_lr_follows_lr` is False.
    """
    where = f"of parameter group {index}"
    for name, values in FLAGS.items():
        value = group[name]
        if value is not True and value is not False and (value is not None or None not in values):
            allowed_values = "None, True or False" if None in values else "True or False"
            raise TypeError(f"{name} {where} must be {allowed_values}, but is {value!r}")
    if group["differentiable"]:
        raise ValueError(
            f"differentiable=True {where}: kernels work in place on memory that autograd does not see; to "
            "differentiate through an optimizer, use one of torch.optim by itself"
        )
    if group["inner_steps"] != steps:
        raise ValueError(
            f"inner_steps {where} is {group['inner_steps']}, but all groups share that of the optimizer ({steps}): "
            "pass it to the constructor"
        )
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas {where} must be two numbers, but is {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas {where} must be either both floats or both Tensors, as for AdamW, but are {betas!r}")
    given = {"beta1": ("betas[0]", betas[0]), "beta2": ("betas[1]", betas[1])}
    row = []
    for column, allowed in HYPER.items():
        if allowed is not None:
            name, value = given.get(column) or (column, group[column])
            row.append(number(value, f"{name} {where}", allowed))
    row += [-1.0 if group["maximize"] else 1.0, float(group["normalize_displacement"])]
    if group["inner_lr_follows_lr"]:
        base_lr = number(group.get("max_lr", group["base_lr"]), f"base_lr {where}", HYPER["lr"])  # type: ignore[arg-type]
        row[INNER_LR] = row[INNER_LR] * _share_of_peak(row[LR], base_lr)
    return row


def first_of(group: dict[str, Any], *keys: str, otherwise: Any) -> Any:
    """Returns the first of these options that a group has and that is not None."""
    return next((group[key] for key in keys if group.get(key) is not None), otherwise)


def group_rows(groups: list[dict[str, Any]], steps: int | None, kept: KeptRows) -> list[list[float | Tensor]]:
    """Returns the row of each group. Updates those in `kept`; makes a row anew where a value is another object now, or
    a tensor, which others may have written into.
    """
    before = kept.copy()
    kept.clear()
    for index, group in enumerate(groups):
        values = tuple(map(group.get, _VALUES))
        betas = values[-2]
        if isinstance(betas, (tuple, list)):
            values = *values, *betas
        elif OPTIMIZER not in group:
            values = ()
        known, row = before[index] if index < len(before) else ((), [])
        if not values or len(values) != len(known) or not all(map(operator.is_, values, known)):
            row = group_row(group, index, steps)
            values = () if any(isinstance(value, Tensor) for value in (*values, *row)) else values
        kept.append((values, row))
    return [row for _, row in kept]


def has_maxima(group: dict[str, Any]) -> bool:
    """Returns whether we keep amsgrad's maxima for a group."""
    return bool(OPTIMIZER not in group and group["amsgrad"])


def keys_of_group(groups: list[dict[str, Any]], index: int) -> tuple[str, ...]:
    """Returns the cycle's keys that a group has."""
    first = next((i for i, group in enumerate(groups) if group["params"]), 0)
    return GROUP_KEYS if index == first else GROUP_KEYS[: -len(OPTIMIZER_KEYS)]


def _share_of_peak(lr: float | Tensor, base_lr: float | Tensor) -> float | Tensor:
    """Returns max(lr / base_lr, 0.1), or 1 where base_lr is 0."""
    if isinstance(base_lr, Tensor):
        return torch.where(base_lr == 0, 1.0, lr / base_lr.double()).clamp(min=INNER_LR_FLOOR)
    if base_lr == 0:
        return 1.0
    if isinstance(lr, Tensor):
        return (lr.double() / base_lr).clamp(min=INNER_LR_FLOOR)
    return max(lr / base_lr, INNER_LR_FLOOR)


def check_new_group(
    param_group: Any, defaults: dict[str, Any], index: int, steps: int | None, known: set[Tensor]
) -> list[Tensor]:
    """Checks a parameter group before anything is built from it, and returns its parameters as tensors, each once.
    Raises TypeError or ValueError, which names the group and the parameter.
    """
    if not isinstance(param_group, dict):
        raise TypeError(
            f"parameter group {index} must be a dict with the key 'params', but is a {type(param_group).__name__}"
        )
    if "params" not in param_group:
        raise ValueError(f"parameter group {index} has no key 'params'")
    foreign = [key for key in (*GROUP_KEYS, OPTIMIZER) if key in param_group]
    if foreign:
        raise ValueError(f"parameter group {index} sets {', '.join(foreign)}, which belong to the cycle: remove them")
    if isinstance(param_group["params"], set):
        raise TypeError(f"the parameters of group {index} are a set, whose order changes between runs: use a list")
    if isinstance(param_group["params"], Tensor):
        param_group["params"] = [param_group["params"]]
    param_group["params"] = list(param_group["params"])
    params = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in param_group["params"]]
    group_row({"base_lr": param_group.get("lr", defaults["lr"]), **defaults, **param_group}, index, steps)
    for i, param in enumerate(params):
        check_leaf(param, f"parameter {i} of group {index}")
        if not is_frozen(param):
            check_param(param, f"parameter {i} of group {index}")
        if param in known:
            raise ValueError(
                f"parameter {i} of group {index} appears in more than one parameter group: leave it in one"
            )
    return list(dict.fromkeys(params))


def is_frozen(param: Tensor) -> bool:
    """Returns whether `param` needs no state yet, or has no shape yet; then its
    dtype, layout and device do not matter.
    """
    return (not param.requires_grad and param.grad is None) or is_lazy(param)


def check_leaf(param: Any, where: str) -> None:
    """Raises unless this is a tensor that an optimizer may hold."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{where} must be a tensor, but is a {type(param).__name__}")
    if not param.is_leaf:
        raise ValueError(f"can't optimize a non-leaf Tensor: {where} is the result of an operation; pass nn.Parameters")


def check_param(param: Tensor, where: str) -> None:
    """Raises unless the walk can update this tensor."""
    if param.layout is not torch.strided:
        raise ValueError(f"{where} is sparse ({param.layout}): only dense parameters can walk")
    reason = dtensor.why_not(param)
    if reason is not None:
        raise TypeError(f"{where} {reason}")
    if not dtensor.is_dtensor(param) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(param):
        raise TypeError(f"{where} is a {type(param).__name__}, a wrapper around other tensors: pass the plain tensors")
    if real_dtype(param.dtype) not in STATE_DTYPE or param.dtype == torch.complex32:
        raise TypeError(f"{where} is {param.dtype}: use float64, float32, bfloat16, float16, complex64 or complex128")
    if param.is_inference():
        raise ValueError(f"{where} was made in inference mode and can never be trained: build the model outside of it")
    if param.device.type == "meta":
        raise ValueError(f"{where} is on the meta device: materialize the model before you build the optimizer")
    if not has_memory(dtensor.local_part(param)):
        raise TypeError(
            f"{where} has no memory, like tensors of FakeTensorMode, functional tensors, and those whose storage was "
            "freed: build the optimizer outside of such a mode, for a model that has its memory"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"{where} is an expanded tensor whose elements share memory: pass param.contiguous()")
