"""GGUF files: weights out, weights in. The format is ggml's (docs/gguf.md and ggml-common.h in ggml-org/ggml)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand_plugins.quantize.grid import Grid

BLOCK = 32
"""Weights that share a scale in Q4_0 and Q4_1."""
TYPES = ("q4_0", "q4_1")


@dataclass(frozen=True)
class Rounded:
    """A matrix on a 4-bit grid."""

    integers: NDArray[np.float32]
    """[outputs, inputs], whole numbers from 0 to 15."""
    grid: Grid
    kind: str
    """One of TYPES."""


class GgufFile:
    """A GGUF file to read."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError where it cannot be read, or where the package `gguf` is missing."""
        try:
            import gguf
        except ImportError as error:
            raise ModelError(
                "the package 'gguf' is not installed", hint="pip install 'millhand[language-build]'"
            ) from error
        self.path = path
        self._gguf = gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(f"'{path}' is no GGUF file that can be read: {error}", hint="fetch it again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        return str(self._reader.fields["general.architecture"].contents())

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the file's order."""
        return tuple(self._tensors)

    def weights(self, name: str) -> NDArray[np.float32]:
        """A tensor's values, matrices as [outputs, inputs]. Raises ModelError for one that is not there."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"'{self.path}' has no tensor '{name}'", hint="take a GGUF file of the same architecture")
        return np.asarray(self._gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    def write(self, path: Path, changed: Mapping[str, Rounded | NDArray[np.float32]]) -> None:
        """Write a copy with some tensors changed: rounded ones in their 4-bit type, arrays as float16."""
        writer = self._gguf.GGUFWriter(path, self.architecture, endianess=self._reader.endianess)
        try:
            for field in self._reader.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                kind = field.types[0]
                element = field.types[-1] if kind == self._gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
            for tensor in self._reader.tensors:
                self._add(writer, tensor, changed.get(tensor.name))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def _add(self, writer: Any, tensor: Any, changed: Rounded | NDArray[np.float32] | None) -> None:
        kinds = self._gguf.GGMLQuantizationType
        if isinstance(changed, Rounded):
            writer.add_tensor(tensor.name, packed(changed), raw_dtype=kinds[changed.kind.upper()])
        elif changed is not None:
            writer.add_tensor(tensor.name, changed.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)


def packed(matrix: Rounded) -> NDArray[np.uint8]:
    """The bytes of ggml's blocks, [outputs, bytes]: scale and, for Q4_1, minimum as float16; then 16 bytes of which the
    low halves hold the block's first 16 weights and the high halves the rest.

    Raises ModelError where the inputs are no whole number of blocks.
    """
    outputs, inputs = matrix.integers.shape
    if inputs % BLOCK or matrix.grid.block != BLOCK:
        raise ModelError(
            f"a matrix of {inputs} inputs on blocks of {matrix.grid.block} has no form in {matrix.kind}",
            hint=f"{matrix.kind} takes whole blocks of {BLOCK}; leave this tensor as it is",
        )
    whole = matrix.integers.astype(np.uint8).reshape(outputs, -1, BLOCK)
    halves = whole[:, :, : BLOCK // 2] | whole[:, :, BLOCK // 2 :] << 4
    heads = [matrix.grid.scale] if matrix.kind == "q4_0" else [matrix.grid.scale, matrix.grid.offset]
    head = np.stack([np.asarray(part, np.float16) for part in heads], axis=2).view(np.uint8)
    return np.concatenate([head, halves], axis=2).reshape(outputs, -1)
