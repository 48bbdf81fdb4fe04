"""Moves what makes inputs hard to round into the weights, where it is easier (SmoothQuant, Xiao et al. 2023).

Eight bits for a whole tensor are few where its columns differ much: one that reaches 18 leaves four levels for one
that never passes 0.3. Each column is divided by a factor and its weights are multiplied by the same one. That costs a
Mul at run time, so it is done only where the layer's answers gain much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from millhand_plugins.quantize.graph import Graph, Layer

GAIN = 0.5
"""What a Mul must bring: at most this share of the loss may remain."""
NEGLIGIBLE = 1e-3
"""A share of a layer's output power that nobody misses: 30 dB below it. Smaller losses are worth neither a Mul nor a
scale for each channel."""
Matrix = NDArray[np.float32]


def smooth(graph: Graph, layers: Sequence[Layer], samples: Mapping[str, Matrix], levels: int) -> list[str]:
    """Change the graph where it pays; returns the tensors that are smoothed now.

    layers: the linear ones that will be int8. samples: [n, inputs] for each `Layer.data`. levels: of weights, on each
    side of 0.
    """
    smoothed = []
    for tensor in dict.fromkeys(layer.data for layer in layers):
        readers = [layer for layer in layers if layer.data == tensor]
        rows, matrices = samples[tensor], [graph.matrix(layer) for layer in readers]
        factors = balance(rows, matrices)
        before = max(int8_loss(rows, matrix, levels) for matrix in matrices)
        after = max(int8_loss(rows / factors, matrix * factors, levels) for matrix in matrices)
        if before > NEGLIGIBLE and after < GAIN * before:
            _insert(graph, tensor, readers, factors)
            smoothed.append(tensor)
    return smoothed


def balance(rows: Matrix, matrices: Sequence[Matrix]) -> Matrix:
    """[inputs]: the square root of each column's reach over its weights' (alpha = 0.5 in the paper)."""
    reach = np.abs(rows).max(axis=0)
    weight = np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0)
    usable = (reach > 0) & (weight > 0)
    factors = np.ones(rows.shape[1], np.float32)
    factors[usable] = np.sqrt(reach[usable] / weight[usable])
    factors[usable] /= np.exp(np.log(factors[usable]).mean())
    return factors


def int8_loss(rows: Matrix, matrix: Matrix, levels: int, by_channel: bool = False) -> float:
    """The share of a linear layer's output power that int8 inputs (one range) and weights lose."""
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    step = (high - low) / 255 or 1.0
    largest = np.abs(matrix).max(axis=1, keepdims=True) if by_channel else np.abs(matrix).max()
    scale = np.where(largest > 0, largest, 1) / levels
    answers = rows @ matrix.T
    rounded = (np.round(rows / step) * step) @ (np.round(matrix / scale) * scale).T
    power = float((answers**2).sum())
    return float(((answers - rounded) ** 2).sum()) / power if power > 0 else 0.0


def _insert(graph: Graph, tensor: str, layers: Sequence[Layer], factors: Matrix) -> None:
    name = graph.add(f"{tensor}/smoothing", (1 / factors).astype(np.float32))
    product = f"{tensor}/smoothed"
    mul = helper.make_node("Mul", [tensor, name], [product], product)
    for layer in layers:
        graph.set_matrix(layer, graph.matrix(layer) * factors)
        graph.node(layer.name).input[0] = product
    graph.insert_before(layers[0].name, mul)
