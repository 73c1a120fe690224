"""Whether a framework accumulates gradients, where that can be seen: the walk wants a step() after each micro-batch.

Several backward passes before a step() are allowed, so counting them says nothing. But Accelerate states, for the whole
process, whether a step follows a backward pass (the Hugging Face Trainer sets the same flag), and Lightning's Trainer
hands step() a closure that leads to its settings. A framework that was never imported drives nothing, so nothing is
imported here.
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
    """Has a method run without autograd, Dynamo, inference mode and FakeTensorMode, whatever its caller is in.

    Dynamo cannot see what kernels do with addresses, and would make guards of the scalars that the host reads. A tensor
    made in inference mode cannot be written outside of it, and one made in FakeTensorMode has no memory. A closure that
    `step()` is given runs so too.
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
    """Has Ctrl-C wait for the end of the block: weights, state and position describe one moment at any time.

    Python runs handlers of signals between any two operations of the main thread, and nowhere else.
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
    """Has a method run on its own, and on the optimizer itself, also where it is called on a framework's wrapper.

    Lightning's wrappers imitate the class of what they wrap, so our methods run with a wrapper as `self`. Reading its
    attributes reaches the optimizer, but whatever they set would stay in the wrapper, unseen by the next `step()`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self._itself(), *args, **kwargs)

    return cast(Method, on_its_own(call))


class AccumulationWatch:
    """Looks at every `step()` of one optimizer, of the class `name`, and warns once."""

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False
        self._looked = False  # at what Accelerate did between two steps
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._unfinished = 0  # backward passes that Accelerate said no step would follow

    def look(self, params: Iterable[Tensor], closure: Callable[[], Any] | None) -> None:
        """Warns (UserWarning) where the framework accumulates; after the backward pass, before gradients are used."""
        if self._warned:
            return
        if closure is not None:
            self._warn("Lightning's Trainer", "accumulate_grad_batches", _lightning(closure))
        if not self._looked:
            self._warn("Accelerate or the Trainer above it", "gradient_accumulation_steps", self._accelerate(params))

    def _accelerate(self, params: Iterable[Tensor]) -> int:
        """Micro-batches per step: a hook counts backward passes from the first step to the second, then it goes."""
        if self._hook is not None:
            self._hook.remove()
            self._hook, self._looked = None, True
            return self._unfinished + 1
        param = next((p for p in params if p.grad is not None and p.requires_grad), None)
        if "accelerate.state" not in sys.modules:
            self._looked = True
        elif param is not None:
            self._hook = param.register_post_accumulate_grad_hook(functools.partial(_count, weakref.ref(self)))
        return 1

    def _warn(self, framework: str, setting: str, micro_batches: int) -> None:
        if micro_batches <= 1:
            return
        self._warned = True
        warnings.warn(
            f"{framework} accumulates the gradients of {micro_batches} micro-batches before each step() of "
            f"{self._name}, so that the walk takes one inner step where it should take {micro_batches}: set {setting} "
            "to 1 (a cycle of inner_steps micro-batches takes its place), or filter this warning if you mean it",
            stacklevel=1,  # schedulers wrap step(), and Accelerate ignores all that they seem to warn of
        )


def _count(watch: weakref.ref[AccumulationWatch], _: Tensor) -> None:
    """The hook: was this backward pass one that no step follows?"""
    known = watch()
    if known is not None and not torch.compiler.is_compiling():
        known._unfinished += not sys.modules["accelerate.state"].GradientState().sync_gradients


def _lightning(closure: Callable[[], Any]) -> int:
    """Micro-batches per step, from the module that Lightning's Trainer binds to the closure; 1 for other closures."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        kind = getattr(sys.modules.get(package), "LightningModule", ())
        for argument in getattr(closure, "args", ()):
            if isinstance(argument, kind):
                trainer = getattr(argument, "_trainer", None)  # `trainer` raises where there is none
                return int(getattr(trainer, "accumulate_grad_batches", 1))
    return 1
