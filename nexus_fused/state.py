"""The life of a state: whose it is, and what of it is shown, saved and loaded."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, theta
from .entries import Entries
from .flat import Segment
from .options import GROUP_KEYS, OPTIMIZER, OPTIMIZER_KEYS, check_param, has_maxima, is_frozen, tidy
from .walk import Entry, Walk, entries_of


class State:
    """The parameters of an optimizer, and what its `state` and `param_groups` show of them, in step with a walk.
    optimizer: only its `state` and `param_groups` are read, at each call, since torch.optim replaces them.
    parameters_came: called after some did.
    """

    def __init__(self, optimizer: Any, walk: Walk, parameters_came: Callable[[], None]) -> None:
        self._optimizer, self._walk = weakref.ref(optimizer), walk
        self._parameters_came = parameters_came
        self._frozen: list[Entry] = []  # no state yet
        self._members: list[list[Tensor]] = []  # each group's parameters, as registered
        self.entries = Entries(self._optimizer, are_guests=not walk.keeps)
        self._is_fresh = True  # no step was taken, and no state came from elsewhere
        self.shows_theta = False  # parameters hold θ, and the groups describe the boundary
        self.in_outer_weights = False  # the with block, not eval(), asked for it
        self._kept: list[theta.Kept] = []  # the walk meanwhile
        self._showed_cycle = False  # before
        self._told_what_is_left_out = False

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer().param_groups  # type: ignore[union-attr]
        return groups

    # Parameters

    def register(self, params: list[Entry], *, flatten: bool, known: Iterable[Any] = ()) -> None:
        """Gives parameters state and a place in a table. Frozen ones wait for a gradient. known: have state to come."""
        known = list(known)
        self.entries.expect(known)
        has_state = {id(param) for param in known}
        live: list[Entry] = []
        waiting: list[Entry] = []
        for entry in params:
            frozen = is_frozen(entry[2]) and id(entry[2]) not in has_state and not self.entries.state.get(entry[2])
            (waiting if frozen else live).append(entry)
        segments = self._walk.add(live, self._groups, flatten=flatten)
        self._frozen += waiting
        self._members = [list(group["params"]) for group in self._groups]
        self._add(segments)
        self._parameters_came()

    def _add(self, segments: list[Segment]) -> None:
        """Gives parameters that came an entry, and adds maxima that came to entries."""
        shows = self.entries.shows_cycle or self._walk.position > 0
        if shows:
            self._walk.ensure_displacements()
        self.entries.put(segments, self._walk.segments)
        self.show(in_cycle=shows)

    def _thaw(self) -> None:
        """Gives state to parameters that were frozen and have a gradient now, or may get one."""
        ready = [entry for entry in self._frozen if not is_frozen(entry[2])]
        for group, index, param in ready:
            check_param(param, f"parameter {index} of group {group}")
        if ready:
            self.register(ready, flatten=False)
            self._frozen = [entry for entry in self._frozen if is_frozen(entry[2])]

    def follow_members(self) -> None:
        """Takes over groups that somebody appended, and moves of parameters before the first step. Raises RuntimeError
        if known groups hold other parameters than before: those would never be stepped.
        """
        if not self._walk.keeps:
            self._follow_guests()
            return
        groups = [group["params"] for group in self._groups[: len(self._members)]]
        pairs = zip_longest(groups, self._members, fillvalue=())
        same = [len(now) == len(then) and all(map(operator.is_, now, then)) for now, then in pairs]
        if not all(same):
            index = same.index(False)
            raise RuntimeError(
                f"the parameters of group {index} were exchanged, added or removed behind the optimizer's back: add "
                "groups with add_param_group(), or build a new optimizer and load this one's state into it"
            )
        self._add_groups_behind()
        if self._is_fresh and not all(segment.fits for segment in self._walk.segments):
            self._is_fresh = not self.entries.holds_values(self._walk.segments)
            if self._is_fresh:
                self._rebuild()

    def _follow_guests(self) -> None:
        """Takes the parameters of others' optimizers as they are, at a boundary."""
        optimizer: Any = self._optimizer()
        groups = optimizer.param_groups
        optimizer.check_others()
        pairs = zip_longest((group["params"] for group in groups), self._members, fillvalue=())
        same = all(len(now) == len(then) and all(map(operator.is_, now, then)) for now, then in pairs)
        if same and not (self._is_fresh and not all(segment.fits for segment in self._walk.segments)):
            return
        if self._walk.position > 0:
            raise RuntimeError(
                "the parameters of an optimizer behind the walk were exchanged, added or removed in mid-cycle: do it "
                "at a boundary (optimizer.at_boundary, or after outer_step())"
            )
        optimizer.check_groups()
        walk, frozen = self._walk, self._frozen
        before = walk.tables, walk.cycles, walk.work
        self.entries.hide()
        walk.tables, walk.work, self._frozen = {}, [], []
        if len(groups) < len(self._members):
            walk.cycles = {}
        try:
            self.register(entries_of(groups), flatten=walk.flatten)
        except BaseException:
            walk.tables, walk.cycles, walk.work = before
            self._frozen = frozen
            raise

    def _add_groups_behind(self) -> None:
        optimizer: Any = self._optimizer()
        groups, known = optimizer.param_groups, len(self._members)
        if len(groups) <= known:
            return
        waiting = groups[known:]
        del groups[known:]  # the list itself: wrappers of frameworks hold it too
        try:
            for group in waiting:
                for key in (*GROUP_KEYS, OPTIMIZER):  # of a cycle that another optimizer was in
                    group.pop(key, None)
                optimizer.add_param_group(group)
        finally:  # after an error the rest waits
            groups += waiting[len(groups) - known :]

    def _rebuild(self) -> None:
        """Gives all parameters memory, where and as they are now."""
        walk, segments = self._walk, self._walk.segments
        for segment in segments:
            check_param(segment.param, f"parameter {segment.index} of group {segment.group}")
        before, shows_cycle = (walk.tables, walk.cycles, walk.work), self.entries.shows_cycle
        walk.tables, walk.cycles, walk.work = {}, {}, []
        self.entries.drop(segments)
        try:
            params = [(s.group, s.index, s.param) for s in segments]
            self.register(params, flatten=walk.flatten, known=[param for *_, param in params])
        except BaseException:
            walk.tables, walk.cycles, walk.work = before
            self._add(segments)
            raise
        if shows_cycle:
            self.materialize_displacements()

    def adopt(self, *, moments: bool = True) -> None:
        """Copies what others put into the state, or moved, to where kernels work, and shows that again. moments:
        whether to look at those too; inner steps use none. Raises RuntimeError, TypeError or ValueError for what
        cannot be adopted; nothing is modified then.
        """
        found = self.entries.foreign(self._walk.segments, moments=moments)
        if found is None:
            return
        self.catch_up()
        self._is_fresh &= not found
        if self._walk.capture.known is not None:
            raise RuntimeError(
                "optimizer.state was changed just before or while step() was captured into a CUDA graph: run one whole "
                "cycle before the capture"
            )
        self._walk.wait_for_host_state()
        moved: set[Segment] = set()
        for segment, name, value in checkpoint.apart(found, self._walk.segments):
            before = segment.buffer(name).clone() if name == "displacement" and not segment.touched else None
            checkpoint.copy_in(segment, name, value)
            # Before the first gradient it holds anything; a host that gives just that back has displaced nothing.
            if before is not None and not torch.equal(before.view(torch.uint8), segment.buffer(name).view(torch.uint8)):
                moved.add(segment)
        for table in self._walk.tables.values():
            table.set_touched([s for s in table.segments if s in moved], True)
        self._add(self._walk.segments)

    def refresh(self, *, gradients: bool, moments: bool = True) -> None:
        """Checks everything that may be wrong and takes over what is new, before anything is modified. Call
        `follow_members` first. gradients: whether the step uses those of a micro-batch. moments: whether it uses
        those, as an outer step does.
        """
        waits, groups = any(not is_frozen(param) for *_, param in self._frozen), self._groups
        try:
            self._walk.follow_capture(groups, waits)
        except RuntimeError:
            self.show(in_cycle=self._walk.position > 0)  # where a capture was cut, the cycle did not take place
            raise
        self._walk.check_writes()  # before anything has parameters taken as they are
        if gradients:
            self._walk.ranks.check_reduced(groups, ends_pass=self._walk.is_open)
        buckets = [bucket for table in self._walk.tables.values() for bucket in table.buckets]
        maxima_come = any(bucket.amsgrad != has_maxima(groups[bucket.group]) for bucket in buckets)
        self.adopt(moments=moments or maxima_come)  # they are shown with all the rest
        if waits:
            self._thaw()
        if self._walk.refresh(groups, gradients=gradients):
            self._add(self._walk.segments)
        # FSDP2 keeps the root's weights gathered after a forward pass without a backward one.
        self._walk.ranks.reshard()

    # What is shown

    def show_position(self) -> None:
        """Shows the position in the groups, and displacements in the entries or not. Where only the device knows the
        position, `catch_up` does that later.
        """
        self._is_fresh = False
        if not self._walk.is_blind:
            self._show_position()

    def catch_up(self) -> None:
        """Shows the position that only the device knows, if it does; waits for it then."""
        if self._walk.is_blind:
            self._show_position()

    def _show_position(self) -> None:
        position = self._walk.position
        for group in self._groups[: len(self._members)]:
            group["cycle_position"] = position
        self._follow(in_cycle=position > 0)

    def show(self, *, in_cycle: bool) -> None:
        """Shows the cycle's own data in groups and entries; the groups' keys are the same at every position."""
        groups = self._groups[: len(self._members)]  # those put behind are taken over later
        sizes = [len(group["params"]) for group in groups]
        cycle = next(iter(self._walk.cycles.values()))
        touched = [[False] * size for size in sizes]
        for segment in [] if self.shows_theta else self._walk.segments:
            touched[segment.group][segment.index] = segment.touched
        position = 0 if self.shows_theta else self._walk.position
        first = next((group for group in groups if group["params"]), groups[0])
        for index, group in enumerate(groups):
            for key in OPTIMIZER_KEYS:
                group.pop(key, None)
            data = cycle.group_data(index) | (cycle.optimizer_data() if group is first else {})
            if self.shows_theta:
                data.update({key: torch.zeros_like(data[key]) for key in ("walk_length", "walk_sq_length")})
                if group is first:
                    data["grad_norms"] = list(torch.zeros_like(cycle.grad_norms))
            group.update(data, cycle_position=position, touched=touched[index])
        self._follow(in_cycle=in_cycle and not self.shows_theta)

    def _follow(self, *, in_cycle: bool) -> None:
        comes = in_cycle and not self.entries.shows_cycle
        self.entries.follow(self._walk.segments if comes else [], in_cycle=in_cycle)

    # θ in the place of the walk

    def show_theta(self) -> None:
        """Puts θ into the parameters until `show_walk`; groups and entries describe the boundary meanwhile."""
        if self.shows_theta:
            return
        if self._walk.position > 0:
            self.follow_members()
            # FSDP2 gathers anew: what it has gathered would hide θ here
            self.refresh(gradients=False, moments=False)
            self._kept = theta.show_outer_weights(list(self._walk.tables.values()))
        else:  # θ is there, whatever became of the model for an evaluation
            self._walk.ranks.reshard()
        self._showed_cycle, self.shows_theta = self.entries.shows_cycle, True
        self.show(in_cycle=False)

    def show_walk(self) -> None:
        """Puts the walk back, bit for bit."""
        if not self.shows_theta:
            return
        self._walk.ranks.reshard()  # and θ would hide the walk
        kept, self._kept = self._kept, []
        try:
            theta.show_walk(kept)
        finally:
            self.shows_theta = False
            self.show(in_cycle=self._showed_cycle)

    @property
    def hides_walk(self) -> bool:
        """Whether the walk has to come back: at the end of a with block, or at train() in mid-cycle."""
        return self.shows_theta and (self.in_outer_weights or self._walk.position > 0)

    def _tell_what_is_left_out(self) -> None:
        """Warns once of saving after eval(). Whoever wrote outer_weights() knows."""
        if not (self.in_outer_weights or self._told_what_is_left_out):
            self._told_what_is_left_out = True
            warnings.warn(
                f"{type(self._optimizer()).__name__}'s state_dict() after eval() describes the start of the cycle and "
                f"leaves out {self._walk.position} micro-batch(es) since then: to resume here, save before eval() or "
                f"after train(), or evaluate {_at_boundaries(self._walk.inner_steps)} only",
                stacklevel=8,
            )

    # Saving and loading

    def prepare_to_save(self) -> None:
        """Brings groups and entries up to date for somebody who copies them."""
        self.follow_members()
        self.catch_up()
        self._walk.check_capture_has_not_ended()
        self._walk.wait_for_host_state()
        for group in self._groups:
            tidy(group)
        walk_is_hidden = self.shows_theta and self._walk.position > 0
        if walk_is_hidden:
            self._tell_what_is_left_out()
        else:
            self._walk.check_writes()
        self.adopt()
        if not walk_is_hidden:
            self._thaw()  # distributed checkpoints need the state of each parameter that trains
            self._walk.clear_untouched()
        if self._walk.follow_amsgrad(self._groups):
            self._add(self._walk.segments)
        self.show(in_cycle=self.entries.shows_cycle)

    def materialize_displacements(self) -> None:
        """Shows zero displacements at a boundary, until the end of the next cycle."""
        self.follow_members()
        self._thaw()
        self._walk.ensure_displacements()
        self._walk.clear_untouched()
        self._follow(in_cycle=True)

    def restore(self, loaded: list[dict[str, Any]], entries: dict[Tensor, dict[str, Any]]) -> None:
        """Copies checked groups and entries into place, zeros where there are none, and the position with them."""
        self.shows_theta = False  # eval() at a boundary, which hid nothing
        self._is_fresh &= not entries
        late = [entry for entry in self._frozen if entries.get(entry[2]) or self.entries.state.get(entry[2])]
        try:
            self.register(late, flatten=False, known=[param for *_, param in late])  # not frozen any more
        except BaseException:
            for *_, param in late:
                self.entries.state.pop(param, None)
            raise
        self._frozen = [entry for entry in self._frozen if entry not in late]
        for group, other in zip(self._groups, loaded, strict=True):
            group.update({key: value for key, value in other.items() if key not in GROUP_KEYS and key != "params"})
        walk, position = self._walk, loaded[0].get("cycle_position", 0) if loaded else 0
        if position > 0:
            walk.ensure_displacements()
        walk.wait_for_host_state()
        kept = {s.group for s in walk.segments if "max_exp_avg_sq" in (entries.get(s.param) or ())}
        walk.follow_amsgrad([{"amsgrad": has_maxima(group) or i in kept} for i, group in enumerate(self._groups)])
        values = [(s, name, value) for s in walk.segments for name, value in (entries.get(s.param) or {}).items()]
        apart: dict[Segment, dict[str, Any]] = {segment: {} for segment in walk.segments}
        for segment, name, value in checkpoint.apart(values, walk.segments):
            apart[segment][name] = value
        for segment, entry in apart.items():
            checkpoint.restore_entry(segment, entry)
        walk.follow_amsgrad(self._groups)
        walk.start_from(position)
        for cycle in walk.cycles.values():
            for index, group in enumerate(loaded):
                cycle.load_group_data(index, group, running=position > 0 and "walk_length" in group)
        for table in walk.tables.values():
            table.set_touched([s for s in table.segments if position > 0 and loaded[s.group]["touched"][s.index]], True)
        self.entries.hide()  # what is shown from here on is the loaded position's
        self._add(walk.segments)


def _at_boundaries(inner_steps: int | None) -> str:
    """Says when a cycle is at its boundary."""
    return "after step()" if inner_steps is None else f"at multiples of inner_steps ({inner_steps})"
