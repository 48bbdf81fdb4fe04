"""Learned rounding: which of a weight's two neighbours on a grid costs the layer's output least.

AdaRound (Nagel et al. 2020, arXiv:2004.10568): each weight is its lower neighbour plus a rectified sigmoid h in [0, 1].
Adam moves all of them at once to reconstruct the layer's output, while a regulariser whose exponent anneals from high
to low freezes h to 0 or 1: with a high one only values near a decision feel it, with a low one all do.

The layer's inputs enter by their second moments alone: for y = W x, the mean of |W x - V x'|^2 is quadratic in V, so no
activation is kept, and the cost of a step does not depend on how many rows were seen. x' are the inputs that the layer
gets once what lies before it is rounded; x are those of the original.

Nothing here knows of ONNX or of files; `xp` is NumPy or torch (see grid.py). Python 3.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from millhand_plugins.quantize.grid import Array, Grid

ZETA, GAMMA = 1.1, -0.1
"""How far the sigmoid is stretched before it is cut to [0, 1] (Louizos et al. 2018, as in section 3.3 of the paper)."""
ADAM_MEAN, ADAM_SQUARE, ADAM_FLOOR = 0.9, 0.999, 1e-8
"""Kingma and Ba 2015."""


class Schedule(Protocol):
    """How the rounding anneals; `Annealing` is the plain one."""

    @property
    def steps(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def weight(self) -> float:
        """Of the regulariser, against a loss that counts what rounding to nearest costs one weight as 1."""

    def beta(self, step: int) -> float | None:
        """The regulariser's exponent at a step from 0 on; None where it does not act yet."""


@dataclass(frozen=True)
class Annealing:
    """No regulariser at first, then an exponent that falls by a cosine from `beta_high` to `beta_low`."""

    steps: int = 1000
    learning_rate: float = 0.1
    weight: float = 10.0
    warm_up: float = 0.2
    """Share of the steps without the regulariser."""
    beta_high: float = 20.0
    beta_low: float = 2.0

    def beta(self, step: int) -> float | None:
        begin = self.warm_up * self.steps
        if step < begin:
            return None
        done = (step - begin) / max(self.steps - begin, 1)
        return self.beta_low + (self.beta_high - self.beta_low) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Moments:
    """What a layer's inputs look like, [inputs, inputs] each: means over rows."""

    own: Array
    """E[x' x'^T] of the inputs that the rounded layer gets."""
    cross: Array
    """E[x x'^T] with the inputs x of the original; the same as `own` where nothing before the layer was rounded."""

    @classmethod
    def of(cls, rows: Array, original: Array | None = None) -> Moments:
        """rows: [n, inputs], what the rounded layer gets; original: the same rows in the original model."""
        own = rows.T @ rows / len(rows)
        return cls(own, own if original is None else original.T @ rows / len(rows))

    def damped(self, share: float = 0.03) -> Moments:
        """As if each input also had noise of `share` of their mean square: for few rows, or inputs that never vary."""
        noise = self.importance.mean() * share
        return Moments(_raised(self.own, noise), _raised(self.cross, noise))

    @property
    def importance(self) -> Array:
        """[inputs], the mean square of each."""
        return self.own.diagonal()


def anneal(
    weights: Array,
    grid: Grid,
    moments: Moments,
    schedule: Schedule | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Array:
    """Choose a level for each weight; returns whole numbers as floats, [outputs, inputs], for `grid.values`.

    weights: [outputs, inputs] float32. Arrays are those of `grid.xp`; torch tensors may lie on any device.
    Every output row is at least as good on the moments as rounding to nearest: one that is not keeps its RTN.
    `progress` is called with a share of 0 to 1 and may raise to end the work.
    """
    xp = grid.xp
    layer = _Layer(weights, grid, moments)
    base = xp.clip(xp.floor(grid.places(weights)), grid.low, grid.high - 1)
    fraction = xp.clip(grid.places(weights) - base, 0.01, 0.99)
    up = _annealed(layer, grid.values(base), fraction, schedule or Annealing(), progress)
    learned, plain = base + up, grid.nearest(weights)
    better = layer.loss(grid.values(learned)) < layer.loss(grid.values(plain))
    return xp.where(better[:, None], learned, plain)


def output_loss(weights: Array, rounded: Array, moments: Moments) -> float:
    """The share of the layer's output power that is lost: E|W x - V x|^2 / E|W x|^2, on the layer's own inputs."""
    lost, power = weights - rounded, ((weights @ moments.own) * weights).sum()
    return float(((lost @ moments.own) * lost).sum() / power) if float(power) > 0 else 0.0


class _Layer:
    """What rounding costs one layer."""

    def __init__(self, weights: Array, grid: Grid, moments: Moments) -> None:
        self.xp = grid.xp
        self.steps = grid.steps(weights.shape[1])
        self._own = moments.own
        self._wanted = weights @ moments.cross
        lost = weights - grid.values(grid.nearest(weights))
        nearest = ((lost @ self._own) * lost).sum(axis=1, keepdims=True) / weights.shape[1]
        # A row that lies on its grid loses nothing: what a thousandth of a step costs is its unit.
        least = (self.steps**2 @ moments.importance)[:, None] / weights.shape[1] * 1e-6
        self._unit = self.xp.where(nearest > least, nearest, least) + 1e-30

    def loss(self, values: Array) -> Array:
        """[outputs], the mean square error of each output, less what does not depend on the rounding."""
        return ((values @ self._own - 2 * self._wanted) * values).sum(axis=1)

    def pull(self, values: Array) -> Array:
        """The loss's slope by each weight's share of a step, where rounding to nearest costs a weight 1."""
        return 2 * (values @ self._own - self._wanted) * self.steps / self._unit


def _annealed(
    layer: _Layer, low: Array, fraction: Array, schedule: Schedule, progress: Callable[[float], None]
) -> Array:
    """1 for each weight that takes its upper neighbour, else 0. low: the lower neighbours; fraction: where to begin."""
    xp = layer.xp
    logit = -xp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)
    mean, square = xp.zeros_like(logit), xp.zeros_like(logit)
    for step in range(schedule.steps):
        sigmoid = 1 / (1 + xp.exp(-logit))
        share = xp.clip(sigmoid * (ZETA - GAMMA) + GAMMA, 0, 1)
        slope = xp.where((share > 0) & (share < 1), sigmoid * (1 - sigmoid) * (ZETA - GAMMA), xp.zeros_like(share))
        pull = layer.pull(low + layer.steps * share)
        beta = schedule.beta(step)
        if beta is not None:
            centred = 2 * share - 1
            pull = pull - schedule.weight * 2 * beta * xp.sign(centred) * xp.abs(centred) ** (beta - 1)
        gradient = pull * slope
        mean = ADAM_MEAN * mean + (1 - ADAM_MEAN) * gradient
        square = ADAM_SQUARE * square + (1 - ADAM_SQUARE) * gradient * gradient
        stride = schedule.learning_rate * math.sqrt(1 - ADAM_SQUARE ** (step + 1)) / (1 - ADAM_MEAN ** (step + 1))
        logit = logit - stride * mean / (xp.sqrt(square) + ADAM_FLOOR)
        progress((step + 1) / schedule.steps)
    return xp.where(logit >= 0, xp.ones_like(logit), xp.zeros_like(logit))


def _raised(square: Array, by: Array) -> Array:
    """The matrix with `by` added to its diagonal, in either library."""
    raised = square + 0
    raised.reshape(-1)[:: len(square) + 1] += by
    return raised
