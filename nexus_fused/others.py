"""Other people's optimizers: which ones can follow a walk, their states as one, and what of it is theirs."""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import options
from .base import WalkingOptimizer
from .options import GROUP_KEYS, OPTIMIZER, WALK_OPTIONS

OURS = ("displacement", "remainder", "anchor")  # keys of the state
MORE = "optimizers"  # of a state dict: what optimizers save beside their parameters' state and groups, by their number


class States(MutableMapping[Any, Any]):
    """The optimizers' states as one. Each entry stands in the state of the optimizer that holds its parameter."""

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self._optimizers = optimizers
        self.are_made = False  # each was stepped or loaded

    def _holder(self, key: Any) -> Any:
        """Returns the state that has an entry for the key, else that of the optimizer that holds the parameter."""
        owners = (o for o in self._optimizers if any(key is p for group in o.param_groups for p in group["params"]))
        known = (o for o in self._optimizers if key in o.state)
        return next(itertools.chain(known, owners), self._optimizers[0]).state

    def __getitem__(self, key: Any) -> Any:
        return self._holder(key)[key]  # torch.optim's makes an entry

    def get(self, key: Any, default: Any = None) -> Any:
        return next((o.state[key] for o in self._optimizers if key in o.state), default)

    def __contains__(self, key: Any) -> bool:
        return any(key in o.state for o in self._optimizers)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._holder(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._holder(key)[key]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return self._holder(key).setdefault(key, default)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(o.state for o in self._optimizers)

    def __len__(self) -> int:
        return sum(len(o.state) for o in self._optimizers)

    def __bool__(self) -> bool:
        """Returns False if a state has yet to be made: torch.distributed.checkpoint asks."""
        return self.are_made or all(o.state for o in self._optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))


def groups_of(optimizers: tuple[Optimizer, ...]) -> list[dict[str, Any]]:
    return [group for o in optimizers for group in o.param_groups]


def without_walk(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a group without what another Nexus's walk put there."""
    ours = (*WALK_OPTIONS, *GROUP_KEYS, OPTIMIZER) if OPTIMIZER in group else ()
    return {key: value for key, value in group.items() if key not in ours}


def leave_walk_out(_: Optimizer, state_dict: dict[str, Any]) -> None:
    """Removes the walk from what an optimizer behind it saves by itself."""
    if isinstance(state_dict.get("state"), dict):
        entries = state_dict["state"].items()
        state_dict["state"] = {
            key: {k: v for k, v in entry.items() if k not in OURS} if isinstance(entry, dict) else entry
            for key, entry in entries
            if not isinstance(entry, dict) or not entry or entry.keys() - set(OURS)
        }
    state_dict["param_groups"] = [without_walk(group) for group in state_dict.get("param_groups", [])]


def without_ours(o: Optimizer) -> Optimizer:
    """Returns an optimizer of the same parameters and state without what is ours, which its class could not copy."""
    twin: Optimizer = object.__new__(type(o))
    entries = ((key, {k: v for k, v in entry.items() if k not in OURS}) for key, entry in o.state.items())
    twin.__dict__.update(o.__dict__, state=defaultdict(dict, {key: entry for key, entry in entries if entry}))
    return twin


def part_of(state_dict: dict[str, Any], groups: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """Returns the state of the one optimizer whose groups are given, without what is ours."""
    ours = {key for group in groups for key in group["params"]}
    others = {key for group in state_dict["param_groups"] for key in group["params"]} - ours
    state = {}
    for key, entry in state_dict["state"].items():
        kept = {k: v for k, v in entry.items() if k not in OURS} if key in ours and isinstance(entry, dict) else entry
        if key not in others and (kept or not entry):
            state[key] = kept
    more = state_dict.get(MORE, {}).get(index, {})
    state.update(more.get("state", {}))
    rest = {key: value for key, value in state_dict.items() if key != MORE}
    return {**rest, **more, "state": state, "param_groups": [without_walk(group) for group in groups]}


def check_optimizers(optimizers: tuple[Any, ...]) -> None:
    """Raises unless the walk can stand in front of these."""
    if not optimizers:
        raise ValueError("Nexus needs an optimizer to hand the displacement to: Nexus(torch.optim.AdamW(...), ...)")
    for index, o in enumerate(optimizers):
        what = f"optimizer {index} ({type(o).__name__})"
        if not isinstance(o, Optimizer):
            hint = ": give each one as an argument, Nexus(*optimizers, ...)" if isinstance(o, (list, tuple)) else ""
            raise TypeError(f"{what} is no torch.optim.Optimizer{hint}")
        if not hasattr(o, "_optimizer_step_post_hooks"):
            raise TypeError(
                f"{what} is a framework's wrapper: give Nexus the optimizer itself, and the framework the Nexus, as in "
                "accelerator.prepare(Nexus(optimizer))"
            )
        if isinstance(o, WalkingOptimizer):
            raise TypeError(f"{what} walks by itself: give Nexus the optimizer that should follow the walk")
        if any(o is other for other in optimizers[:index]):
            raise ValueError(f"{what} is given twice: pass it once")
        needed = [
            parameter.name
            for parameter in inspect.signature(o.step).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if needed:
            raise ValueError(
                f"{what} cannot follow a walk: its step() needs {', '.join(needed)}, and evaluates the model by itself"
            )
        if isinstance(o, torch.optim.SparseAdam):
            raise ValueError(f"{what} needs sparse gradients, and a displacement is dense: use torch.optim.Adam")
        if _is_saved_otherwise(o):
            raise ValueError(
                f"{what} saves its state in a form of its own, not torch.optim's with 'state' and 'param_groups': if "
                "it wraps another optimizer, give Nexus that one"
            )
        if getattr(o, "maximize", False) is True and not all("maximize" in group for group in o.param_groups):
            raise ValueError(
                f"{what} has maximize=True, but not in its parameter groups, where the walk would see it: leave it out "
                "and negate the loss"
            )


def _is_saved_otherwise(o: Optimizer) -> bool:
    """Returns whether its state dict has a form of its own."""
    if type(o).state_dict is Optimizer.state_dict:
        return False
    try:
        return not {"state", "param_groups"} <= o.state_dict().keys()
    except RuntimeError:  # ZeroRedundancyOptimizer has one after consolidate_state_dict()
        return False


def check_groups(groups: list[dict[str, Any]], steps: int | None) -> None:
    """Raises unless the walk can take the parameters of these groups, and their options."""
    known: set[Tensor] = set()
    for index, group in enumerate(groups):
        new = {key: value for key, value in group.items() if key not in (*GROUP_KEYS, OPTIMIZER)}
        known.update(options.check_new_group(new, {"lr": 0.0, OPTIMIZER: 0}, index, steps, known))
