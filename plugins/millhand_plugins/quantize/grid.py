"""Grids that weights are rounded to: a scale and an offset for each block of inputs, and a few whole numbers.

Nothing here knows of ONNX or of files. `xp` is the array library, NumPy or torch: arrays of one go in and come out.
Weights are [outputs, inputs] everywhere. Python 3.10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

Array = Any
"""A NumPy array or a torch tensor, float32."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of a block's full range that `fitted` tries."""


@dataclass(frozen=True)
class Grid:
    """A weight of block b is `scale[:, b] * q + offset[:, b]` with a whole number q from `low` to `high`."""

    scale: Array
    """[outputs, blocks]; may be negative, never 0."""
    offset: Array
    """[outputs, blocks]"""
    low: int
    high: int
    block: int
    """Inputs that share a scale; the last block may hold fewer."""
    xp: Any = numpy

    @property
    def zero_points(self) -> Array:
        """[outputs, blocks], the whole number that stands for 0; of grids whose offset is a multiple of the scale."""
        return self.xp.round(-self.offset / self.scale)

    def places(self, weights: Array) -> Array:
        """Where the weights lie between the whole numbers, [outputs, inputs]."""
        inputs = weights.shape[1]
        return (weights - self._spread(self.offset, inputs)) / self._spread(self.scale, inputs)

    def nearest(self, weights: Array) -> Array:
        """Round to nearest (RTN): whole numbers as floats, [outputs, inputs]."""
        return self.xp.clip(self.xp.round(self.places(weights)), self.low, self.high)

    def values(self, integers: Array) -> Array:
        """The weights that whole numbers stand for, [outputs, inputs]."""
        inputs = integers.shape[1]
        return integers * self._spread(self.scale, inputs) + self._spread(self.offset, inputs)

    def steps(self, inputs: int) -> Array:
        """The distance between two levels at each weight, [outputs, inputs]; as negative as the scale."""
        return self._spread(self.scale, inputs)

    def _spread(self, values: Array, inputs: int) -> Array:
        """Block values to weights."""
        outputs, blocks = values.shape
        wide = self.xp.broadcast_to(values[:, :, None], (outputs, blocks, self.block))
        return wide.reshape(outputs, blocks * self.block)[:, :inputs]


def symmetric(
    weights: Array, bits: int, block: int, *, shrink: float = 1.0, positive: bool = False, half: bool = False,
    xp: Any = numpy,
) -> Grid:  # fmt: skip
    """Zero lies in the middle: whole numbers 0 .. 2^bits - 1 around 2^(bits - 1).

    The weight of the largest amount takes the lowest level, so the scale has its sign reversed: as GGUF's Q4_0
    and ONNX Runtime's MatMulNBits do. `positive`: the scale is its amount over 2^(bits - 1) - 1, and the lowest
    level stays unused, as TensorRT wants it. `half`: scales are rounded to float16, as GGUF stores them.
    """
    middle = 1 << (bits - 1)
    blocks = _blocks(weights, block, xp)
    top, bottom = xp.amax(blocks, axis=2), xp.amin(blocks, axis=2)
    largest = xp.where(top >= -bottom, top, bottom)
    scale = xp.abs(largest) / (middle - 1) if positive else largest / -middle
    scale = _stored(_nonzero(scale * shrink, xp), half, xp)
    return Grid(scale, scale * -middle, 1 if positive else 0, 2 * middle - 1, block, xp)


def asymmetric(
    weights: Array, bits: int, block: int, *, shrink: float = 1.0, half: bool = False, xp: Any = numpy
) -> Grid:
    """From the smallest weight (or 0) to the largest (or 0), with a whole number for 0: MatMulNBits' zero points."""
    high = (1 << bits) - 1
    blocks = _blocks(weights, block, xp)
    top = xp.clip(xp.amax(blocks, axis=2), 0, None) * shrink
    bottom = xp.clip(xp.amin(blocks, axis=2), None, 0) * shrink
    scale = _stored(_nonzero((top - bottom) / high, xp), half, xp)
    zero = xp.clip(xp.round(-bottom / scale), 0, high)
    return Grid(scale, -scale * zero, 0, high, block, xp)


def affine(weights: Array, bits: int, block: int, *, shrink: float = 1.0, half: bool = False, xp: Any = numpy) -> Grid:
    """From the smallest weight to the largest, the smallest kept as a float: GGUF's Q4_1."""
    high = (1 << bits) - 1
    blocks = _blocks(weights, block, xp)
    top, bottom = xp.amax(blocks, axis=2), xp.amin(blocks, axis=2)
    middle, reach = (top + bottom) / 2, (top - bottom) / 2 * shrink
    scale = _stored(_nonzero(2 * reach / high, xp), half, xp)
    return Grid(scale, _stored(middle - reach, half, xp), 0, high, block, xp)


def fitted(
    make: Callable[[float], Grid], weights: Array, importance: Array, shrinks: Sequence[float] = SHRINKS
) -> Grid:
    """For each block the share of its range that loses least when rounded to nearest.

    make: the grid for a share, such as `lambda shrink: symmetric(weights, 4, 32, shrink=shrink)`.
    importance: [inputs], the mean square of each input.
    """
    best: Grid | None = None
    least: Array = None
    for shrink in shrinks:
        grid = make(shrink)
        xp = grid.xp
        square = (grid.values(grid.nearest(weights)) - weights) ** 2 * importance
        loss = _blocks(square, grid.block, xp, edge=False).sum(axis=2)
        if best is None:
            best, least = grid, loss
            continue
        better = loss < least
        least = xp.where(better, loss, least)
        scale = xp.where(better, grid.scale, best.scale)
        best = Grid(scale, xp.where(better, grid.offset, best.offset), grid.low, grid.high, grid.block, xp)
    assert best is not None, "no shares to try"
    return best


def _blocks(values: Array, block: int, xp: Any, edge: bool = True) -> Array:
    """[outputs, blocks, block]; the last block is filled up with the last input's values, or with zeros."""
    outputs, inputs = values.shape
    missing = -inputs % block
    if missing:
        last = values[:, -1:] if edge else values[:, -1:] * 0
        values = xp.concatenate([values, xp.broadcast_to(last, (outputs, missing))], axis=1)
    return values.reshape(outputs, -1, block)


def _nonzero(scale: Array, xp: Any) -> Array:
    return xp.where(xp.abs(scale) < 1e-12, xp.ones_like(scale), scale)


def _stored(values: Array, half: bool, xp: Any) -> Array:
    """As the file will hold them."""
    return xp.asarray(xp.asarray(values, dtype=xp.float16), dtype=xp.float32) if half else values
