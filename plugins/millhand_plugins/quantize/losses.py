"""What a candidate's layers lose against the original's, on calibration rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from millhand_plugins.quantize.calibration import Calibration
from millhand_plugins.quantize.graph import Graph, Layer


def layer_losses(
    original: Graph, candidate: onnx.ModelProto, layers: Sequence[Layer], calibration: Calibration
) -> dict[str, float]:
    """Layer name -> share of its output power that is lost, with all that was lost before it.

    In a candidate, a layer's answer is in the tensor of the original's name.
    """
    losses = compared(original.model, candidate, [layer.output for layer in layers], calibration)
    return dict(zip([layer.name for layer in layers], losses, strict=True))


def output_loss(original: Graph, candidate: onnx.ModelProto, calibration: Calibration) -> float:
    """The worst share that any output of the model loses."""
    return max(compared(original.model, candidate, [item.name for item in original.model.graph.output], calibration))


def compared(
    original: onnx.ModelProto, candidate: onnx.ModelProto, tensors: Sequence[str], calibration: Calibration
) -> list[float]:
    """The share of each tensor's power that is lost."""
    lost, power = np.zeros(len(tensors)), np.zeros(len(tensors))
    both = zip(calibration.watch(original, tensors), calibration.watch(candidate, tensors), strict=True)
    for whole, rounded in both:
        for place, name in enumerate(tensors):
            values = np.asarray(whole[name], np.float64)
            lost[place] += ((values - rounded[name]) ** 2).sum()
            power[place] += (values**2).sum()
    return [float(share) for share in np.where(power > 0, lost / np.where(power > 0, power, 1), 0)]


def described(layers: Sequence[Layer], precisions: Mapping[str, str], losses: Mapping[str, float]) -> tuple[Any, ...]:
    """`Made.layers`: every weighted layer; those that `precisions` does not name stayed float32."""
    return tuple(
        {
            "name": layer.name,
            "operator": layer.operator,
            "precision": precisions.get(layer.name, "fp32"),
            "error": losses.get(layer.name),
        }
        for layer in layers
    )
