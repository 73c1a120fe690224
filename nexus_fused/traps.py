"""Mistakes that raise no error and show only in metrics(): one warning each, with the remedy. The host knows all that
is judged here; learning rates on a device are not judged.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from . import graphs
from .flat import GRAD
from .options import BFLOAT16_STEPS, INNER_LR_FLOOR
from .walk import Walk

TOO_FAR = 10  # times the learning rate that γ is scheduled by
FEW = 3  # open cycles in a row that look wrong


class Traps:
    """Looks at every `step()` of one optimizer, after its gradients were found and before they are used.

    knows_schedule: False after a load, which does not tell how far the learning rate had risen before.
    """

    def __init__(self) -> None:
        self.knows_schedule = True
        self._without = 0  # steps so far, without any gradient; -1 once there was one
        self._pile: _Pile | None = None
        self._single = 0  # open cycles in a row that had one backward pass
        self._too_far = self._too_low = self._too_long = self._too_short = False  # whether it was said
        self._peaks: dict[int, float] = {}  # the largest learning rate of each group, as a share of the one it is for
        self._below: dict[int, int] = {}  # steps below it in a row

    def look(self, groups: list[dict[str, Any]], walk: Walk) -> None:
        """Warns (UserWarning) of what was wrong for a whole cycle; modifies nothing."""
        if self._without >= 0:
            self._look_for_gradients(groups, walk)
        elif self._pile is not None:
            self._look_at_pile(self._pile, walk.inner_steps or 1)
        self._look_at_schedules(groups, walk.inner_steps or 1)

    def look_at_pass(self, walk: Walk) -> None:
        """Warns at the end of a backward pass of an open cycle. Raises RuntimeError if its gradients are gone."""
        tables = walk.tables.values()
        if not any(table.observer.complete or bool((table.rows[:, GRAD] != 0).any()) for table in tables):
            raise RuntimeError(
                "a backward pass reached parameters, but their gradients are gone at its end, so that no inner step "
                "can be taken: does a hook take gradients away, to step another optimizer for example? Remove it"
            )
        self._without = -1
        looks = not (self._too_long or walk.chose_dtype or walk.is_blind)
        if looks and walk.position == BFLOAT16_STEPS:
            self._too_long = True
            _warn(
                f"more than {BFLOAT16_STEPS} inner steps in a cycle: the displacement is kept in bfloat16, where "
                "rounding adds up (to 2 % of it after 256): build with displacement_dtype=torch.float32, or with "
                "torch.bfloat16 to keep it so"
            )

    def look_at_cycle(self, groups: list[dict[str, Any]], walk: Walk) -> None:
        """Warns at a `step()` that ends an open cycle."""
        self._look_at_schedules(groups, 1)
        self._single = self._single + 1 if walk.position == 1 else 0
        if self._single == FEW and not self._too_short:
            self._too_short = True
            _warn(
                f"{FEW} cycles in a row had one backward pass each, which makes them AdamW on normalized gradients "
                "without a walk: with inner_steps=None step() ends the cycle, so call it after the last of K backward "
                "passes; where each of them has its own step(), build with inner_steps=K"
            )
        if self._without < 0 or walk.ranks.communicates:
            return
        self._without += 1
        if self._without == FEW:
            _warn(
                f"no backward pass has reached the parameters before any of the first {FEW} step() calls, so nothing "
                "moves: was the optimizer built with the parameters of the model that you train, and do you call "
                "loss.backward()?"
            )

    def _look_at_schedules(self, groups: list[dict[str, Any]], inner_steps: int) -> None:
        if not (self._too_far and self._too_low):
            for index, group in enumerate(groups):
                self._look_at_schedule(index, group, inner_steps)

    def _look_for_gradients(self, groups: list[dict[str, Any]], walk: Walk) -> None:
        """Ends with the first step that has a gradient. Ranks that take part in others' steps may have none."""
        tables = walk.tables.values()
        if any(table.observer.complete or bool((table.rows[:, GRAD] != 0).any()) for table in tables):
            self._without = -1
            params = (p for group in groups for p in group["params"] if p.grad is not None and p.requires_grad)
            param = next(params, None)
            if param is not None and not param.grad.is_inference():  # whose writes nobody counts
                self._pile = _Pile(param)
        elif tables and not walk.ranks.communicates:
            self._without += 1
            if self._without == walk.inner_steps:
                _warn(
                    f"no parameter had a gradient in any of the {walk.inner_steps} step() calls of a cycle, so nothing "
                    "moves: call loss.backward() before step(), and zero_grad() after it"
                )

    def _look_at_pile(self, pile: _Pile, inner_steps: int) -> None:
        grew = pile.grew()
        if not grew or pile.times >= max(inner_steps, 2):
            pile.hook.remove()
            self._pile = None
        if grew and self._pile is None:
            _warn(
                "gradients pile up: since the first step() every backward pass has added to the gradients that were "
                "there, so the walk follows their sum: call zero_grad() after each step()"
            )

    def _look_at_schedule(self, index: int, group: dict[str, Any], inner_steps: int) -> None:
        """Warns if γ, which follows the learning rate, cannot know its peak. Below γ's floor a schedule that still
        rises, or rests, may be a warm-up; one that falls has had its peak.
        """
        lr, base_lr = group.get("lr"), group.get("max_lr", group["base_lr"])
        if type(lr) is not float or type(base_lr) is not float or not base_lr or not group["inner_lr_follows_lr"]:
            return
        share = lr / base_lr
        if share > TOO_FAR and not self._too_far:
            self._too_far = True
            _warn(
                f"the learning rate of parameter group {index} is {lr:g}, {share:.0f} times the {base_lr:g} that it "
                f"was added with, and so the inner step is {share:.0f} times inner_lr: {_REMEDY}"
            )
        peak = self._peaks.get(index, 0.0)
        if peak > INNER_LR_FLOOR:
            return
        if share >= peak or lr == 0:
            self._peaks[index], self._below[index] = max(share, peak), 0
            return
        self._below[index] += 1
        if self._below[index] == inner_steps and self.knows_schedule and not self._too_low:
            self._too_low = True
            _warn(
                f"the learning rate of parameter group {index} rose to {peak * base_lr:g} and now falls, but the "
                f"group was added with {base_lr:g}, so the inner step has never been more than its floor, "
                f"{INNER_LR_FLOOR} · inner_lr: {_REMEDY}"
            )


_REMEDY = "set group['base_lr'] to the peak of the schedule, or build the optimizer with inner_lr_follows_lr=False"


class _Pile:
    """Counts in `times` how many steps in a row found a gradient that a backward pass had added to a used one.

    That is so if a pass finds the very tensor that the step saw, unwritten, and the next step sees it with the pass's
    writes and no others. It is not so for a gradient that was zeroed in any way, clipped or written by hand, or that
    another model's backward pass left and that is zeroed before its own next pass.
    """

    def __init__(self, param: Tensor) -> None:
        self._param, self.times = weakref.ref(param), 0
        known = weakref.ref(self)

        @torch.utils.hooks.unserializable_hook  # else to save a plain tensor warns of it
        def before_a_pass_adds(_: Tensor) -> None:
            pile = known()
            if pile is not None and not torch.compiler.is_compiling() and (pile._passes or pile._holds_values()):
                pile._passes += 1

        self.hook = param.register_hook(before_a_pass_adds)
        self._remember(param.grad)

    def _remember(self, grad: Any) -> None:
        self._grad, self._version, self._passes = weakref.ref(grad), grad._version, 0

    def _has_writes(self, count: int) -> bool:
        """Returns whether the gradient is the one that the last step saw, with `count` writes since."""
        grad: Any = getattr(self._param(), "grad", None)
        return grad is self._grad() and grad is not None and bool(grad._version == self._version + count)

    def _holds_values(self) -> bool:
        """Returns whether the gradient's values are those that the last step saw: zeroing through `.data` leaves the
        version as it is. Waits for the device, in the first cycle only, and never in a CUDA graph's capture.
        """
        if not self._has_writes(0):
            return False
        grad: Any = self._grad()
        return graphs.capture_id([grad.device]) is not None or bool(grad.any())

    def grew(self) -> bool:
        """Returns whether it grew since the last step."""
        if self._passes < 1 or not self._has_writes(self._passes):
            return False
        self.times += 1
        self._remember(self._grad())
        return True


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=1)  # schedulers wrap step(), and Accelerate ignores all that they seem to warn of
