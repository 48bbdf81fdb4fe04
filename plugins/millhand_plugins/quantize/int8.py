"""int8 for any of a graph's layers: what their inputs reach, which are levelled out, which need a scale a channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.quantize.calibration import Calibration
from millhand_plugins.quantize.graph import Graph, Layer
from millhand_plugins.quantize.options import Options
from millhand_plugins.quantize.qdq import Form, insert
from millhand_plugins.quantize.ranges import calibrated
from millhand_plugins.quantize.smoothing import NEGLIGIBLE, int8_loss, smooth

SAMPLES = 4096
"""Most input vectors of a layer that a choice looks at."""


class Int8:
    """A graph that is ready for int8, and copies of it with some layers in int8."""

    def __init__(
        self, graph: Graph, layers: Sequence[Layer], calibration: Calibration, options: Options, form: Form
    ) -> None:
        """layers: those that may become int8. The graph is changed where an input is levelled out."""
        self.graph, self._form = graph, form
        self.notes: list[str] = []
        names = {layer.name for layer in layers}
        if options.smoothing:
            linear = [layer for layer in layers if layer.linear]
            smoothed = smooth(graph, linear, _samples(graph, linear, calibration), form.levels)
            if smoothed:
                self.notes.append(f"a Mul levels out the columns of {', '.join(smoothed)} before they are rounded")
        self.layers = [layer for layer in graph.layers() if layer.name in names]
        self._by_channel = self._choose_channels(calibration, options.channels if form.chained else "each")
        self._ranges = calibrated(graph, calibration, options)

    def candidate(self, names: Iterable[str]) -> Graph:
        """A copy with these layers in int8."""
        chosen = set(names)
        made = self.graph.copy()
        insert(
            made, [layer for layer in self.layers if layer.name in chosen], self._ranges, self._form, self._by_channel
        )
        return made

    def _choose_channels(self, calibration: Calibration, wish: str) -> set[str]:
        """The layers with a scale for each output channel.

        Convolutions take them at no cost; for a linear layer ONNX Runtime sets them up at each call, which is felt.
        TensorRT sets them up once.
        """
        if wish == "all":
            return set()
        if wish == "each":
            return {layer.name for layer in self.layers}
        linear = [layer for layer in self.layers if layer.linear]
        samples = _samples(self.graph, linear, calibration)
        chosen = {layer.name for layer in self.layers if not layer.linear}
        for layer in linear:
            rows, matrix = samples[layer.data], self.graph.matrix(layer)
            if int8_loss(rows, matrix, self._form.levels) > NEGLIGIBLE:
                chosen.add(layer.name)
        return chosen


def _samples(graph: Graph, layers: Sequence[Layer], calibration: Calibration) -> Mapping[str, NDArray[np.float32]]:
    """`Layer.data` -> some of the vectors that come in, [n, inputs]."""
    tensors = list(dict.fromkeys(layer.data for layer in layers))
    found: dict[str, list[NDArray[np.float32]]] = {tensor: [] for tensor in tensors}
    share = max(1, SAMPLES // len(calibration))
    random = np.random.default_rng(0)
    for seen in calibration.watch(graph.model, tensors) if tensors else ():
        for tensor in tensors:
            vectors = seen[tensor].reshape(-1, seen[tensor].shape[-1])
            wanted = share * len(seen[tensor])
            if len(vectors) > wanted:
                vectors = vectors[random.choice(len(vectors), wanted, replace=False)]
            found[tensor].append(vectors)
    return {tensor: np.concatenate(parts) for tensor, parts in found.items()}
