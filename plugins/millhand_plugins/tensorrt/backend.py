"""The backend. Imported in workers: Python 3.10, and the libraries only inside `prepare` and `load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millhand.errors import ModelError
from millhand_plugins.tensorrt.library import LIBRARIES, installed, load_library
from millhand_plugins.tensorrt.session import TensorrtSession


class TensorrtBackend:
    """`Backend` for engines of TensorRT and TensorRT-RTX."""

    name = "tensorrt"
    suffixes: tuple[str, ...] = (".engine",)

    def prepare(self) -> None:
        """Import the library, where there is only one: the two export the same symbols, and the engine decides."""
        found = [name for name in LIBRARIES if installed(name)]
        if len(found) == 1:
            load_library(found[0])

    def load(self, artifact: Path, accelerator: str, options: Mapping[str, Any]) -> TensorrtSession:
        """Load one engine. `options`: the keys of `[plugins.tensorrt]`. The session must `prove` itself next.

        Raises ModelError naming the file where it is missing, damaged, or built for another GPU or library.
        """
        if accelerator == "cpu":
            raise ModelError(
                f"engine '{artifact.name}' runs on a GPU, and this model is placed on the CPU",
                hint="set accelerator = 'auto' in model.toml; `millhand profile match` says why there is no GPU",
            )
        return TensorrtSession(artifact, options)
