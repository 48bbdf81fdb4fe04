"""A shelf with candidates as the workshop leaves them: made, proved, signed and chosen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from serving_kit import save_onnx, value

from millhand.serving.repository import read_folder
from millhand.workshop.recipe import Made, Recipe
from millhand.workshop.shelf import RECORD, Candidate, Choice, Record, Shelf

sys.path.insert(0, str(Path(__file__).parents[2] / "proof" / "kit"))

from proof_kit import prove


def half(path: Path, factor: float) -> None:
    """`serving_kit.scale` in half precision: the same graph between casts, the weight in 16 bit."""
    weight = numpy_helper.from_array((np.eye(2) * factor).astype(np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x16", "w"], ["y16"]),
        helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT),
    ]
    save_onnx(path, nodes, [value("x", ["n", 2])], [value("y", ["n", 2])], [weight])


DATE = "2026-11-25T10:00:00Z"


class Workshop:
    """Puts candidates of models onto a node's shelf."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        """`root`: the folder of models."""
        self.root = root
        self.data_dir = data_dir
        self.shelf = Shelf(data_dir / "built")

    def make(
        self,
        model: str,
        write: Callable[[Path], None],
        *,
        name: str = "half",
        version: int = 1,
        target: str = "cpu",
        artifact: str = "model.onnx",
        maker: str = "keyed",
        signed: bool = True,
        **made: Any,
    ) -> Candidate:
        """Make a candidate with `write(path)`, and prove it; keywords as `Made` has them."""
        source = read_folder(self.root / model).digest(version)
        with self.shelf.staged(model, version, target, name) as folder:
            write(folder / artifact)
            record = Record(
                recipe=Recipe(name=name, precision="fp16", description="made by a test"),
                maker=maker,
                made=Made(artifact=artifact, **{"backend": "onnxruntime", **made}),
                source_sha256=source,
                sha256="",
                date=DATE,
            )
            staged = Candidate(name=name, folder=folder, record=record)
            subject = self.shelf.subject(model, version, target, staged)
            prove(subject, self.data_dir if signed else None)
            record = msgspec.structs.replace(record, sha256=subject.digest())
            (folder / RECORD).write_bytes(msgspec.json.encode(record))
        return self.shelf.find(model, version, target, name)

    def choose(self, model: str, name: str, *, version: int = 1, target: str = "cpu", why: str = "the fastest") -> None:
        source = read_folder(self.root / model).digest(version)
        self.shelf.choose(model, version, target, Choice(candidate=name, source_sha256=source, why=why, date=DATE))

    def serve(self, model: str, write: Callable[[Path], None], **options: Any) -> Candidate:
        """Make a candidate and choose it."""
        candidate = self.make(model, write, **options)
        places = {key: options[key] for key in ("version", "target") if key in options}
        self.choose(model, candidate.name, **places)
        return candidate
