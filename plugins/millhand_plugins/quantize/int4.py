"""int4 weights for linear layers: rounded to nearest, or by learned rounding on what comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand_plugins.quantize.calibration import Calibration
from millhand_plugins.quantize.graph import Graph, Layer
from millhand_plugins.quantize.grid import Grid, asymmetric, fitted, symmetric
from millhand_plugins.quantize.options import Options
from millhand_plugins.quantize.rounding import Annealing, Moments, anneal

BITS = 4
SMALLEST_BLOCK = 16
PROGRESS_STEPS = 50
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Rounded:
    """A layer's weights on a grid, both as NumPy arrays."""

    grid: Grid
    integers: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        return np.asarray(self.grid.values(self.integers), np.float32)


class Int4:
    """Rounds the linear layers of one graph, which stays as it is."""

    def __init__(self, graph: Graph, options: Options, positive: bool = False) -> None:
        """positive: scales are above 0 and there is no zero point, whatever the options say: TensorRT.

        Raises ModelError where a device is asked for and torch is not installed.
        """
        self._graph, self._options, self._positive = graph, options, positive
        self._xp = _torch() if options.device else np

    def nearest(self, layer: Layer) -> Rounded:
        """RTN: every weight takes the level that is nearest to it."""
        matrix = self._graph.matrix(layer)
        grid = self._grid(matrix, np, 1.0)
        return Rounded(grid, np.asarray(grid.nearest(matrix), np.float32))

    def annealed(
        self, layers: Sequence[Layer], calibration: Calibration, progress: Progress, in_turn: bool = True
    ) -> dict[str, Rounded]:
        """AdaRound: every weight takes one of its two neighbours, so that the layer's answers stay.

        in_turn: a layer is fitted to what comes in once those before it are rounded, and makes up for their errors;
        else to the original's inputs, so that each result may be used without the others.
        """
        rounded: dict[str, Rounded] = {}
        simulated = self._graph.copy() if in_turn else self._graph
        for group, moments in self._moments(layers, simulated, calibration):
            for layer in group:
                begin = len(rounded) / len(layers)

                def told(share: float, begin: float = begin, name: str = layer.name) -> None:
                    progress(begin + share / len(layers), f"rounding '{name}'")

                rounded[layer.name] = self._learn(layer, moments, told)
                if in_turn:
                    simulated.set_matrix(layer, rounded[layer.name].values)
        return rounded

    def _moments(
        self, layers: Sequence[Layer], simulated: Graph, calibration: Calibration
    ) -> Iterator[tuple[list[Layer], Moments]]:
        """Layers that read one tensor, with its moments: in the graph's order, each seen after those before it."""
        for tensor in dict.fromkeys(layer.data for layer in layers):
            group = [layer for layer in layers if layer.data == tensor]
            own, cross, count = np.zeros(()), np.zeros(()), 0
            both = zip(
                calibration.watch(simulated.model, [tensor]),
                calibration.watch(self._graph.model, [tensor]),
                strict=True,
            )
            for seen, original in both:
                rows, wanted = (item[tensor].reshape(-1, item[tensor].shape[-1]) for item in (seen, original))
                own, cross = own + (rows.T @ rows).astype(float), cross + (wanted.T @ rows).astype(float)
                count += len(rows)
            yield group, Moments(*((total / count).astype(np.float32) for total in (own, cross))).damped()

    def _learn(self, layer: Layer, moments: Moments, progress: Callable[[float], None]) -> Rounded:
        xp, options, steps = self._xp, self._options, 0
        matrix = self._moved(self._graph.matrix(layer))
        moved = Moments(self._moved(moments.own), self._moved(moments.cross))
        grid = fitted(lambda shrink: self._grid(matrix, xp, shrink), matrix, moved.importance)

        def told(share: float) -> None:
            nonlocal steps
            steps += 1
            if steps % PROGRESS_STEPS == 0:
                progress(share)

        rounding = options.rounding
        schedule = Annealing(
            rounding.steps, rounding.learning_rate, rounding.weight, rounding.warm_up, rounding.beta_high,
            rounding.beta_low,
        )  # fmt: skip
        integers = anneal(matrix, grid, moved, schedule, told)
        scale, offset = (_here(values) for values in (grid.scale, grid.offset))
        return Rounded(Grid(scale, offset, grid.low, grid.high, grid.block), _here(integers))

    def _grid(self, matrix: Any, xp: Any, shrink: float) -> Grid:
        block = self._options.block
        if self._positive:  # TensorRT wants two blocks at least
            while block >= matrix.shape[1] and block > SMALLEST_BLOCK:
                block //= 2
        if self._options.zero_point and not self._positive:
            return asymmetric(matrix, BITS, block, shrink=shrink, xp=xp)
        return symmetric(matrix, BITS, block, shrink=shrink, positive=self._positive, xp=xp)

    def _moved(self, array: NDArray[np.float32]) -> Any:
        return self._xp.as_tensor(array, device=self._options.device) if self._options.device else array


def _torch() -> ModuleType:
    try:
        import torch  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ModelError(
            "[plugins.quantize]: device is set, and torch is not installed",
            hint="install torch, or leave device empty: small models round as fast with NumPy",
        ) from error
    module: ModuleType = torch
    return module


def _here(values: Any) -> NDArray[np.float32]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values, np.float32)
