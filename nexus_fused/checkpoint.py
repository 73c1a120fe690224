"""A state on its way in and out: packs it, checks what is to be loaded before anything is modified, and copies it into
place.
"""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .dtensor import local_part, part_like
from .flat import STATE_DTYPE, Segment, real_dtype
from .options import GROUP_KEYS, OPTIMIZER, first_of, group_row, has_maxima, keys_of_group
from .walk import Walk

_KEYS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "remainder", "displacement", "anchor"}


def check(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], walk: Walk
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]], dict[Any, Any]]:
    """Compares `state_dict` with the optimizer's parameter groups. Returns copies of its groups, completed with
    `groups`; its entries by parameter; and the state that belongs to no parameter. Raises ValueError or TypeError,
    which names group and parameter and says what to do.
    """
    if not isinstance(state_dict, dict) or "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError("not an optimizer's state_dict: the keys 'state' and 'param_groups' are missing")
    saved = state_dict["param_groups"]
    if not isinstance(state_dict["state"], dict) or not isinstance(saved, (list, tuple)):
        kinds = f"{type(state_dict['state']).__name__} and {type(saved).__name__}"
        raise TypeError(
            f"'state' and 'param_groups' of the loaded state dict must be a dict and a list, but are {kinds}: the "
            "checkpoint is damaged"
        )
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, not {len(groups)}; "
            "build the optimizer with the groups it was saved with"
        )
    entries: dict[Tensor, dict[str, Any]] = {}
    names: dict[Any, Tensor] = {}
    for index, (group, loaded) in enumerate(zip(groups, saved, strict=True)):
        if not isinstance(loaded, dict) or not isinstance(loaded.get("params"), (list, tuple)):
            raise TypeError(
                f"group {index} of the loaded state dict must be a dict with a list under 'params': the checkpoint is "
                "damaged, or not an optimizer's"
            )
        if len(group["params"]) != len(loaded["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group "
                f"{index} has {len(loaded['params'])} parameters there and {len(group['params'])} here"
            )
        names.update(zip(loaded["params"], group["params"], strict=True))
    complete = [_completed(loaded, group) for loaded, group in zip(saved, groups, strict=True)]
    for index, (loaded, own) in enumerate(zip(saved, groups, strict=True)):
        if loaded.get("replicated", own["replicated"]) != own["replicated"]:
            warnings.warn(
                f"group {index} was saved with replicated={loaded['replicated']}, this optimizer keeps its "
                f"{own['replicated']}",
                stacklevel=7,
            )
    for group, own in zip(complete, groups, strict=True):
        if not own["params"]:  # torch.distributed.checkpoint loses its data, or leaves those that it had here
            for key in GROUP_KEYS:
                group.pop(key, None)
    inner_steps = walk.inner_steps
    position = _check_position(complete, inner_steps)
    for index, group in enumerate(complete):
        group_row(group, index, inner_steps)
        _check_totals(group, index)
        if position > 0 and groups[index]["params"]:
            needed = keys_of_group(groups, index)
            _check_cycle_data(group, index, needed, position, inner_steps, len(groups[index]["params"]))
        group["cycle_position"] = position

    foreign = {}
    for key, entry in state_dict["state"].items():
        if key in names:
            # From a flattened state torch.distributed.checkpoint makes {} of what it does not find.
            entries[names[key]] = entry
            if isinstance(entry, dict):
                entries[names[key]] = {k: v for k, v in entry.items() if not isinstance(v, dict) or v}
        else:
            foreign[key] = deepcopy(entry)
    for index, group in enumerate(complete):
        for i, param in enumerate(groups[index]["params"]):
            where = f"parameter {i} of group {index}"
            if entries.get(param):
                _check_entry(entries[param], param, where, group, position=position, local=walk.is_local)
            elif position > 0 and group["touched"][i]:
                raise ValueError(
                    f"the loaded state is at position {position} of a cycle, but {_lacks('displacement', where, param)}"
                )
    return complete, entries, foreign


def _completed(loaded: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Returns the loaded group, with the optimizer's own values for missing keys, and nothing of the running cycle."""
    own = {key: value for key, value in group.items() if key not in GROUP_KEYS and key != "params"}
    loaded = {key: value for key, value in loaded.items() if key != OPTIMIZER}  # whose group it is stays
    base_lr = first_of(loaded, "base_lr", "max_lr", "initial_lr", otherwise=own["base_lr"])
    return {
        **own,
        **deepcopy({key: value for key, value in loaded.items() if key != "params"}),
        "base_lr": base_lr,
        "replicated": own["replicated"],  # says how these ranks are laid out, as norm_group does
    }


def _check_position(groups: list[dict[str, Any]], inner_steps: int | None) -> int:
    positions = [group["cycle_position"] for group in groups if "cycle_position" in group]
    if any(position != positions[0] for position in positions):
        raise ValueError(f"the loaded parameter groups stand at different positions of a cycle: {positions}")
    position = positions[0] if positions else 0
    for index, group in enumerate(groups):
        if group["inner_steps"] != inner_steps:
            message = (
                f"group {index} was saved with inner_steps={group['inner_steps']}, this optimizer has {inner_steps}"
            )
            if position != 0:
                raise ValueError(
                    f"{message}: a cycle in progress ({position} steps) can only go on with its own inner_steps"
                )
            warnings.warn(f"{message}, which it keeps", stacklevel=8)
            group["inner_steps"] = inner_steps
    end = math.inf if inner_steps is None else inner_steps
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < end:
        highest = "" if inner_steps is None else f" to {inner_steps - 1}"
        raise ValueError(f"the loaded cycle_position must be a whole number from 0{highest}, but is {position!r}")
    return position


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1 and _has_values(value))


def _has_values(value: Tensor) -> bool:
    """Returns whether a tensor's values can be copied."""
    return value.layout is torch.strided and value.device.type != "meta" and not value.is_quantized


def _check_totals(group: dict[str, Any], index: int) -> None:
    for key in ("skipped_inner_steps", "skipped_outer_steps"):
        if not _is_number(group.get(key, 0)):
            raise TypeError(f"the loaded {key} of group {index} must be a number, but is {group[key]!r}")


def _check_cycle_data(
    group: dict[str, Any], index: int, needed: tuple[str, ...], position: int, inner_steps: int | None, n_params: int
) -> None:
    missing = [key for key in needed if key not in group]
    if missing:
        raise ValueError(
            f"the loaded state was saved in mid-cycle, but group {index} lacks {', '.join(missing)}: the checkpoint "
            "is truncated; load one that was saved at a boundary"
        )
    touched, norms = group["touched"], group.get("grad_norms", [0.0] * (inner_steps or position))
    if (
        not isinstance(norms, (list, tuple))
        or (inner_steps is not None and len(norms) != inner_steps)  # an open cycle has room for some
        or not all(map(_is_number, [group["walk_length"], group["walk_sq_length"], *norms]))
        or not isinstance(touched, (list, tuple))
        or [type(flag) for flag in touched] != [bool] * n_params
    ):
        raise ValueError(
            f"the loaded cycle data of group {index} (walk_length, walk_sq_length, grad_norms, touched) do not fit "
            f"{inner_steps or position} inner steps and {n_params} parameters: load a checkpoint that was saved at a "
            "boundary"
        )


def _lacks(key: str, where: str, param: Tensor) -> str:
    """Says why a key of mid-cycle is missing, and what to do."""
    if not param.requires_grad:
        return (
            f"{where}, which is frozen here, has no {key!r}: torch.distributed.checkpoint drops the state of frozen "
            "parameters, so freeze it after loading"
        )
    if key == "remainder":
        return f"{where} has no 'remainder': the checkpoint is truncated, or of a model in another dtype"
    return (
        f"{where} has no {key!r}: a distributed load fills only keys it finds, so call "
        "materialize_displacements() before it; if you did, the checkpoint is truncated"
    )


def _check_entry(entry: Any, param: Tensor, where: str, group: Any, *, position: int, local: bool) -> None:
    """Checks one parameter's state: complete, of the parameter's shape, with no unknown key."""
    if not isinstance(entry, dict):
        raise TypeError(f"the loaded state of {where} must be a dict, but is a {type(entry).__name__}")
    if is_lazy(param):
        raise ValueError(
            f"the loaded state has an entry for {where}, which is not initialized yet: load the model's weights or run "
            "a forward pass first"
        )
    if real_dtype(param.dtype) not in STATE_DTYPE:
        raise ValueError(f"the loaded state has an entry for {where}, which is {param.dtype} and has none: remove it")
    if "master" in entry or "walk" in entry or ("anchor" in entry and "displacement" not in entry):
        raise ValueError(
            f"the loaded state of {where} is of an older form, with 'anchor', 'master' or 'walk': this version keeps a "
            "'displacement' and a 'remainder'. Load the model's weights, and from this state only step, exp_avg and "
            "exp_avg_sq"
        )
    needed = {"step", "exp_avg", "exp_avg_sq"} if OPTIMIZER not in group else set()
    needed |= {"max_exp_avg_sq"} if has_maxima(group) else set()
    low_precision = STATE_DTYPE[real_dtype(param.dtype)] != real_dtype(param.dtype)
    missing, unknown = sorted(needed - entry.keys()), sorted(entry.keys() - _KEYS)
    if missing or unknown:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"the loaded state of {where} {' and '.join(what)}: it is truncated or of another optimizer; load a "
            "state of NexusAdamW or AdamW, or remove the whole entry to start this parameter from zero"
        )
    if position > 0:
        for key in ["displacement"] + ["remainder"] * low_precision + ["anchor"] * local:
            if key not in entry:
                raise ValueError(
                    f"the loaded state is at position {position} of a cycle, but {_lacks(key, where, param)}"
                )
        if "anchor" in entry and not local:
            raise ValueError(
                f"the loaded state of {where} has an 'anchor': ranks with a displacement_group saved it in mid-cycle. "
                "Build the optimizer with one, or load a checkpoint that was saved at a boundary"
            )
    for key, value in entry.items():
        check_value(key, value, param, f"the loaded {key!r} of {where}")


def check_value(key: str, value: Any, param: Tensor, what: str) -> None:
    """Raises unless a value may be copied into a parameter's state under this key. what: its name in an error."""
    if key == "step":
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{what} must be one number, but has shape {tuple(value.shape)}")
        if not _is_number(value):
            raise TypeError(f"{what} must be a number, but is {value!r}")
    elif not isinstance(value, Tensor) or not _fits(key, value, param):
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{what} is {got}, but the parameter is {tuple(param.shape)} {param.dtype}: it belongs to another model, "
            "or to one in another dtype"
        )
    elif not _has_values(value):
        raise ValueError(
            f"{what} is a {value.layout} tensor on {value.device}, whose values cannot be copied: load dense tensors "
            "with values, such as by torch.load(..., map_location='cpu')"
        )


def _fits(key: str, value: Tensor, param: Tensor) -> bool:
    """Returns whether a tensor of the state has the parameter's shape, and a dtype that may be copied into ours."""
    if key == "remainder" and value.dtype != param.dtype:  # its bits
        return False
    own = STATE_DTYPE[real_dtype(param.dtype)]
    if key not in ("remainder", "displacement") and own != torch.float64 and real_dtype(value.dtype) == torch.float64:
        return False  # nothing is narrowed
    shape, is_complex = param.shape, param.is_complex()
    if key == "displacement":
        wide = real_dtype(param.dtype) == torch.float64
        if real_dtype(value.dtype) not in ((torch.float64,) if wide else (torch.bfloat16, torch.float32)):
            return False
        if is_complex and value.dtype == torch.bfloat16:  # pairs: see flat.shaped_like
            shape, is_complex = torch.Size((*shape, 2)), False
    return value.shape == shape and value.is_complex() == is_complex


def pack(packed: dict[str, Any]) -> dict[str, Any]:
    """Gives torch.optim's state dict its own entries and its own copies of the cycle's scalars: our entries lose their
    displacements at the end of a cycle, and the scalars keep changing. The entries' tensors stay the live ones. Steps
    are on the CPU unless fused or capturable, as torch's.
    """
    copies: dict[int, torch.UntypedStorage] = {}
    packed["state"] = {key: dict(value) if isinstance(value, dict) else value for key, value in packed["state"].items()}
    for group in packed["param_groups"]:
        if OPTIMIZER not in group and not (group["fused"] or group["capturable"]):
            for key in group["params"]:
                if "step" in packed["state"].get(key, {}):
                    packed["state"][key]["step"] = packed["state"][key]["step"].cpu()
        group.update({key: _copied(group[key], copies) for key in GROUP_KEYS if key in group})
    return packed


def _copied(value: Any, copies: dict[int, torch.UntypedStorage]) -> Any:
    """Copies a tensor. Groups share views of one tensor, and so do copies: `copies` finds them by address."""
    if isinstance(value, list):
        return [_copied(item, copies) for item in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in copies:
        copies[storage.data_ptr()] = storage.clone()
    own = torch.empty(0, dtype=value.dtype, device=value.device)
    return own.set_(copies[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())


def apart(values: list[tuple[Segment, str, Any]], segments: list[Segment]) -> list[tuple[Segment, str, Any]]:
    """Returns the values, with copies of those that lie in our memory, where `copy_in` may overwrite them: whoever
    writes into the state, or loads one, may swap values.
    """
    ours = {local_part(tensor).data_ptr() for segment in segments for tensor in segment.shown.values()}

    def own(segment: Segment, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value is segment.shown.get(name):
            return value
        return value.clone() if local_part(value).untyped_storage().data_ptr() in ours else value

    return [(segment, name, own(segment, name, value)) for segment, name, value in values]


def restore_entry(segment: Segment, entry: dict[str, Any]) -> None:
    """Copies a checked entry into the memory where kernels work, with zeros for what it lacks."""
    for name in segment.names(in_cycle=True):
        if name in entry:
            copy_in(segment, name, entry[name])
        else:
            (segment.step if name == "step" else segment.buffer(name)).zero_()


def copy_in(segment: Segment, name: str, value: Any) -> None:
    """Copies a checked value of the state into the memory where kernels work."""
    if name == "step":
        segment.step.copy_(value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu"))
        return
    own, value = local_part(segment.shaped(name)), part_like(value, segment.param)
    if value.is_complex() != own.is_complex():  # displacements of other dtypes: see flat.shaped_like
        value = torch.view_as_real(value) if value.is_complex() else torch.view_as_complex(value.to(own.real.dtype))
    own.copy_(value)
