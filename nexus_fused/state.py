"""The life of a state: what `optimizer.state` shows, what is saved and loaded. The only writer of its keys."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .dtensor import local_part, part_like
from .flat import Segment
from .options import GROUP_KEYS
from .walk import Walk

_IN_CYCLE = ("displacement", "anchor")  # the keys that exist in mid-cycle only


class Shown:
    """Keeps the keys of `optimizer.state` in step with the memory of a walk."""

    def __init__(self) -> None:
        self._in_cycle: list[tuple[dict[str, Any], str, Tensor]] = []  # entries with what they show in mid-cycle
        self.shows_cycle = False

    def add(self, state: dict[Any, Any], segments: list[Segment]) -> None:
        """Gives parameters that came an entry, and entries the maxima that came; what is shown in mid-cycle goes."""
        for entry, name, _ in self._in_cycle if self.shows_cycle else ():
            entry.pop(name, None)
        self._in_cycle, self.shows_cycle = [], False
        for segment in segments:
            entry = state[segment.param]
            if not isinstance(entry.get("step"), Tensor):
                entry["step"] = segment.step
            for name in segment.bucket.buffers:
                if name not in _IN_CYCLE and not isinstance(entry.get(name), Tensor):
                    entry[name] = segment.shaped(name)

    def follow(self, state: dict[Any, Any], walk: Walk, *, in_cycle: bool) -> None:
        """Shows displacements and anchors in mid-cycle, and nothing of them at a boundary; their memory stays ours."""
        if in_cycle and not self._in_cycle:
            self._in_cycle = [
                (state[s.param], name, s.shaped(name))
                for s in walk.segments
                for name in _IN_CYCLE
                if name in s.bucket.buffers
            ]
        elif in_cycle == self.shows_cycle:
            return
        for entry, name, value in self._in_cycle:
            if in_cycle:
                entry[name] = value
            else:
                entry.pop(name, None)
        self.shows_cycle = in_cycle


def pack(packed: dict[str, Any]) -> dict[str, Any]:
    """Makes a state dict of its own from torch.optim's: our entries lose their displacements at the end of the cycle,
    and its scalars go on. Steps are on the CPU unless fused or capturable, as torch's."""
    packed["state"] = {key: dict(value) if isinstance(value, dict) else value for key, value in packed["state"].items()}
    for group in packed["param_groups"]:
        if not (group["fused"] or group["capturable"]):
            for key in group["params"]:
                if "step" in packed["state"].get(key, {}):
                    packed["state"][key]["step"] = packed["state"][key]["step"].cpu()
        group.update({key: deepcopy(group[key]) for key in GROUP_KEYS})
    return packed


def restore(walk: Walk, groups: list[dict[str, Any]], entries: dict[Tensor, dict[str, Any]]) -> None:
    """Copies checked entries into place, zeros where there are none; then the cycle's data of checked groups."""
    in_cycle = bool(groups) and groups[0].get("cycle_position", 0) > 0
    if in_cycle:
        walk.ensure_displacements()
    kept = {s.group for s in walk.segments if "max_exp_avg_sq" in (entries.get(s.param) or ())}
    walk.follow_amsgrad([{"amsgrad": group["amsgrad"] or i in kept} for i, group in enumerate(groups)])
    for segment in walk.segments:
        _restore_entry(segment, entries.get(segment.param) or {})
    walk.follow_amsgrad(groups)
    walk.load_group_data(groups)


def _restore_entry(segment: Segment, entry: dict[str, Any]) -> None:
    step = entry.get("step", 0.0)
    segment.step.copy_(step if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu"))
    for name in segment.bucket.buffers:
        own = local_part(segment.shaped(name))
        if name in entry:
            value = part_like(entry[name], segment.param)
            if value.is_complex() != own.is_complex():  # displacements of other dtypes: see flat.shaped_like
                value = (
                    torch.view_as_real(value) if value.is_complex() else torch.view_as_complex(value.to(own.real.dtype))
                )
            own.copy_(value)
        else:
            own.zero_()
