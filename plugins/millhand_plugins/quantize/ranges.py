"""The ranges of a model's tensors on calibration rows, found by ONNX Runtime's calibrators."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from millhand.errors import ModelError
from millhand_plugins.quantize.calibration import Calibration, Rows, first_line
from millhand_plugins.quantize.graph import Graph
from millhand_plugins.quantize.options import Options
from millhand_plugins.quantize.silence import silenced


def calibrated(graph: Graph, calibration: Calibration, options: Options) -> dict[str, tuple[float, float]]:
    """Lowest and highest number of every float tensor of the graph, inputs among them.

    Raises ModelError where the model does not run on the rows.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator  # type: ignore[import-untyped]

    method = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}[options.calibration]
    choices: dict[str, Any] = {"symmetric": False}
    if options.calibration == "percentile":
        choices["percentile"] = options.percentile
    with tempfile.TemporaryDirectory() as folder, silenced():
        path = Path(folder) / "float.onnx"
        graph.write(path)
        try:
            calibrator = create_calibrator(
                path,
                augmented_model_path=str(Path(folder) / "watched.onnx"),
                calibrate_method=CalibrationMethod[method],
                use_external_data_format=graph.large,
                extra_options=choices,
            )
            calibrator.collect_data(_Reader(calibration))
            found = calibrator.compute_data()
        except Exception as error:
            raise ModelError(
                f"the ranges of the model's tensors cannot be found: {first_line(error)}",
                hint="check that the model serves as it is, and that the calibration rows are its inputs",
            ) from error
    return {name: (float(np.min(data.lowest)), float(np.max(data.highest))) for name, data in found.items()}


class _Reader:
    """`CalibrationDataReader`."""

    def __init__(self, calibration: Calibration) -> None:
        self._batches: Iterator[Rows] = calibration.batches()

    def get_next(self) -> Rows | None:
        return next(self._batches, None)
