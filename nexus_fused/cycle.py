"""The scalars of a cycle. They live on the device and are never read by the host, except by `metrics()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The columns of `Cycle.hyper`, all float64. `struct Hyper` in csrc/nexus_math.h is the same list; a test compares.
HYPER = ("inner_lr", "lr", "beta1", "beta2", "eps", "weight_decay", "sign", "normalize")
INNER_LR, LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN, NORMALIZE = range(8)

# Keys of a parameter group that belong to the running cycle; the same keys at every position.
GROUP_KEYS = (
    "cycle_position", "walk_length", "walk_sq_length", "touched", "grad_norms",
    "skipped_inner_steps", "skipped_outer_steps",
)  # fmt: skip


class Cycle:
    """Scalars of the running cycle on one device, all float64, for `n_groups` parameter groups and K inner steps.

    hyper [n_groups, 8]: what the kernels need of each group, see HYPER (`inner_lr` is γ_k, already scheduled).
    factor [n_groups]: ±γ_k/‖g_k‖, what a gradient is multiplied with; 0 where the inner step is skipped.
    walk_length, walk_sq_length [n_groups]: Γ = Σγ and Σγ² over the inner steps really taken.
    displacement_sq [n_groups]: ‖D‖², written by the outer step.
    grad_norms [K]: unscaled norms, -1 in place of NaN (NaN differs from itself, which distributed loading refuses).
    skipped_inner_steps, skipped_outer_steps: totals. moves, lost_moves: element moves in this cycle, and those
    that rounding swallowed whole.
    """

    def __init__(self, device: torch.device, inner_steps: int) -> None:
        self.device = device
        self.hyper = torch.zeros(0, len(HYPER), dtype=torch.float64, device=device)
        self.factor = self._zeros(0)
        self.walk_length, self.walk_sq_length, self.displacement_sq = (
            self._zeros(0),
            self._zeros(0),
            self._zeros(0),
        )
        self.grad_norms = self._zeros(inner_steps)
        self.skipped_inner_steps, self.skipped_outer_steps = self._zeros(), self._zeros()
        self.moves, self.lost_moves = self._zeros(), self._zeros()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def grow(self, n_groups: int) -> None:
        """Makes room for more groups; those that exist keep their values, a new one starts with Γ = 0."""
        missing = n_groups - len(self.factor)
        self.hyper = torch.cat([self.hyper, torch.zeros(missing, len(HYPER), dtype=torch.float64, device=self.device)])
        for name in ("factor", "walk_length", "walk_sq_length", "displacement_sq"):
            setattr(self, name, torch.cat([getattr(self, name), self._zeros(missing)]))

    def group_data(self, group: int) -> dict[str, Any]:
        """The tensors of this cycle as a parameter group shows them, views of the live values."""
        return {
            "walk_length": self.walk_length[group],
            "walk_sq_length": self.walk_sq_length[group],
            "grad_norms": list(self.grad_norms),
            "skipped_inner_steps": self.skipped_inner_steps,
            "skipped_outer_steps": self.skipped_outer_steps,
        }

    def load_group_data(self, group: int, data: dict[str, Any], *, running: bool) -> None:
        """Copies what `group_data` gave, perhaps in another process: the totals and, of a running cycle, its sums."""
        self.skipped_inner_steps.copy_(torch.as_tensor(data["skipped_inner_steps"]))
        self.skipped_outer_steps.copy_(torch.as_tensor(data["skipped_outer_steps"]))
        if running:
            self.walk_length[group] = data["walk_length"]
            self.walk_sq_length[group] = data["walk_sq_length"]
            for live, norm in zip(self.grad_norms, data["grad_norms"], strict=True):
                live.copy_(torch.as_tensor(norm))

    def set_hyper(self, rows: list[list[float | Tensor]]) -> None:
        """Brings the groups' hyperparameters, one row of HYPER each, to the device without waiting for it."""
        if any(isinstance(value, Tensor) for row in rows for value in row):
            values = [torch.as_tensor(value, dtype=torch.float64) for row in rows for value in row]
            self.hyper = torch.stack([v.to(self.device, non_blocking=True).view(()) for v in values]).view(
                len(rows), -1
            )
        else:
            self.hyper.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"), non_blocking=True)

    def advance(self, sq_norm: Tensor, position: int, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Decides about inner step `position` from the squared norm of all gradients, 0-dim, and counts its length.

        Source: ALGORITHM's n_k, γ_k/n_k and Γ; nothing moves when n_k is 0, inf or nan or `found_inf` is not 0.
        """
        norm = sq_norm.sqrt()
        taken = norm.isfinite() & (norm > 0)
        if found_inf is not None:
            taken &= (found_inf == 0).view(())
        step = torch.where(taken, self.hyper[:, INNER_LR], 0.0)
        self.factor = torch.where(taken, self.hyper[:, SIGN] * self.hyper[:, INNER_LR] / norm, 0.0)
        self.walk_length += step
        self.walk_sq_length += step * step
        self.skipped_inner_steps += ~taken
        unscaled = norm if grad_scale is None else norm / grad_scale.view(())
        self.grad_norms[position] = torch.where(unscaled.isnan(), -1.0, unscaled)

    def stand_still(self) -> None:
        """An outer step without a last gradient: nothing is added to the walk."""
        self.factor = torch.zeros_like(self.factor)

    def finish(self, position: int) -> dict[str, Tensor]:
        """Ends the cycle after `position` inner steps: returns its sums, on the device, and starts from zero."""
        self.skipped_outer_steps += (self.walk_length == 0).all()
        names = ("walk_length", "walk_sq_length", "displacement_sq", "moves", "lost_moves")
        sums = {name: getattr(self, name).clone() for name in names}
        sums["grad_norms"] = self.grad_norms[:position].clone()
        self.reset()
        return sums

    def reset(self) -> None:
        """Sets all sums of the running cycle, not the totals, to zero."""
        for name in ("walk_length", "walk_sq_length", "displacement_sq", "moves", "lost_moves", "grad_norms"):
            getattr(self, name).zero_()


def summarize(finished: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The figures of one finished cycle from the sums of each device; synchronizes.

    alignment: mean pairwise cosine similarity of the unit gradients taken, each at its own point of the walk:
    (R² − s)/(1 − s) with R² = Σ_groups ‖D‖²/Γ² and s = Σγ²/Γ²; NaN when fewer than two were taken.
    """
    if not finished:
        return {"alignment": float("nan"), "grad_norms": [], "lost_fraction": 0.0}
    first = {name: value.cpu() for name, value in finished[0].items()}
    displacement_sq = sum(sums["displacement_sq"].cpu() for sums in finished)
    moves = sum(float(sums["moves"]) for sums in finished)
    lost = sum(float(sums["lost_moves"]) for sums in finished)
    moved = first["walk_length"] > 0
    alignment = float("nan")
    if moved.any():
        gamma = first["walk_length"][moved]
        r_sq = float((displacement_sq[moved] / gamma**2).sum())  # type: ignore[index]
        s = float((first["walk_sq_length"][moved] / gamma**2).min())  # of the groups that walked longest
        alignment = (r_sq - s) / (1 - s) if s < 1 else float("nan")
    norms = [float("nan") if norm < 0 else norm for norm in first["grad_norms"].tolist()]
    return {"alignment": alignment, "grad_norms": norms, "lost_fraction": lost / moves if moves else 0.0}
