"""What `optimizer.state` shows of each parameter, and what others did to it. Only this module writes its keys."""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Iterable
from itertools import repeat
from typing import Any

from torch import Tensor

from . import checkpoint
from .dtensor import local_part
from .flat import Segment
from .observer import Shown

Foreign = tuple[Segment, str, Any]  # a value that others put under a key


class Entries:
    """The entries of an optimizer's state: tensors in the memory where kernels work.

    optimizer: only its `state` is read, at each call, since others may replace it. shows_cycle: entries hold
    displacements. known: somebody has looked at the state, and may change it from then on; before, nobody can.
    are_guests: the entries belong to other optimizers, who make them at their first step and would take ours for their
    own. Ours are there in mid-cycle only, and only once somebody has looked.
    """

    def __init__(self, optimizer: weakref.ref[Any], *, are_guests: bool) -> None:
        self._optimizer, self._are_guests = optimizer, are_guests
        self.shows_cycle = self.known = False
        self._values: list[Any] = []  # of the state, as it was when all entries were in order
        self._moments, self._remainders, self._displacements = Shown([]), Shown([]), Shown([])
        self._entries: list[dict[str, Any]] = []  # of parameters, with what each shows in mid-cycle
        self._in_cycle: list[dict[str, Tensor]] = []
        self._names: set[str] = set()
        self._guests: list[Tensor] = []  # whose entries these are
        self._hidden: list[Segment] = []  # what nobody has looked at yet

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """The state that the optimizer has now. The optimizer's own `state` is for others."""
        state: dict[Any, dict[str, Any]] = self._optimizer().__dict__["state"]
        return state

    def expect(self, params: Iterable[Any]) -> None:
        """Counts parameters as having state, before it comes."""
        for param in [] if self._are_guests else params:
            if isinstance(param, Tensor):
                self.state.setdefault(param, {})["step"] = None

    def put(self, coming: list[Segment], everything: list[Segment]) -> None:
        """Shows the memory of parameters that came, and new memory of others; hides displacements."""
        self.hide()
        taken: set[int] = set()
        for segment in [] if self._are_guests else coming:
            entry = self.state.setdefault(segment.param, {})  # the state may be a plain dict by now
            if id(entry) in taken:  # somebody gave two parameters one entry
                entry = self.state[segment.param] = dict(entry)
            taken.add(id(entry))
            entry.update({name: segment.show(name) for name in segment.names()})
        self._entries = []
        if self._are_guests:
            return
        items = [(self.state[s.param], name, s.shown[name]) for s in everything for name in s.names()]
        self._moments = Shown([item for item in items if item[1] != "remainder"])
        self._remainders = Shown([item for item in items if item[1] == "remainder"])
        self._values = list(self.state.values())

    def holds_values(self, segments: list[Segment]) -> bool:
        """Returns whether somebody wrote anything but zeros into new entries; waits for the device."""
        values = (self.state.get(s.param, {}).get(name) for s in segments if self.known for name in s.names())
        return any(bool(local_part(value).any()) if isinstance(value, Tensor) else bool(value) for value in values)

    def drop(self, segments: list[Segment]) -> None:
        """Removes our keys from entries."""
        self.hide()
        for segment in segments:
            for name in segment.names():
                self.state[segment.param].pop(name, None)

    def follow(self, segments: list[Segment], *, in_cycle: bool) -> None:
        """Shows displacements and anchors in mid-cycle, and hides them at a boundary; their memory stays ours. Those of
        parameters that have not moved hold garbage until somebody copies them.
        """
        if not in_cycle:
            self.hide()
        elif not self.shows_cycle:
            self.shows_cycle = True
            self._hidden = segments
            if self.known or not self._are_guests:
                self.reveal()

    def reveal(self) -> None:
        """Puts in what `follow` has left out."""
        segments, self._hidden = self._hidden, []
        if not segments:
            return
        if not self._entries:
            self._guests = [segment.param for segment in segments]
            self._entries = [self.state.setdefault(param, {}) for param in self._guests]
            self._in_cycle = [{n: s.show(n) for n in s.bucket.buffers if n not in s.bucket.keeps} for s in segments]
            self._names = set().union(*self._in_cycle)
            items = zip(self._entries, self._in_cycle, strict=True)
            self._displacements = Shown([(entry, n, t) for entry, shown in items for n, t in shown.items()])
        deque(map(dict.update, self._entries, self._in_cycle), maxlen=0)  # the quickest loop there is

    def hide(self) -> None:
        """Removes from the entries what is there in mid-cycle only."""
        if self.shows_cycle:
            for name in self._names:
                deque(map(dict.pop, self._entries, repeat(name), repeat(None)), maxlen=0)
            self.shows_cycle, self._hidden = False, []
            if self._are_guests and self._entries:  # who exchange their entries as they like
                for param in [param for param, entry in self.state.items() if entry == {}]:
                    del self.state[param]
                self._entries, self._in_cycle = [], []

    def foreign(self, segments: list[Segment], *, moments: bool) -> list[Foreign] | None:
        """Returns what others put in the place of our tensors, or moved elsewhere, after checking that it can be
        copied; None if nothing changed. moments: whether to look at those too. Raises RuntimeError, TypeError or
        ValueError, which names the parameter, for what is gone or does not fit.
        """
        if not self.known or self._are_ours(moments=moments):
            return None
        found: list[Foreign] = []
        for segment in segments:
            entry = self.state.get(segment.param)
            if not entry:
                raise RuntimeError(
                    f"the entry of {segment.where} was removed from optimizer.state: to start a parameter's moments "
                    "from zero, remove its entry from a state_dict() and load that"
                )
            for name in segment.names(in_cycle=self.shows_cycle):
                value, own = entry.get(name), segment.shown[name]
                if value is not own or segment.show(name) is not own:
                    what = f"{name!r} in optimizer.state of {segment.where}"
                    checkpoint.check_value(name, value, segment.param, what)
                    found.append((segment, name, value))
        return found

    def _are_ours(self, *, moments: bool) -> bool:
        """Returns whether the state holds exactly what we put there, in our memory."""
        state = self.state
        if self._are_guests:
            held = map(self.state.get, self._guests)
            return not self.shows_cycle or (
                all(map(operator.is_, held, self._entries)) and self._displacements.unchanged()
            )
        return (
            len(state) == len(self._values)
            and all(map(operator.is_, state.values(), self._values))
            and self._remainders.unchanged()
            and not (self.shows_cycle and not self._displacements.unchanged())
            and not (moments and not self._moments.unchanged())
        )
