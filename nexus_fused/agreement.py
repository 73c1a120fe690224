"""What ranks must agree about, and how they find out whether they do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .cycle import combine, summarize
from .dtensor import checksum, is_dtensor
from .options import HYPER, group_row, is_frozen
from .ranks import check_group, difference
from .replicas import compare_norms
from .walk import Walk

Groups = list[dict[str, Any]]


def compare(
    walk: Walk,
    groups: Groups,
    state: Any,
    when: str,
    error: Exception | None = None,
    *,
    loads: int | None = None,
    weights: Sequence[Tensor] = (),
) -> None:
    """Raises RuntimeError on all ranks that communicate if they disagree. error: this rank's own, sent along so that
    others do not wait for it. loads: a position that is being loaded. weights: parameters whose values must be the
    same on ranks that walk on their own.
    """
    if walk.ranks.communicates:
        here, of_params = _agreed(walk, groups, state, loads, error, hyper=loads is None and error is None)
        walks: dict[str, Any] = {"displacement_dtype": str(walk.displacement_dtype)}
        if walk.is_local:
            late = "which must be broadcast from one rank before the optimizer gets it"
            walks |= {f"the value of parameter {i}, {late}": checksum(p) for i, p in enumerate(weights)}
        walk.ranks.check(here, of_params, walks, when)


def compare_for_debugging(walk: Walk, groups: Groups, state: Any, when: str, *, averages: bool) -> None:
    """Compares at each step if torch.distributed was asked to look for mistakes. Ranks that walk on their own may stand
    at different positions, and meet only when they average.
    """
    if walk.ranks.communicates and torch.distributed.get_debug_level() != torch.distributed.DebugLevel.OFF:
        here, of_params = _agreed(walk, groups, state, hyper=not walk.is_local)
        walk.ranks.check(here, of_params, {"cycle_position": "any"} if averages else None, when)


def compare_replicas(walk: Walk, groups: Groups, state: Any, group: Any) -> None:
    """Raises RuntimeError on all ranks of a process group (None: the default one) unless they are replicas."""
    check_group(group, "group")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("check_ranks() compares processes: call torch.distributed.init_process_group() before it")
    here, of_params = _agreed(walk, groups, state)
    found = difference({**here, **of_params}, group or torch.distributed.group.WORLD, "in check_ranks()")
    if found is not None:
        raise RuntimeError(found)
    if not walk.is_local:
        cycles = list(walk.cycles.values())
        running = cycles[0].grad_norms[: walk.position].tolist()
        norms = running or summarize(combine(cycles), cycles[0].room)["grad_norms"]
        compare_norms(norms, group or torch.distributed.group.WORLD, "in check_ranks()")


def _agreed(
    walk: Walk,
    groups: Groups,
    state: Any,
    position: int | None = None,
    error: Exception | None = None,
    *,
    hyper: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what all ranks must have in common, and what those with the same parameters must, each under the name
    that an error gives it. hyper: hyperparameters too. Those on a device count as equal, since reading them would
    wait for it.
    """
    params = [
        f"{'uninitialized' if is_lazy(p) else tuple(p.shape)} {p.dtype}"
        f"{' frozen' if is_frozen(p) and not state.get(p) else ' in use'} in group {index}"
        + (f" {p.placements} on {p.device_mesh.shape}" if is_dtensor(p) else "")
        for index, group in enumerate(groups)
        for p in group["params"]
    ]
    position = walk.position if position is None else position
    here = {"what fails": str(error), "inner_steps": walk.inner_steps, "cycle_position": position}
    on_all = [group["replicated"] for group in groups for _ in group["params"]]
    replicas = [line.partition(" in group")[0] for line in compress(params, on_all)]
    here["the number of replicated parameters"] = len(replicas)
    here.update((f"replicated parameter {i}", line) for i, line in enumerate(replicas))
    of_params: dict[str, Any] = {"the number of parameters": len(params)}
    of_params.update((f"parameter {i}", line) for i, line in enumerate(params))
    on_all_ranks = [group for group in groups if group["replicated"]]
    for target, kind, members in (of_params, "group", groups), (here, "replicated group", on_all_ranks):
        for index, group in enumerate(members if hyper else []):
            row = zip(HYPER, group_row(group, index, walk.inner_steps), strict=True)
            target.update((f"{name} of {kind} {index}", str(v)) for name, v in row if not isinstance(v, Tensor))
    return here, of_params
