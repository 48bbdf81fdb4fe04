"""What ModelOpt does, in its own interpreter: `python quantization.py '<JSON>'`. It knows nothing of millhand.

The argument: `model` (changed in place), `rows` (.npz, an array for each input), `made` (where to write), and
`calibration`. The last line on standard output is JSON: `version`, `layers`, `left`.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any

BATCH = 16
"""Rows of one calibration step. With one row ModelOpt takes every matrix product for one of a vector, and leaves it."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def main() -> None:
    """Entry point."""
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not the answer
    quantize(task)
    layers, left = described(task["made"])
    print(json.dumps({"version": version("nvidia-modelopt"), "layers": layers, "left": left}), file=answers)
    answers.close()


def quantize(task: dict[str, str]) -> None:
    """Write `made`: QuantizeLinear and DequantizeLinear where ModelOpt wants them, float32 elsewhere."""
    import numpy as np

    from modelopt.onnx.quantization import quantize as quantized

    with np.load(task["rows"], allow_pickle=False) as file:
        rows = {name: file[name] for name in file.files}
    batch = min(BATCH, len(next(iter(rows.values()))))
    shapes = ",".join(f"{name}:{'x'.join(map(str, (batch, *array.shape[1:])))}" for name, array in rows.items())
    whole = len(next(iter(rows.values()))) // batch * batch
    quantized(
        task["model"],
        quantize_mode="int8",
        calibration_data={name: array[:whole] for name, array in rows.items()},
        calibration_method=task["calibration"],
        calibration_shapes=shapes,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=task["made"],
        log_level="ERROR",
    )


def described(path: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(the weighted layers that read quantised inputs, the names of the others)."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    restored = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    weighted = [node for node in graph.node if node.op_type in WEIGHTED]
    lowered = [node for node in weighted if node.input[0] in restored and node.input[1] in restored]
    layers = [{"name": node.name, "operator": node.op_type, "precision": "int8"} for node in lowered]
    names = {layer["name"] for layer in layers}
    return layers, [node.name for node in weighted if node.name not in names]


if __name__ == "__main__":
    main()
