"""What every optimizer with a walk can do: step, show θ, save and load. See walk.py for what a cycle does."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from . import agreement, backends, checkpoint
from .cycle import combine, summarize
from .frameworks import AccumulationWatch, of_the_optimizer, on_its_own, uninterrupted
from .options import GROUP_KEYS, is_frozen
from .passes import ForScaler, Passes
from .ranks import Ranks
from .state import State
from .traps import Traps
from .walk import Choices, Outer, Walk, entries_of


class WalkingOptimizer(Optimizer):
    """The methods that NexusAdamW and Nexus have in common."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over `grad_scale` and `found_inf`

    def _build(self, choices: Choices, ranks: Ranks, outer: Outer | None = None) -> None:
        self._itself = weakref.ref(self)
        self._watch, self._traps = AccumulationWatch(type(self).__name__), Traps()
        backends.check_choice(*choices[1:3])
        self._choices = choices  # of the constructor, as `Walk` takes them
        self._walk = Walk(choices, ranks, outer)
        itself: Any = self._itself
        self._for_scaler = ForScaler()
        self._passes = Passes(self._for_scaler.hide, lambda: itself()._end_pass()) if self._walk.is_open else None
        self._told_of_zeroing = False
        self._state = State(self, self._walk, lambda: itself()._follow_passes())
        self._built = False

    def _follow_passes(self) -> None:
        """Watches the backward passes of all parameters that there are now."""
        if self._passes is not None:
            self._passes.follow((p for group in self.param_groups for p in group["params"]), self._walk.ranks.modules)
            self._for_scaler.forget()

    @on_its_own
    def _take_groups(self, first: int, when: str) -> None:
        """Registers the parameters of the groups from the first one on, if all ranks do."""
        entries = entries_of(self.param_groups)
        entries = [entry for entry in entries if entry[0] >= first]
        live = [entry for entry in entries if not is_frozen(entry[2])]
        self._walk.follow_ranks(live, self.param_groups)
        self._compare_ranks(when, weights=[p for *_, p in entries])
        self._state.register(entries, flatten=self._walk.flatten)

    # Stepping

    @on_its_own
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Consumes the gradients of one micro-batch: takes an inner step, and at the end of a cycle the outer step.

        With `inner_steps=None` each backward pass has taken its inner step, and this takes the outer one. Without a
        backward pass since the last `step()` it does nothing, except that with a `displacement_group` it joins the
        average of the other ranks.

        Updates weights and state in place, and returns what `closure` returns. Waits for a device only if other
        parameters lie on the CPU. A gradient, parameter or hyperparameter that cannot be used raises RuntimeError,
        ValueError or TypeError, which names its group; nothing is modified then.

        In a CUDA graph each replay reads the gradients at their captured addresses, and hyperparameters that are
        tensors on the device; other hyperparameters keep their captured values. Run one cycle outside of the graph
        first, and capture whole cycles: replays of a part never reach AdamW, and nothing warns. With `inner_steps=None`
        you may capture a backward pass or `step()` alone, since the device then counts the inner steps (backends "cuda"
        and "triton", no other ranks). Capture again after adding groups, unfreezing or moving parameters, or changing
        amsgrad.
        """
        self._refuse_inside_outer_weights("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._passes is not None:
            self._end_cycle(self._passes)
            return loss
        with uninterrupted():
            assert self.inner_steps is not None
            params = (p for group in self.param_groups for p in group["params"])
            self._watch.look(params, closure, self.inner_steps)
            self._state.follow_members()
            last = self.cycle_position + 1 == self.inner_steps
            self._compare_for_debugging("in step()", averages=last)
            self._state.refresh(gradients=True, moments=last)
            self._traps.look(self.param_groups, self._walk)
            try:
                self._walk.step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            finally:
                self._state.show_position()
        return loss

    @on_its_own
    def _end_pass(self) -> None:
        """Takes the inner step of a backward pass that ends, and frees its gradients."""
        self._refuse_inside_outer_weights("a backward pass", ", then zero_grad(), and run the pass again")
        with uninterrupted():
            self._for_scaler.hide()
            self._tell_of_zeroing()
            self._state.follow_members()
            self._compare_for_debugging("in a backward pass", averages=False)
            self._state.refresh(gradients=True, moments=False)
            self._traps.look_at_pass(self._walk)
            if not self._walk.is_blind and self._walk.make_room(self._walk.position + 1):
                self._state.show(in_cycle=True)
            try:
                self._walk.step(None, None)
            finally:
                self._state.show_position()
            self._walk.let_gradients_go()
            self._for_scaler.show(self._walk.work)

    def _end_cycle(self, passes: Passes) -> None:
        """Takes the outer step of a cycle with `inner_steps=None`."""
        if passes.merges:
            raise RuntimeError(
                "step() inside one_micro_batch(): leave the with block first, which takes the inner step"
            )
        if passes.is_replaced:
            raise RuntimeError(
                "another optimizer with inner_steps=None has since been built for some of these parameters, and takes "
                "their inner steps: use that one, or build this one again"
            )
        with uninterrupted():
            self._state.follow_members()
            self._check_nothing_waits()
            self._for_scaler.hide()
            self._tell_of_zeroing()
            if not self._walk.is_blind:  # else a replay may have taken inner steps
                self._traps.look_at_cycle(self.param_groups, self._walk)
                if self.at_boundary and not self._walk.is_local:
                    return
            self._compare_for_debugging("in step()", averages=True)
            self._state.refresh(gradients=False)
            self._walk.unscale_norms(getattr(self, "grad_scale", None))
            try:
                self._walk.finish(None)
            finally:
                self._state.show_position()

    def _waiting(self) -> tuple[int, int] | None:
        """Returns group and index of a parameter with a gradient that no inner step has taken; None without one."""
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and not self._for_scaler.holds(param):
                    return index, i
        return None

    def _check_nothing_waits(self) -> None:
        """Raises RuntimeError for gradients that no inner step has taken: they would be lost, or added to others."""
        waiting = self._waiting()
        if waiting is not None:
            raise RuntimeError(
                f"parameter {waiting[1]} of group {waiting[0]} has a gradient at step() that no inner step has taken. "
                "With inner_steps=None each backward pass takes its inner step when it ends. If a pass failed, call "
                "zero_grad() and run it again. If you set p.grad yourself, do that inside `with "
                "optimizer.one_micro_batch():`"
            )

    @of_the_optimizer
    @contextlib.contextmanager
    def one_micro_batch(self) -> Iterator[None]:
        """Adds up the gradients of several backward passes, with `inner_steps=None`, and takes one inner step at the
        end.

        Use it for losses whose backward passes need the same weights, for passes whose gradients you throw away, and
        for gradients that you set by hand. Takes no inner step if the gradients were zeroed inside. After an error
        inside it takes none either, and leaves the gradients: call zero_grad(), or the next pass raises RuntimeError.
        With `inner_steps=K` it raises RuntimeError, since there `step()` says where a micro-batch ends.
        """
        passes = self._passes
        if passes is None:
            raise RuntimeError(
                f"one_micro_batch() is for inner_steps=None: with inner_steps={self.inner_steps} gradients add up "
                "until step(), which takes one inner step on their sum"
            )
        if passes.merges:  # the outermost block ends the micro-batch
            yield
            return
        self._for_scaler.hide()
        passes.merges = True
        try:
            yield
        except BaseException:
            passes.note_failure()
            raise
        finally:
            passes.merges = False
        if self._waiting() is not None:
            passes.end()
        else:
            self._show_again()

    def _show_again(self) -> None:
        """Shows GradScaler a gradient again if nothing took the place of the hidden one."""
        if self._passes is not None and not self._walk.is_blind and not self.at_boundary:
            self._for_scaler.show(self._walk.work)

    @of_the_optimizer
    def discard_cycle(self) -> None:
        """Forgets the running cycle: returns the parameters to θ, without an outer step. Does nothing at a boundary.

        With a `displacement_group` all ranks must call it.
        """
        self._refuse_inside_outer_weights("discard_cycle()")
        self._for_scaler.hide()
        if self.at_boundary:
            return
        with uninterrupted():
            self._state.follow_members()
            self._state.refresh(gradients=False, moments=False)
            try:
                self._walk.return_to_theta()
            finally:
                self._state.show_position()
            if self._passes is not None:  # GradScaler steps all the same
                self._for_scaler.show(self._walk.work)

    @on_its_own
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes gradients as torch.optim does. With `inner_steps=None` backward passes have already used and freed
        theirs, and zeroing does not undo their inner steps: warns once of that in mid-cycle.
        """
        optimizer: Any = self._itself()
        optimizer._watch.zeroed()
        passes = optimizer._passes
        if passes is not None:
            passes.forget_failure()
            if passes.merges:
                set_to_none = True  # a gradient of zeros would be a micro-batch
            elif not (optimizer._walk.is_blind or optimizer.at_boundary) and optimizer._waiting() is None:
                optimizer._for_scaler.was_zeroed = True  # else they are of a pass that failed
                optimizer._tell_of_zeroing()
        super().zero_grad(set_to_none)

    def _tell_of_zeroing(self) -> None:
        """Warns once if zero_grad(), the optimizer's or the model's, was called in mid-cycle."""
        if self._for_scaler.was_zeroed and not (self._told_of_zeroing or self._walk.is_blind):
            self._told_of_zeroing = True
            warnings.warn(
                f"gradients were zeroed after {self.cycle_position} backward pass(es) without a step(): with "
                "inner_steps=None each of them has taken its inner step, which zeroing does not take back. To throw "
                "passes away, such as a generator's through its discriminator, run them inside `with "
                "optimizer.one_micro_batch():` and call zero_grad() there, or call discard_cycle(). To have the K-th "
                "step() end the cycle, build with inner_steps=K",
                stacklevel=1,
            )

    @of_the_optimizer
    def outer_step(self) -> None:
        """Ends a cycle early: applies the displacement so far, and ignores gradients that no inner step has used.

        Raises what `step()` raises. Without a `displacement_group` it does nothing before the first inner step. With
        one, each rank calls it when it runs out of micro-batches, however many it had, even none. The call joins the
        averages of ranks that still call `step()`, waits for the device, and returns once every rank has called it.
        """
        self._refuse_inside_outer_weights("outer_step()")
        self._for_scaler.hide()
        if self.at_boundary and not self._walk.is_local:
            return
        everybody_is_here = False
        while not everybody_is_here:
            with uninterrupted():
                self._state.follow_members()
                self._compare_for_debugging("in outer_step()", averages=self._walk.is_local)
                self._state.refresh(gradients=False)
                try:
                    everybody_is_here = self._walk.finish(None, leaves=True)
                finally:
                    self._state.show_position()

    @property
    def inner_steps(self) -> int | None:
        """K, the micro-batches in a cycle; None where `step()` ends it."""
        return self._walk.inner_steps

    @property
    def cycle_position(self) -> int:
        """Inner steps taken in the running cycle, from 0."""
        return self._walk.position

    @property
    def at_boundary(self) -> bool:
        """Whether the parameters hold θ: the time to average weights, save and evaluate."""
        return self._walk.position == 0

    # Looking

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """Each parameter's state, as torch.optim's. You may change, replace or move what is in it."""
        optimizer: Any = self._itself()
        optimizer._walk.wait_for_host_state()
        optimizer._state.catch_up()
        optimizer._state.entries.known = True
        optimizer._state.entries.reveal()
        state: dict[Any, Any] = optimizer.__dict__["state"]
        return state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        optimizer: Any = self._itself()
        if not optimizer._walk.keeps:
            raise AttributeError("the state belongs to the optimizers behind the walk: assign to theirs, at a boundary")
        optimizer._state.entries.known = True
        optimizer.__dict__["state"] = state

    @of_the_optimizer
    def eval(self) -> None:
        """Shows θ in the parameters until `train()`, as `outer_weights()` does, for trainers that call it.

        `state_dict()` then describes the boundary, and in mid-cycle warns once of what it leaves out. After
        `eval()` at a boundary you may copy the optimizer and load a state; loading undoes `eval()`. Inside
        `outer_weights()` neither `eval()` nor `train()` does anything.
        """
        with uninterrupted():
            self._state.show_theta()

    @of_the_optimizer
    def train(self) -> None:
        """Puts the walk back after `eval()`, bit for bit. Does nothing otherwise."""
        if not self._state.in_outer_weights:
            with uninterrupted():
                self._state.show_walk()

    @of_the_optimizer
    @contextlib.contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Shows θ in the parameters, to evaluate or save in mid-cycle; at the end puts the walk back, bit for bit.

        Holds a copy of the walking weights. Inside, `state_dict()` describes the boundary; `step()`, `outer_step()` and
        loading raise RuntimeError. A value that you write into a parameter inside becomes θ, and the walk moves along.
        Blocks may be nested. After `eval()`, θ stays until `train()`.
        """
        state = self._state
        shown, inside = state.shows_theta, state.in_outer_weights
        self.eval()
        state.in_outer_weights = True
        try:
            yield
        finally:
            state.in_outer_weights = inside
            if not shown:
                self.train()

    @of_the_optimizer
    def metrics(self) -> dict[str, Any]:
        """Returns figures of the last finished cycle, an early-ended one too. Waits for the device, not for other
        ranks.

        alignment: mean pairwise cosine similarity of the cycle's unit gradients, each at its own point of the walk; NaN
        with fewer than two. grad_norms: ‖g_k‖ of each micro-batch, unscaled (with `inner_steps=None` they stay scaled
        if the loop calls GradScaler's `unscale_()`). lost_fraction: the share of the cycle's element moves that
        rounding swallowed (after a load in mid-cycle, of the moves since); if it is not small, raise inner_lr.
        skipped_inner_steps, skipped_outer_steps: totals of the steps and cycles in which nothing moved.
        """
        cycles = list(self._walk.cycles.values())
        return {
            **summarize(combine(cycles), cycles[0].room),
            "skipped_inner_steps": int(cycles[0].skipped_inner_steps),
            "skipped_outer_steps": int(cycles[0].skipped_outer_steps),
        }

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} (inner_steps: {self.inner_steps}, cycle_position: {self.cycle_position}"]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            hidden = ("params", "inner_steps", *GROUP_KEYS)
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in hidden]
        return "\n".join(lines) + "\n)"

    def _refuse_inside_outer_weights(self, what: str, then: str = " first") -> None:
        if self._state.shows_theta:
            inside = self._state.in_outer_weights
            where = "inside outer_weights()" if inside else "after eval()"
            remedy = "leave the with block" if inside else "call train()"
            raise RuntimeError(f"{what} {where}: the parameters show θ there; {remedy}{then}")

    @of_the_optimizer
    def check_ranks(self, group: Any = None) -> None:
        """Raises RuntimeError on all ranks of a process group (None: the default one) if they differ; the error names
        the first difference.

        Compares inner_steps, cycle_position, hyperparameters, the last norms, and the parameters' shapes, dtypes,
        shardings and requires_grad; not the parameters' values. Waits for the device.

        All ranks of the group must call it. It is for replicas that other code keeps equal, such as
        DistributedDataParallel. Where step() communicates, building and loading the optimizer already check this.
        """
        self._state.follow_members()
        agreement.compare_replicas(self._walk, self.param_groups, self._state.entries.state, group)

    def _compare_ranks(self, when: str, error: Exception | None = None, **what: Any) -> None:
        agreement.compare(self._walk, self.param_groups, self._state.entries.state, when, error, **what)

    def _compare_for_debugging(self, when: str, *, averages: bool) -> None:
        agreement.compare_for_debugging(
            self._walk, self.param_groups, self._state.entries.state, when, averages=averages
        )

    # Saving and loading

    @of_the_optimizer
    def state_dict(self) -> dict[str, Any]:
        """Returns the state that torch.optim.AdamW, or the optimizers behind the walk, would save, and what the walk
        adds.

        The walk adds each parameter's remainder below float32, and in mid-cycle its displacement. Save it after any
        micro-batch, together with the model's state at that moment, and training resumes bit for bit. Its tensors are
        the live ones, as in torch.optim.
        """
        if self._walk.is_local and not self.at_boundary and not self._state.shows_theta:
            warnings.warn(
                f"state_dict() in mid-cycle ({self._walk.progress}), where each rank "
                "of displacement_group has a walk of its own: have every rank save its own model and optimizer, or "
                "save inside outer_weights() or at a boundary",
                stacklevel=6,
            )
        self._state.prepare_to_save()
        packed = self._pack()
        for hook in self._optimizer_state_dict_post_hooks.values():
            packed = hook(self, packed) or packed
        return packed

    @of_the_optimizer
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state in place: one from any position of a cycle, or one without a walk.

        Of what the walk or NexusAdamW keeps, only displacements may lose precision; optimizers behind a Nexus load
        their own.

        A state that does not fit raises ValueError or TypeError. The error names group and parameter, and nothing is
        modified.
        """
        if self._state.hides_walk:
            self._refuse_inside_outer_weights("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._state.follow_members()
        try:
            groups, *rest = self._check(state_dict)
        except Exception as error:  # whatever it is, others must not wait for this rank
            self._compare_ranks("in load_state_dict()", error)
            raise
        self._compare_ranks("in load_state_dict()", loads=groups[0].get("cycle_position", 0) if groups else 0)
        with uninterrupted():
            self._for_scaler.hide()
            self._restore(groups, *rest)
            self._traps.knows_schedule = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_to_copy(self) -> dict[str, Any]:
        """Returns what a copy needs beside groups and state, and brings those up to date."""
        if self._state.hides_walk:
            self._refuse_inside_outer_weights("copying or pickling the optimizer")
        if self._walk.ranks.has_groups:
            raise RuntimeError(
                "an optimizer with a process group cannot be copied or pickled: save its state_dict(), build another "
                "one with its own group and load that"
            )
        self._state.prepare_to_save()
        finished = combine(list(self._walk.cycles.values()))
        # As lists: other processes are sent where a tensor lies, and these would be gone when they look.
        kept = None if finished is None else [sums.tolist() for sums in finished]
        return {"_choices": self._choices, "_finished": kept, "_for_scaler": self._for_scaler.shown()}

    def _take_rest(self, state: dict[str, Any]) -> None:
        """Finishes a copy from `_state_to_copy`, with the original's figures of the last cycle."""
        self._built, self._traps.knows_schedule, self._state.entries.known = True, False, False
        for param in state["_for_scaler"]:  # a copy of what it showed
            param.grad = None
        finished = state["_finished"]
        if finished is not None:
            of_all = next(iter(self._walk.cycles.values()))
            if self._walk.make_room(len(finished[0]) - 3 * len(self.param_groups)):
                self._state.show(in_cycle=self._walk.position > 0)
            with torch.device("cpu"):  # whatever the default device is
                sums, counts = finished
                of_all.finished = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.int64)

    def _pack(self) -> dict[str, Any]:
        """Returns what `state_dict()` returns, before its hooks."""
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            return checkpoint.pack(super().state_dict())
        finally:
            self._optimizer_state_dict_post_hooks = hooks

    def _check(self, state_dict: dict[str, Any]) -> tuple[Any, ...]:
        """Returns what `_restore` takes, groups first. Raises for a state that does not fit; modifies nothing."""
        return checkpoint.check(state_dict, self.param_groups, self._walk)

    def _restore(self, groups: Any, *rest: Any) -> None:
        entries, foreign = rest
        self._state.restore(groups, entries)
        self._state.entries.state.update(foreign)

    @of_the_optimizer
    def materialize_displacements(self) -> None:
        """Puts zero displacements into the state. Call it before a load that fills only the keys it finds, if the
        checkpoint was saved in mid-cycle.

        They are dropped again if the loaded position is 0, otherwise at the end of the next cycle.
        """
        self._refuse_inside_outer_weights("materialize_displacements()")
        if self.inner_steps != 1:
            self._state.materialize_displacements()
