"""Nexus: a walk in front of other optimizers. See base.py for its methods, reference.py for the arithmetic."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, options
from .base import WalkingOptimizer
from .cycle import combine
from .dtensor import local_part
from .frameworks import of_the_optimizer, on_its_own
from .options import GROUP_KEYS, LR, OPTIMIZER, WALK_OPTIONS
from .others import (
    MORE,
    OURS,
    States,
    check_groups,
    check_optimizers,
    groups_of,
    leave_walk_out,
    part_of,
    without_ours,
    without_walk,
)
from .ranks import Ranks
from .walk import entries_of

FEW_MOVES, SMALL_SHARE = 100, 1e-4  # of a cycle's moves: below them chance decides where the model sees the walk lead


class Nexus(WalkingOptimizer):
    """A walk of normalized SGD steps, one per micro-batch, in front of other optimizers. They get its displacement as
    their gradient.

    Call `step()` after the backward pass of every micro-batch, and neither accumulate nor clip gradients. Or keep a
    loop that accumulates, with `inner_steps=None`: see NexusAdamW. The first K-1 calls of a cycle (K is `inner_steps`)
    move the weights along the walk. The last one takes the last inner step, returns to the start θ, puts D/Γ into
    `p.grad`, in the parameter's dtype, and calls each optimizer's `step()`. Then `p.grad` is None. A parameter that had
    no gradient in the whole cycle has none at that `step()` either. Source: arXiv 2604.09258.

        optimizer = Nexus(torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3), inner_lr=0.05)

    Args:
        optimizers: one or several torch.optim.Optimizer, which share one model and one norm. Each parameter belongs to
            one of them. Nexus calls their `step()` without a closure; do not call it yourself in mid-cycle. Their
            groups may hold options of the walk: inner_lr, normalize_displacement, inner_lr_follows_lr. Those left there
            by an earlier Nexus are ignored.
        inner_lr, inner_steps, normalize_displacement, inner_lr_follows_lr, displacement_dtype, backend, flatten,
            norm_group: as for NexusAdamW.
        displacement_group: as for NexusAdamW. Of the optimizers' hyperparameters only `lr` is averaged; all others must
            be the same on all of its ranks.

    `param_groups` and `state` are those of the optimizers, one after another, so build a scheduler around this
    optimizer or around one of them. Each group has the walk's options besides its own.

    Below float32 the walk is float32: in mid-cycle a `remainder` of 16 bits holds what the parameter cannot. It starts
    at random within the parameter's rounding, so that on average the model sees the walk. At the end it is dropped, and
    the parameter is θ again, to within the last units of the longest D. Whether the optimizers keep float32 weights is
    up to them.

    Bad input raises ValueError, TypeError or RuntimeError, which names the optimizer and the parameter group, before
    anything is modified.
    """

    def __init__(
        self,
        *optimizers: Optimizer,
        inner_lr: float | Tensor = 1e-2,
        inner_steps: int | None = 4,
        normalize_displacement: bool = True,
        inner_lr_follows_lr: bool = True,
        displacement_dtype: torch.dtype | None = None,
        backend: str | None = None,
        flatten: bool = True,
        norm_group: Any = None,
        displacement_group: Any = None,
    ) -> None:
        steps = options.inner_steps(inner_steps)
        if steps == 1 and displacement_dtype is None:
            displacement_dtype = torch.float32  # it only carries g/‖g‖
        choices = (steps, backend, None, flatten, displacement_dtype, False)
        check_optimizers(optimizers)
        defaults = {
            "inner_lr": inner_lr,
            "inner_steps": steps,
            "normalize_displacement": normalize_displacement,
            "inner_lr_follows_lr": inner_lr_follows_lr,
            "replicated": False,
        }
        options.group_row({"base_lr": 0.0, OPTIMIZER: 0, **defaults}, 0, steps)
        check_groups([{"base_lr": 0.0, **defaults, **without_walk(group)} for group in groups_of(optimizers)], steps)
        before = [(group, dict(group)) for group in groups_of(optimizers)]
        try:
            for group, _ in before:
                for key in group.keys() - without_walk(group).keys():  # of a Nexus before this one
                    del group[key]
            self._wrap(optimizers, defaults, choices, Ranks(norm_group, displacement_group))
            self._take_groups(0, "at construction")
        except BaseException:
            for group, values in before:
                group.clear()
                group.update(values)
            raise
        self._built = True
        self._walk.ranks.replicas.find(self.param_groups)

    def _wrap(self, optimizers: tuple[Optimizer, ...], walk: dict[str, Any], choices: Any, ranks: Ranks) -> None:
        """Takes the optimizers, before any parameter. walk: its options, for groups that lack them."""
        self.optimizers, self._options = optimizers, walk
        self._seen: list[list[dict[str, Any]]] = [[] for _ in optimizers]  # their groups, when we last looked
        self._at_work = False  # it is we who step or load them
        self._meddled: str | None = None  # what others did to them in mid-cycle
        self._told_of_invisible_walk = False
        itself = weakref.ref(self)
        self._build(choices, ranks, lambda given: itself()._step_optimizers(given))  # type: ignore[union-attr]
        first, *others = (o.defaults for o in optimizers)  # schedulers look for momentum there
        defaults = {key: value for key, value in first.items() if all(key in other for other in others)}
        self._states = States(optimizers)
        Optimizer.__setstate__(self, {"defaults": {**defaults, **walk}, "state": self._states})
        for index, o in enumerate(optimizers):

            def note(*_: Any, index: int = index) -> None:
                known = itself()
                if known is not None:
                    known._note(index, "stepped")

            for handle in o.register_step_post_hook(note), o.register_state_dict_post_hook(leave_walk_out):
                weakref.finalize(self, handle.remove).atexit = False

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Marks what happens to the optimizers in this block as ours."""
        itself: Any = self._itself()
        itself._at_work = True
        try:
            yield
        finally:
            itself._at_work = False

    def _note(self, index: int, what: str) -> None:
        """Records that others stepped, loaded or extended an optimizer in mid-cycle."""
        itself: Any = self._itself()  # a framework's wrapper may ask for groups
        if not itself._at_work and not self.at_boundary:
            itself._meddled = (
                f"optimizer {index} ({type(self.optimizers[index]).__name__}) was {what} in mid-cycle, "
                f"{self._walk.progress}: call only Nexus's own step(), which steps "
                "it at the end of each cycle, and its load_state_dict(); change an optimizer itself at a boundary only "
                "(at_boundary, or after outer_step()). To go on, load a checkpoint"
            )

    def check_others(self) -> None:
        """Raises RuntimeError if others stepped, loaded or extended an optimizer in this cycle."""
        if self.at_boundary:
            self._meddled = None
        elif self._meddled is not None:
            raise RuntimeError(self._meddled)

    def check_groups(self) -> None:
        """Raises ValueError or TypeError, naming group and parameter, if the walk cannot take the groups' parameters or
        options.
        """
        check_groups(self.param_groups, self.inner_steps)

    # Parameters

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizers' own groups, one after another; the walk's options are put back where a load dropped them."""
        for index, o in enumerate(self.optimizers):
            seen = self._seen[index]
            if len(seen) != len(o.param_groups) or any(a is not b for a, b in zip(seen, o.param_groups, strict=True)):
                self._complete(index)
        return [group for o in self.optimizers for group in o.param_groups]

    def _complete(self, index: int) -> None:
        """Gives the groups of an optimizer the walk's options."""
        groups, seen = self.optimizers[index].param_groups, self._seen[index]
        if len(seen) == len(groups):
            self._note(index, "loaded")
        for i, group in enumerate(groups):
            base_lr = options.first_of(group, "max_lr", "initial_lr", "lr", otherwise=0.0)
            before = seen[i] if i < len(seen) else {**self._options, "base_lr": float(base_lr)}
            group.update({key: before[key] for key in WALK_OPTIONS if key not in group})
            group.update({OPTIMIZER: index, "inner_steps": self.inner_steps})
            options.tidy(group)
            if isinstance(group["inner_lr"], Tensor) and i >= len(seen):  # each group needs its own
                group["inner_lr"] = group["inner_lr"].detach().clone()
        self._seen[index] = list(groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: only the caller knows which optimizer a group belongs to."""
        raise RuntimeError(
            "Nexus has no parameter groups of its own: at a boundary, call add_param_group() of the optimizer that "
            f"should step them ({', '.join(f'{i}: {type(o).__name__}' for i, o in enumerate(self.optimizers))})"
        )

    # Stepping

    @on_its_own
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Consumes the gradients of one micro-batch: takes an inner step, and at the end of a cycle calls the
        optimizers' `step()`.

        Otherwise like NexusAdamW's. To have a state to load into, torch.distributed.checkpoint first takes a step with
        learning rate and gradients of 0; that step goes to the optimizers and does not count as a micro-batch. If an
        optimizer raises an error, the cycle ends, and the parameters that it did not step hold θ.
        """
        if closure is None and not self._states and self._is_initialization():
            with self._working():
                for o in self.optimizers:
                    if not o.state:
                        o.step()
            return None
        for o in self.optimizers:
            o._opt_called = True  # type: ignore[attr-defined]  # or a scheduler around it would warn before its first step
        return super().step(closure)

    def _is_initialization(self) -> bool:
        """Whether learning rates and gradients are 0, on all ranks."""
        groups = self.param_groups
        if not self.at_boundary or any("lr" not in group or group["lr"] != 0 for group in groups):
            return False
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        trains = not gradients or any(bool(local_part(gradient).any()) for gradient in gradients)
        return not self._walk.ranks.anywhere(trains)

    def _step_optimizers(self, given: list[tuple[Tensor, Tensor]]) -> None:
        """Steps these parameters, by their optimizers, along these gradients; frees the gradients."""
        self._state.show_position()  # and what is ours is gone from their state
        moved = {id(param) for param, _ in given}
        try:
            with self._working(), contextlib.ExitStack() as stack:
                for param, gradient in given:
                    _let_have(param, gradient, stack)
                if self._walk.is_local:
                    self._average_lr(stack)
                self._states.are_made = True
                for o in self.optimizers:
                    if any(id(param) in moved for group in o.param_groups for param in group["params"]):
                        o.step()
        finally:
            for param, _ in given:
                param.grad = None
            given.clear()

    def _average_lr(self, stack: contextlib.ExitStack) -> None:
        """Gives each group the mean learning rate of the ranks that walked, for this step; schedules of the others
        wait.
        """
        cycle = next(iter(self._walk.cycles.values()))
        for group, lr in zip(self.param_groups, cycle.hyper[:, LR].tolist(), strict=True):
            if group.get("lr") is not None:
                stack.callback(group.update, lr=group["lr"])
                group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr

    @of_the_optimizer
    def metrics(self) -> dict[str, Any]:
        """Returns the same figures as NexusAdamW. Below float32 a move counts as lost if the parameter did not change,
        since the model sees only the parameter. If the walk is smaller than the parameter's rounding, most moves are
        lost, though those that remain are right on average. Warns once if almost none remain.
        """
        finished = combine(list(self._walk.cycles.values()))
        if finished is not None and not self._told_of_invisible_walk:
            moves, lost = finished[1][:2].tolist()
            if moves - lost < max(moves * SMALL_SHARE, min(FEW_MOVES, moves / 10)):
                self._told_of_invisible_walk = True
                warnings.warn(
                    f"the model saw {moves - lost} of the walk's {moves} moves in the last cycle; the others are "
                    "smaller than the rounding of its parameters, so these are unit gradients without a walk: raise "
                    "inner_lr, or keep low-precision parameters in float32",
                    stacklevel=6,
                )
        return super().metrics()

    @of_the_optimizer
    def eval(self) -> None:
        """Shows θ in the parameters until `train()`, and calls `eval()` of those optimizers that have it."""
        if not self._state.in_outer_weights:
            super().eval()
            for o in self.optimizers:
                getattr(o, "eval", lambda: None)()

    @of_the_optimizer
    def train(self) -> None:
        """Calls `train()` of those optimizers that have it, and puts the walk back after `eval()`."""
        if not self._state.in_outer_weights:
            for o in self.optimizers:
                getattr(o, "train", lambda: None)()
            super().train()

    # Saving and loading

    def _pack(self) -> dict[str, Any]:
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        ours = self._ours_in_cycle()
        packed: dict[str, Any] = {"state": {}, "param_groups": []}
        params = 0
        for index, o in enumerate(self.optimizers):
            theirs = o.state_dict()
            number: dict[Any, int] = {}
            for group, shown in zip(o.param_groups, theirs["param_groups"], strict=True):
                for param, key in zip(group["params"], shown["params"], strict=True):
                    if key in number:
                        continue
                    number[key] = params + len(number)
                    entry = {**theirs["state"].get(key, {}), **ours.get(param, {})}
                    if entry or key in theirs["state"]:
                        packed["state"][number[key]] = entry
                walk = {key: group[key] for key in group.keys() - without_walk(group).keys()}
                packed["param_groups"].append({**shown, **walk, "params": [number[key] for key in shown["params"]]})
            params += len(number)
            more = {key: value for key, value in theirs.items() if key not in ("state", "param_groups")}
            loose = {key: value for key, value in theirs["state"].items() if key not in number}  # no parameter's
            if more or loose:
                packed.setdefault(MORE, {})[index] = {**more, "state": loose}
        return checkpoint.pack(packed)

    def _ours_in_cycle(self) -> dict[Tensor, dict[str, Tensor]]:
        """Returns the keys that we add to the optimizers' entries now."""
        segments = self._walk.segments if self._state.entries.shows_cycle else []
        return {s.param: {name: s.show(name) for name in s.names(in_cycle=True)} for s in segments}

    def _check(self, state_dict: dict[str, Any]) -> tuple[Any, ...]:
        state, saved = (state_dict.get(key) for key in ("state", "param_groups"))
        ours = state_dict
        if isinstance(state, dict):
            entries = {key: entry for key, entry in state.items() if isinstance(entry, dict)}
            ours = {**state_dict, "state": {k: {n: e[n] for n in OURS if n in e} for k, e in entries.items()}}
        if isinstance(saved, (list, tuple)) and all(isinstance(group, dict) for group in saved):
            wrapped = [group[OPTIMIZER] for group in saved if OPTIMIZER in group]
            here = [group[OPTIMIZER] for group in self.param_groups]
            if wrapped and wrapped != here:
                raise ValueError(
                    f"the loaded state dict is of {len(set(wrapped))} optimizer(s) with {len(saved)} parameter groups, "
                    f"this Nexus has {len(self.optimizers)} with {len(here)}: build it with those it was saved with"
                )
        groups, of_params, _ = checkpoint.check(ours, self.param_groups, self._walk)
        groups = [{key: group[key] for key in (*WALK_OPTIONS, *GROUP_KEYS) if key in group} for group in groups]
        return groups, of_params, state_dict

    def _restore(self, groups: Any, *rest: Any) -> None:
        entries, state_dict = rest
        before = [(o.state, o.param_groups) for o in self.optimizers]
        first = 0
        with self._working():
            try:
                for index, o in enumerate(self.optimizers):
                    saved = state_dict["param_groups"][first : first + len(o.param_groups)]
                    first += len(saved)
                    o.load_state_dict(part_of(state_dict, saved, index))
                self._state.restore(groups, entries)
                self._states.are_made = self._states.are_made or bool(state_dict["state"])
            except BaseException:
                for o, (state, param_groups) in zip(self.optimizers, before, strict=True):
                    o.state, o.param_groups = state, param_groups
                raise

    @of_the_optimizer
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the same optimizers saved behind a Nexus, or without one, which counts as saved at a boundary."""
        meddled, self._meddled = self._meddled, None  # which a load ends
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self._meddled = meddled
            raise

    @of_the_optimizer
    def materialize_displacements(self) -> None:
        """Makes zero displacements for a load to fill, as NexusAdamW does. An optimizer without any state makes it by
        taking a step with learning rate and gradients of 0, which it may count.
        """
        self._refuse_inside_outer_weights("materialize_displacements()")
        for o in self.optimizers:
            if not o.state:
                self._initialize(o)
        super().materialize_displacements()

    def _initialize(self, o: Optimizer) -> None:
        """Makes an optimizer create its state."""
        lrs = [(group, group["lr"]) for group in o.param_groups if group.get("lr") is not None]
        gradients = [(p, p.grad) for group in o.param_groups for p in group["params"] if p.requires_grad]
        try:
            with self._working(), contextlib.ExitStack() as stack:
                for group, lr in lrs:
                    group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
                for param, _ in gradients:
                    _let_have(param, torch.zeros_like(param), stack)
                o.step()
        finally:
            for group, lr in lrs:
                group["lr"] = lr
            for param, gradient in gradients:
                param.grad = gradient

    @on_its_own
    def __getstate__(self) -> dict[str, Any]:
        state, ours = self._state_to_copy(), self._ours_in_cycle()
        optimizers = tuple(without_ours(o) if ours and self._state.entries.known else o for o in self.optimizers)
        return {**state, "optimizers": optimizers, "_options": self._options, "_ours": ours}

    @on_its_own
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Builds tables around copied or unpickled optimizers."""
        self._wrap(state["optimizers"], state["_options"], state["_choices"], Ranks())
        loaded = [{key: group[key] for key in GROUP_KEYS if key in group} for group in self.param_groups]
        self._state.register(entries_of(self.param_groups), flatten=self._walk.flatten, known=state["_ours"])
        self._state.restore(loaded, state["_ours"])
        self._take_rest(state)


def _let_have(param: Any, gradient: Tensor, stack: contextlib.ExitStack) -> None:
    """Sets a parameter's gradient, of the parameter's own dtype even where it takes others (`p.grad_dtype`)."""
    dtype = getattr(param, "grad_dtype", None)
    if dtype is not None and dtype != gradient.dtype:
        param.grad_dtype = None
        stack.callback(_take, param, dtype)
    param.grad = gradient


def _take(param: Any, dtype: torch.dtype) -> None:
    param.grad = None
    param.grad_dtype = dtype
