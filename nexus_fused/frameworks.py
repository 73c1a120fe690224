"""Detects gradient accumulation, for `inner_steps=K`: the walk wants a step() after each micro-batch then.

Accelerate says for the whole process whether a step follows a backward pass, and the Hugging Face Trainer sets the same
flag. Lightning's Trainer passes step() a closure that leads to its settings. A framework that was never imported drives
nothing, so nothing is imported here. In other loops the backward passes tell: several before each step() of a whole
cycle may be several losses, but rarely are.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def on_its_own(method: Method) -> Method:
    """Makes a method run without autograd, Dynamo, inference mode and FakeTensorMode, whatever its caller is in. Dynamo
    cannot see what kernels do with addresses, and would guard on the scalars that the host reads. A tensor made in
    inference mode cannot be written outside of it, and one made in FakeTensorMode has no memory. A closure passed to
    `step()` runs so too, but with autograd.
    """

    @torch._disable_dynamo  # as torch.optim's methods; torch.compiler.disable() would import Dynamo with the package
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled() or torch._C._get_dispatch_mode(_FAKE) is not None:
            from torch._subclasses.fake_tensor import unset_fake_temporarily

            with torch.inference_mode(False), unset_fake_temporarily():
                return call(*args, **kwargs)
        before = torch.is_grad_enabled()
        try:  # from before the switch: Ctrl-C may come as soon as a call returns
            torch._C._set_grad_enabled(False)  # torch.no_grad() takes 1 us longer
            return method(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return cast(Method, call)


_HANDLED_IN_C = signal.getsignal(signal.SIGINT) is None  # by a program that embeds Python, whose handler stays


class uninterrupted:
    """Makes Ctrl-C wait for the end of the block, so that weights, state and position describe one moment at any time.
    Python runs signal handlers between any two operations of the main thread, and nowhere else.
    """

    def __enter__(self) -> None:
        self._came = False
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread() and not _HANDLED_IN_C:
            self._handler = signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: Any) -> None:
        self._came = True

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._came and callable(self._handler):  # not raised again: wake-up fds were told
                self._handler(signal.SIGINT, sys._getframe(1))
            elif self._came:
                signal.raise_signal(signal.SIGINT)


def of_the_optimizer(method: Method) -> Method:
    """Makes a method run on its own, and on the optimizer itself even if called on a framework's wrapper. Lightning's
    wrappers imitate the class that they wrap, so our methods run with a wrapper as `self`. Reading its attributes
    reaches the optimizer, but whatever they set would stay in the wrapper, unseen by the next `step()`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self._itself(), *args, **kwargs)

    return cast(Method, on_its_own(call))


def adds_to_gradient(param: Any) -> bool:
    """Returns whether the backward pass that runs a hook of this parameter will add to its gradient;
    torch.autograd.grad() does not.
    """
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(param).node)
    except RuntimeError:  # for a leaf, in autograd.grad() only
        return False


class AccumulationWatch:
    """Looks at every `step()` of one optimizer, of the class `name`, and warns once."""

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._passes: list[int] = []  # that added up before each step since the hook came
        self._unfinished = 0  # backward passes that Accelerate said no step would follow
        self._looks = True  # at backward passes; in the first cycle only

    def look(self, params: Iterable[Tensor], closure: Callable[[], Any] | None, inner_steps: int) -> None:
        """Warns (UserWarning) if gradients are accumulated; after the backward pass, before they are used."""
        if self._warned:
            return
        if closure is not None:
            self._warn("Lightning's Trainer accumulates", "accumulate_grad_batches", _lightning(closure))
        if self._looks and not self._warned:
            self._look_at_passes(params, inner_steps)

    def zeroed(self) -> None:
        """Notes a zero_grad(): passes before it do not count."""
        if self._passes:
            self._passes[-1] = 0

    def _look_at_passes(self, params: Iterable[Tensor], inner_steps: int) -> None:
        """Counts backward passes with a hook of one parameter, from the first step on."""
        if self._hook is None:
            param = next((p for p in params if p.grad is not None and p.requires_grad), None)
            if param is not None:
                self._hook = param.register_hook(_counts(weakref.ref(self), weakref.ref(param)))
                self._passes.append(0)
            return
        accelerate = "Accelerate, or the Trainer above it, accumulates"
        self._warn(accelerate, "gradient_accumulation_steps", self._unfinished + 1)
        self._looks = not self._warned and self._passes[-1] > 1
        if self._looks and len(self._passes) == inner_steps:
            self._warn("Your loop accumulates", "", min(self._passes))
            self._looks = False
        self._passes.append(0)
        if not self._looks:
            self._hook.remove()

    def _warn(self, who: str, setting: str, micro_batches: int) -> None:
        if micro_batches <= 1:
            return
        self._warned = True
        what, other_way = "backward passes", "call step() after each of them"
        if setting:
            what = "micro-batches"
            other_way = f"set {setting} to 1 (inner_steps micro-batches, a cycle, take its place)"
        warnings.warn(
            f"{who} the gradients of {micro_batches} {what} before each step() of {self._name}, so that the walk takes "
            f"one inner step where it should take {micro_batches}: build the optimizer with inner_steps=None, which "
            f"needs no other change, or {other_way}; filter this warning if it is wrong (several losses of one "
            "micro-batch)",
            stacklevel=1,  # schedulers wrap step(), and Accelerate ignores all that they seem to warn of
        )


def _counts(watch: weakref.ref[AccumulationWatch], of: weakref.ref[Any]) -> Callable[[Tensor], None]:
    """Returns a hook that counts backward passes that add to a gradient, and those that no step follows."""

    def count(_: Tensor) -> None:
        known, param = watch(), of()
        if known is not None and param is not None and not torch.compiler.is_compiling() and adds_to_gradient(param):
            known._passes[-1] = 1 if param.grad is None else known._passes[-1] + 1
            accelerate = sys.modules.get("accelerate.state")
            known._unfinished += accelerate is not None and not accelerate.GradientState().sync_gradients

    torch.utils.hooks.unserializable_hook(count)  # else to save a plain tensor warns of it
    return count


def _lightning(closure: Callable[[], Any]) -> int:
    """Returns micro-batches per step, from the module that Lightning's Trainer binds to the closure; 1 for other
    closures.
    """
    for package in ("lightning.pytorch", "pytorch_lightning"):
        kind = getattr(sys.modules.get(package), "LightningModule", ())
        for argument in getattr(closure, "args", ()):
            if isinstance(argument, kind):
                trainer = getattr(argument, "_trainer", None)  # `trainer` raises where there is none
                return int(getattr(trainer, "accumulate_grad_batches", 1))
    return 1
