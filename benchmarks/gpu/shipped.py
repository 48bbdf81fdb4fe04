"""The models that millhand ships, as the GPU benchmarks need them: where they lie, and rows that tell answers apart."""

from __future__ import annotations

import shutil
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

PLUGINS = {"turbofan-rul": "turbofan", "rig-wave": "rig", "rig-fault": "rig"}
LIFE = "turbofan-rul"


@dataclass(frozen=True)
class Shipped:
    """One model with one input and one output, both float32."""

    name: str
    folder: Path
    input: str
    output: str
    shape: tuple[int, ...]
    """Of one row."""

    @property
    def artifact(self) -> Path:
        versions = sorted((path for path in self.folder.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))
        return versions[-1] / "model.onnx"

    def rows(self, count: int) -> NDArray[np.float32]:
        """Standard normal: a load needs arithmetic, not sense."""
        return np.random.default_rng(1).standard_normal((count, *self.shape)).astype(np.float32)

    def answers(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The CPU's, from ONNX Runtime alone, one row at a time: [n, width]."""
        import onnxruntime

        session = onnxruntime.InferenceSession(self.artifact, providers=["CPUExecutionProvider"])
        given = [session.run([self.output], {self.input: rows[i : i + 1]})[0] for i in range(len(rows))]
        return np.concatenate(given)

    def copy(self, repository: Path, name: str, extra: str) -> None:
        """The same model under another name, served and no more; `extra` is more TOML of its top level."""
        made = repository / name
        (made / "1").mkdir(parents=True)
        shutil.copy(self.artifact, made / "1" / "model.onnx")
        width = self.answers(self.rows(1)).shape[1]
        (made / "model.toml").write_text(
            f'name = "{name}"\ndescription = "{self.name}, served"\nlicence = "Apache-2.0"\n{extra}\n'
            f'[[inputs]]\nname = "{self.input}"\nshape = {[-1, *self.shape]}\n\n'
            f'[[outputs]]\nname = "{self.output}"\nshape = {[-1, width]}\n'
        )


def shipped(name: str) -> Shipped:
    """Read its model.toml. Raises FileNotFoundError where it is not there."""
    spec = find_spec(f"millhand_plugins.{PLUGINS[name]}")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "models" / name
    document = tomllib.loads((folder / "model.toml").read_text())
    (first,), (last,) = document["inputs"], document["outputs"]
    return Shipped(name, folder, first["name"], last["name"], tuple(first["shape"][1:]))


def classifier() -> Shipped:
    """The rig's, of raw waveforms where it is shipped, else of features."""
    try:
        return shipped("rig-wave")
    except FileNotFoundError:
        return shipped("rig-fault")
