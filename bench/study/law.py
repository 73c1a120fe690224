"""The loss of split training as a function of N, D and D′: candidate forms, fits, and the best split of a budget.

N is the number of parameters, D the tokens of pretraining on the mixture at a constant learning rate, D′ the tokens of
specialization on one domain, during which the learning rate falls to 0; all three are in millions here. Losses are bits
per byte of held-out text of that domain. After arXiv 2603.19149, which asks the same of large models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import basinhopping, minimize
from threadpoolctl import threadpool_limits

Array = np.ndarray
DELTA = 1e-3
"""Where Huber's loss of an error of the logarithm turns from a square into a line."""


def power(x: Array, exponent: Array) -> Array:
    """Return x**exponent of x above 0."""
    return np.exp(exponent * np.log(x))


def additive(p: Array, n: Array, d: Array, s: Array) -> Array:
    """E + A/N^α + B/(r·D + D′)^β: a token of the mixture is worth r tokens of the domain."""
    e, a, alpha, b, beta, r = p
    return e + a * power(n, -alpha) + b * power(r * d + s, -beta)


def multiplicative(p: Array, n: Array, d: Array, s: Array) -> Array:
    """E + A/N^α + B/(D^β · D′^δ)."""
    e, a, alpha, b, beta, delta = p
    return e + a * power(n, -alpha) + b * power(d, -beta) * power(s, -delta)


def transfer_gap(p: Array, n: Array, d: Array, s: Array) -> Array:
    """E + A/N^α + (B/D^β + G)/(1 + D′/D₀)^δ: specialization closes a gap that pretraining leaves."""
    e, a, alpha, b, beta, g, d0, delta = p
    return e + a * power(n, -alpha) + (b * power(d, -beta) + g) * power(1 + s / d0, -delta)


@dataclass(frozen=True)
class Form:
    """A candidate. Parameters are above 0; `starts` holds the values of each that fits begin with."""

    name: str
    formula: str
    predict: Callable[[Array, Array, Array, Array], Array]
    parameters: tuple[str, ...]
    starts: tuple[tuple[float, ...], ...]


FORMS = (
    Form(
        "additive",
        "E + A/N^α + B/(r·D + D′)^β",
        additive,
        ("E", "A", "α", "B", "β", "r"),
        ((0.5, 1.5), (0.3,), (0.2, 0.6), (0.7,), (0.2, 0.6), (0.2,)),
    ),
    Form(
        "multiplicative",
        "E + A/N^α + B/(D^β·D′^δ)",
        multiplicative,
        ("E", "A", "α", "B", "β", "δ"),
        ((0.5, 1.5), (0.3,), (0.2, 0.6), (0.7,), (0.1, 0.4), (0.1,)),
    ),
    Form(
        "transfer gap",
        "E + A/N^α + (B/D^β + G)/(1 + D′/D₀)^δ",
        transfer_gap,
        ("E", "A", "α", "B", "β", "G", "D₀", "δ"),
        ((0.5, 1.5), (0.3,), (0.2, 0.6), (0.7,), (0.4,), (0.3,), (0.05,), (0.1, 0.4)),
    ),
)


STEP = 1e-6
"""Of the central differences that gradients are made of."""


def objective(
    form: Form, n: Array, d: Array, s: Array, loss: Array
) -> Callable[[Array], tuple[float, Array]]:  # fmt: skip
    """Return the mean Huber loss of the logarithm's error, with its gradient, of the parameters' logarithms."""
    observed = np.log(loss)
    count = len(form.parameters)
    around = np.vstack([np.zeros(count), STEP * np.eye(count), -STEP * np.eye(count)])

    def value(logs: Array) -> tuple[float, Array]:
        with np.errstate(all="ignore"):
            parameters = np.exp(logs + around).T[:, :, None]
            error = np.abs(np.log(form.predict(parameters, n, d, s)) - observed)
            huber = np.where(error < DELTA, 0.5 * error**2, DELTA * (error - 0.5 * DELTA))
        means = np.nan_to_num(huber.mean(axis=1) / DELTA, nan=1e3, posinf=1e3)
        return float(means[0]), (means[1 : count + 1] - means[count + 1 :]) / (2 * STEP)

    return value


BOUNDS = (-12.0, 6.0)
"""Of the parameters' logarithms."""


def fit(form: Form, n: Array, d: Array, s: Array, loss: Array, start: Array | None = None) -> Array:
    """Return the parameters of the least loss found: from a grid of starts, the best of which hops on.

    With `start`, the parameters of a fit to similar data, it is the one that hops. Repeats bit for bit.
    """
    value = objective(form, n, d, s, loss)
    how: dict[str, Any] = {"method": "L-BFGS-B", "jac": True, "bounds": [BOUNDS] * len(form.parameters)}
    how["options"] = {"ftol": 1e-12, "gtol": 1e-8}  # the usual ones end far from the minimum of a flat valley
    with threadpool_limits(1):  # more wait for each other at every step, eighty times as long on busy cores
        starts = product(*form.starts) if start is None else [start]
        best = min((minimize(value, np.log(x), **how) for x in starts), key=lambda found: found.fun)
        hops = 30 if start is None else 5
        hopped = basinhopping(value, best.x, niter=hops, T=1e-3, stepsize=0.5, minimizer_kwargs=how, rng=0)
    return np.exp(hopped.x if hopped.fun < best.fun else best.x)


def relative_error(form: Form, p: Array, n: Array, d: Array, s: Array, loss: Array) -> float:
    """Return the mean of |predicted/observed − 1|."""
    return float(np.mean(np.abs(form.predict(p, n, d, s) / loss - 1)))


def best_split(
    losses: Callable[[Array, Array, Array], Array], budget: float, domains: int, sizes: Sequence[float]
) -> dict[str, float]:
    """Return N, D, D′ and the loss of the least loss for a budget 6N(D + domains·D′), N of `sizes`.

    The share of specialization, domains·D′ of all tokens, is searched for in steps of 0.5 %.
    """
    share = np.arange(0.005, 1.0, 0.005)
    best: dict[str, float] = {"loss": np.inf}
    for n in sizes:
        tokens = budget / (6 * n)
        d, s = tokens * (1 - share), tokens * share / domains
        loss = losses(np.full_like(d, n), d, s)
        i = int(np.argmin(loss))
        if loss[i] < best["loss"]:
            best = {"loss": loss[i], "n": n, "d": d[i], "d_prime": s[i], "share": share[i]}
    return {key: float(value) for key, value in best.items()}
