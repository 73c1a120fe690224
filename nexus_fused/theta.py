"""Shows θ in mid-cycle, and puts the walk back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .dtensor import bits
from .flat import Segment
from .table import Table


class Kept(NamedTuple):
    """w of one parameter, in its parts (two below float32, else one), while θ is in its place."""

    table: Table
    segment: Segment
    parameter: Tensor
    remainder: Tensor | None


def show_outer_weights(tables: list[Table]) -> list[Kept]:
    """Puts θ into the parameters that walk. Returns what they held."""
    kept = []
    for table in tables:
        for segment in table.segments:
            if segment.touched:
                remainder = segment.buffer("remainder").clone() if segment.low_precision else None
                kept.append(Kept(table, segment, segment.weight.clone(), remainder))
    try:
        for one in kept:
            reference.set_weight(one.segment, _outer_weight(one))
    except BaseException:  # out of memory, for example
        _put_back(kept)
        raise
    finally:
        _tell(kept)
    return kept


def show_walk(kept: list[Kept]) -> None:
    """Puts w back, bit for bit. A value that others wrote meanwhile is θ now, and w moves along."""
    done = 0
    try:
        for one in kept:
            _take_over(one)
            done += 1
    except BaseException:
        _put_back(kept[done:])
        raise
    finally:
        _tell(kept)


def _take_over(kept: Kept) -> None:
    """Puts one parameter's w back where θ still stands. Where others wrote, their value is θ, and w moves along."""
    table, segment, parameter, remainder = kept
    if segment.staged is not None:
        segment.staged.copy_(segment.local.detach())
    shown, _ = reference.write_weight(_outer_weight(kept), parameter.dtype)
    written = bits(segment.weight) != bits(shown)
    theta = reference.weight(segment)
    w = reference.walked_weight(theta, reference.displacement(table, segment))
    new_parameter, new_remainder = reference.write_weight(w, parameter.dtype)
    new_parameter = torch.where(written, new_parameter, parameter)
    if table.keeps_anchor:
        segment.buffer("anchor").copy_(torch.where(written, theta, reference.on_device(segment, "anchor")))
    if new_remainder is not None and remainder is not None:
        segment.buffer("remainder").copy_(torch.where(written, new_remainder, remainder))
    segment.weight.copy_(new_parameter)


def _put_back(kept: list[Kept]) -> None:
    """Restores what the parameters held; allocates nothing, since memory may have run out."""
    for _, segment, parameter, remainder in kept:
        segment.weight.copy_(parameter)
        if remainder is not None:
            segment.buffer("remainder").copy_(remainder)


def _tell(kept: list[Kept]) -> None:
    """Tells the tables of these parameters that their weights were written."""
    for table in dict.fromkeys(one.table for one in kept):
        table.wrote([one.segment for one in kept if one.table is table])


def _outer_weight(kept: Kept) -> Tensor:
    """Returns θ of a parameter: exact if there is an anchor."""
    if kept.table.keeps_anchor:
        return reference.on_device(kept.segment, "anchor").clone()
    w = reference.read_weight(kept.parameter, kept.remainder)
    return reference.outer_weight(w, reference.displacement(kept.table, kept.segment))
