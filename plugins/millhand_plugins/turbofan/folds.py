"""Cut one of the model's five nets out of it, to judge engines that this net never saw."""

from __future__ import annotations

import json
from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "models" / "turbofan-rul"
FOLDS = 5


def held_out(subset: str, fold: int, folder: Path = MODEL_FOLDER) -> list[int]:
    """The units of train_<subset> that net `fold` (0 to 4) never saw."""
    units: list[int] = json.loads((folder / "folds.json").read_text())[subset][fold]
    return units


def cut_net(fold: int, target: Path, folder: Path = MODEL_FOLDER) -> None:
    """Write net `fold` (0 to 4) alone to `target`, with the whole model's input and output. Needs the package onnx."""
    import onnx

    model = onnx.load(str(folder / "1" / "model.onnx"))
    single = onnx.utils.Extractor(model).extract_model(["features"], [f"rul_{fold}"])
    for node in single.graph.node:
        node.output[:] = ["rul" if name == f"rul_{fold}" else name for name in node.output]
    single.graph.output[0].name = "rul"
    onnx.checker.check_model(single, full_check=True)
    target.write_bytes(single.SerializeToString())
