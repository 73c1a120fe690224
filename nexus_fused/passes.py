"""Detects the end of each backward pass that reaches an optimizer's parameters: an inner step, with `inner_steps=None`.
Autograd tells of gradients, parameter by parameter, not of passes. So each parameter has a hook. The first hook of a
pass asks the engine for a call at the end of the pass; the others return at once.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from .cycle import Cycle
from .dtensor import follow_passes, local_part
from .frameworks import adds_to_gradient
from .table import Table


def _in_python(armed: list[Callable[[], None]]) -> Callable[[Any], None]:
    """The hook: takes a function off a list, if there is one, and calls it."""

    def hook(_: Any) -> None:
        if armed:
            armed.pop()()

    return hook


# The extension's does the same. It costs a backward pass 0.4 us for each parameter, Python's 0.5 us.
_hook_of: Callable[[list[Callable[[], None]]], Callable[[Any], None]] = _in_python
with contextlib.suppress(ImportError):
    from ._C import hook_of as _hook_of


_passes_of: weakref.WeakValueDictionary[int, Passes] = weakref.WeakValueDictionary()  # by a parameter's id


class Passes:
    """Calls `ended` at the end of each backward pass that reached the parameters given to `follow`. An error that
    `ended` raises comes out of backward(). FSDP2's parameters get gradients without hooks: its modules tell of
    passes, and call `before` first.
    """

    def __init__(self, before: Callable[[], None], ended: Callable[[], None]) -> None:
        self._before, self._ended = before, ended
        known = weakref.ref(self)

        def begin() -> None:
            passes = known()
            if passes is not None:
                passes._begin()

        self._armed, self._begins = [begin], begin  # not empty: the next hook begins a pass
        self._hook = _hook_of(self._armed)
        self._params: dict[int, weakref.ref[Any]] = {}
        self._handles: dict[int, Any] = {}
        self.merges = False  # passes into one micro-batch; nothing is called then
        self._left: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []  # parameters, and what failed passes left
        self._number = 0  # of the pass that began last
        self._ended_task = -1  # of autograd's, whose end was seen last
        self.is_replaced = False  # by those of another optimizer that has some of the parameters
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def follow(self, params: Iterable[Tensor], modules: Iterable[weakref.ref[Any]]) -> None:
        """Watches these parameters from now on, frozen ones too, and no others. modules: FSDP2's that hold some."""
        now = {id(param): param for param in params}
        for key in [key for key, param in self._params.items() if param() is not now.get(key)]:
            del self._params[key]
            if key in self._handles:
                self._handles.pop(key).remove()
        for key, param in now.items():
            if key not in self._params:
                self._replace(_passes_of.get(key), key, param)
                _passes_of[key] = self
                self._params[key] = weakref.ref(param)
                handle = _hooked(param, self._hook)
                if handle is not None:
                    self._handles[key] = handle
        for module in [known() for known in modules]:
            if module is not None:
                follow_passes(module, self)

    def before_reduction(self) -> None:
        """FSDP2 is about to reduce gradients in a pass."""
        if not self.is_replaced:
            self._before()

    def after_reduction(self) -> None:
        """FSDP2 has reduced all of them."""
        if not self.is_replaced:
            self._hook(None)

    def _replace(self, before: Passes | None, key: int, param: Tensor) -> None:
        """Takes a parameter over from another optimizer, such as that of a notebook's cell that runs again."""
        of_before = None if before is None or before is self else before._params.get(key)
        if before is not None and of_before is not None and of_before() is param:
            before.is_replaced = True
            _remove_all(before._handles)

    def _begin(self) -> None:
        self._number += 1
        self._before()
        try:
            compiled = sys.modules.get("torch._dynamo.compiled_autograd")
            if torch.compiler.is_compiling() or getattr(compiled, "in_compiled_autograd_region", False):
                if self.merges:  # where no end is needed
                    self._arm(self._number)
                    return
                raise RuntimeError(
                    "compiled autograd runs this backward pass, and inner_steps=None cannot see its end: switch it off "
                    "(torch._dynamo.config.compiled_autograd = False), run the pass inside `with "
                    "optimizer.one_micro_batch():`, or use inner_steps=K with a step() after each micro-batch"
                )
            Variable._execution_engine.queue_callback(_End(self, self._number))
        except BaseException:
            self._arm(self._number)
            raise

    def end(self) -> None:
        """Ends a pass. Raises RuntimeError if its gradients were added to those of one that failed."""
        if self.merges:
            return
        for param, left in self._left:
            gradient = left()
            if gradient is not None and getattr(param(), "grad", None) is gradient:
                raise RuntimeError(
                    "an earlier backward pass failed, or was refused, and its gradients are still there: this pass has "
                    "added its own to them. Call zero_grad(), and run the pass again"
                )
        self._left.clear()
        try:
            self._ended()
        except BaseException:
            self.note_failure()
            raise

    def note_failure(self) -> None:
        """Remembers the gradients that a failed pass has left, which the next one must not add to."""
        params = [param() for param in self._params.values()]
        waiting = [param for param in params if param is not None and param.grad is not None]
        self._left = [(weakref.ref(param), weakref.ref(param.grad)) for param in waiting]

    def forget_failure(self) -> None:
        """Forgets a failed pass: zero_grad() was called, or the pass has not failed after all."""
        self._left.clear()

    def end_once(self) -> None:
        """Ends a pass, once in a task of autograd."""
        task = torch._C._current_graph_task_id()
        if task != self._ended_task:
            self._ended_task = task
            self.end()

    def _arm(self, number: int) -> None:
        """Arms the hooks, unless a pass began after this number: the next one to run begins a pass."""
        if number == self._number and not self._armed:
            self._armed.append(self._begins)


class _End:
    """What the engine calls at the end of a pass. If the pass fails, the engine drops it, and the next pass is noticed
    all the same.
    """

    def __init__(self, passes: Passes, number: int) -> None:
        self._passes, self._number = weakref.ref(passes), number
        self._is_last = self._came = False

    def __call__(self) -> None:
        self._came = True
        node = torch._C._current_autograd_node()
        if node is not None:
            self._wait_for(node)
        elif not self._is_last:
            self._is_last = True  # behind what others, such as DistributedDataParallel, have to do at the end
            Variable._execution_engine.queue_callback(self)
        else:
            passes = self._passes()
            if passes is not None:
                passes._arm(self._number)
                passes.end_once()

    def _wait_for(self, node: Any) -> None:
        """Goes on with the pass that this one was part of: re-entrant checkpoints run passes inside of a node."""
        handles: list[Any] = []

        def goes_on(*_: Any) -> None:
            while handles:
                handles.pop().remove()
                if not handles:
                    passes = self._passes()
                    if passes is not None:
                        passes.forget_failure()
                    Variable._execution_engine.queue_callback(self)

        handles += [after.register_prehook(goes_on) for after, _ in node.next_functions if after is not None]
        passes = self._passes()
        if passes is not None:  # it may never come to that
            passes.note_failure()
            passes._arm(self._number)

    def __del__(self) -> None:
        passes = self._passes()
        if passes is not None:
            passes._arm(self._number)
            if not self._came:
                passes.note_failure()


def _overflow(cycle: Cycle) -> float | Tensor:
    """Returns inf if a norm of the running cycle is not finite (NaN is kept as -1), else 0. Waits for no device."""
    if cycle.device.type == "cpu":
        norms = cycle.grad_norms.tolist()
        return math.inf if min(norms) < 0 or max(norms) == math.inf else 0.0
    zero_or_nan: Tensor = cycle.grad_norms.sqrt().sum() * 0
    return zero_or_nan.nan_to_num(nan=math.inf)


def _hooked(param: Any, hook: Callable[[Tensor], None]) -> Any:
    """Registers a hook, also with a frozen or uninitialized parameter. Returns its handle; None if no gradient can
    come.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if param.requires_grad:
            return param.register_post_accumulate_grad_hook(hook)
        if param.is_inference() or not (param.is_floating_point() or param.is_complex()):
            return None
        param.requires_grad_(True)
        try:
            return param.register_post_accumulate_grad_hook(hook)
        finally:
            param.requires_grad_(False)


def _take_all_off(showing: dict[int, weakref.ref[Any]]) -> None:
    for known in showing.values():
        param = known()
        if param is not None:
            param.grad = None


def _remove_all(handles: dict[int, Any]) -> None:
    while handles:
        handles.popitem()[1].remove()


class ForScaler:
    """Gradients for torch.amp.GradScaler to find between the end of a pass and the outer step, when all others are
    gone. The smallest parameter of each device shows 0, or inf if a micro-batch of the running cycle overflowed.
    They are removed before a pass adds to them. was_zeroed: somebody has set one to None meanwhile.
    """

    def __init__(self) -> None:
        self._chosen: list[tuple[Any, Cycle]] | None = None  # parameters, and whose norms
        self._handles: dict[int, Any] = {}
        self._showing: dict[int, weakref.ref[Any]] = {}  # by id, those that do now
        self.was_zeroed = False
        weakref.finalize(self, _remove_all, self._handles).atexit = False
        weakref.finalize(self, _take_all_off, self._showing).atexit = False

    def forget(self) -> None:
        """Chooses the parameters anew next time, since some came or went."""
        self.hide()
        _remove_all(self._handles)
        self._chosen = None

    def show(self, work: list[tuple[Cycle, list[Table]]]) -> None:
        """Shows them, after an inner step of these cycles, where no other gradient is. Waits for no device."""
        if self._chosen is None:
            self._chosen = self._choose(work)
        for param, cycle in [(param, cycle) for param, cycle in self._chosen if param.grad is None]:
            gradient = torch.empty_like(param, dtype=getattr(param, "grad_dtype", None) or param.dtype)
            local_part(gradient).fill_(_overflow(cycle))
            param.grad = gradient
            self._showing[id(param)] = weakref.ref(param)

    def _choose(self, work: list[tuple[Cycle, list[Table]]]) -> list[tuple[Any, Cycle]]:
        smallest: dict[torch.device, tuple[Any, Any, Cycle]] = {}
        for cycle, tables in work:
            for segment in [segment for table in tables for segment in table.segments if segment.param.requires_grad]:
                # GradScaler takes neither complex numbers nor float16, nor sees an overflow where nothing is.
                dtype = segment.param.dtype
                order = dtype.is_complex, dtype == torch.float16, segment.numel == 0, segment.numel
                if cycle.device not in smallest or order < smallest[cycle.device][0]:
                    smallest[cycle.device] = order, segment.param, cycle
        for _, param, _ in smallest.values():
            self._handles[id(param)] = param.register_hook(self._before_pass(param))
        return [(param, cycle) for _, param, cycle in smallest.values()]

    def _before_pass(self, param: Any) -> Callable[[Tensor], None]:
        known, of = weakref.ref(self), weakref.ref(param)

        def take_off(_: Tensor) -> None:
            itself, param = known(), of()
            if itself is not None and param is not None and itself.holds(param) and adds_to_gradient(param):
                itself._take_off(param)

        torch.utils.hooks.unserializable_hook(take_off)  # else to save a plain tensor warns of it
        return take_off

    def _take_off(self, param: Any) -> None:
        """Removes what a parameter shows, and whatever somebody put in its place."""
        self.was_zeroed |= param.grad is None
        del self._showing[id(param)]
        param.grad = None

    def hide(self) -> None:
        """Removes all of them."""
        for param in self.shown() if self._showing else ():
            self._take_off(param)

    def shown(self) -> list[Tensor]:
        """The parameters that show one."""
        return [param for param, _ in self._chosen or () if self.holds(param)]

    def holds(self, param: Tensor) -> bool:
        """Returns whether this parameter shows one."""
        return id(param) in self._showing
