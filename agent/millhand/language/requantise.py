"""A GGUF file in another precision, with the package `gguf` (ggml's own rounding, in NumPy); one matrix at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand.language.sources import Told


class Precision(NamedTuple):
    """What `gguf` can write."""

    bits: float
    """Of one weight, the block's scales included."""
    file_type: int
    """llama.cpp's number for such a file (enum llama_ftype)."""


PRECISIONS = {
    "F32": Precision(32, 0),
    "F16": Precision(16, 1),
    "Q8_0": Precision(8.5, 7),
    "Q4_1": Precision(5, 3),
    "Q4_0": Precision(4.5, 2),
}
WHOLE = ("token_embd.weight", "output.weight")
"""Kept at 8 bits where the rest goes to 4: rounded more coarsely they cost most of the quality for little size."""


@dataclass(frozen=True)
class Change:
    """What became of a file's matrices."""

    matrices: int
    copied: int
    """Matrices that had the type already, byte by byte."""
    exact: int
    """Of the others those whose every value is kept: the new grid holds the source's."""
    error: float
    """Root mean square of the change over all that were rounded, as a share of the weights'."""

    @property
    def note(self) -> str:
        """For the proof: whether rounding was tried at all."""
        if self.copied + self.exact == self.matrices:
            return (
                f"All {self.matrices} matrices lay on this precision's grid already and are kept without loss: this "
                "says nothing of what rounding to it costs."
            )
        kept = f"{self.copied + self.exact} of {self.matrices} matrices lay on its grid and are kept without loss; "
        return f"{kept if self.copied + self.exact else ''}the others changed by {self.error:.2%} (root mean square)."


def requantise(source: Path, target: Path, precision: str, told: Told) -> Change:
    """Write `target` with every matrix in `precision`; vectors stay as they are.

    Raises ModelError where the package `gguf` is missing, the file cannot be read, or a type of it cannot be undone.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            "the package 'gguf' is not installed, which makes other precisions", hint="pip install 'millhand[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"'{source}' cannot be read: {error}", hint="fetch it again") from error
    return _Rewriting(gguf, reader, target, precision).run(told)


class _Rewriting:
    """One file being written."""

    def __init__(self, gguf: Any, reader: Any, target: Path, precision: str) -> None:
        self._gguf, self._reader, self._precision = gguf, reader, precision
        architecture = str(reader.fields["general.architecture"].contents())
        self._writer = gguf.GGUFWriter(target, architecture, endianess=reader.endianess)
        self._copied = self._exact = self._matrices = 0
        self._lost = self._power = 0.0

    def run(self, told: Told) -> Change:
        writer = self._writer
        tensors = self._reader.tensors
        try:
            self._keys()
            for tensor in tensors:
                kind = self._kind(tensor)
                shape = tuple(int(size) for size in reversed(tensor.shape))
                size = self._bytes(shape, kind)
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for number, tensor in enumerate(tensors):
                told(f"writing {self._precision}", number, len(tensors))
                writer.write_tensor_data(np.ascontiguousarray(self._data(tensor)))
        finally:
            writer.close()
        error = (self._lost / self._power) ** 0.5 if self._power else 0.0
        return Change(self._matrices, self._copied, self._exact, error)

    def _keys(self) -> None:
        types = self._gguf.GGUFValueType
        for field in self._reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
                continue
            kind = field.types[0]
            element = field.types[-1] if kind == types.ARRAY else None
            self._writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
        self._writer.add_key_value("general.file_type", PRECISIONS[self._precision].file_type, types.UINT32)

    def _kind(self, tensor: Any) -> Any:
        """The type that a tensor gets."""
        kinds = self._gguf.GGMLQuantizationType
        if len(tensor.shape) < 2:
            return tensor.tensor_type
        wanted = kinds[self._precision]
        if PRECISIONS[self._precision].bits < 8 and tensor.name in WHOLE:
            wanted = kinds.Q8_0
        block = self._gguf.GGML_QUANT_SIZES[wanted][0]
        return wanted if int(tensor.shape[0]) % block == 0 else kinds.F16

    def _bytes(self, shape: tuple[int, ...], kind: Any) -> int:
        weights, size = self._gguf.GGML_QUANT_SIZES[kind]
        return math.prod(shape) // int(weights) * int(size)

    def _data(self, tensor: Any) -> NDArray[Any]:
        kind = self._kind(tensor)
        if len(tensor.shape) >= 2:
            self._matrices += 1
        if kind == tensor.tensor_type:
            self._copied += len(tensor.shape) >= 2
            return np.asarray(tensor.data)
        try:
            weights = np.asarray(self._gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, KeyError) as error:
            raise ModelError(
                f"tensor '{tensor.name}' is in {tensor.tensor_type.name}, which cannot be undone",
                hint="begin from a file in F32, F16, BF16 or Q8_0",
            ) from error
        data: NDArray[Any] = self._gguf.quantize(weights, kind)
        back = np.asarray(self._gguf.dequantize(data, kind), np.float32)
        lost = float(np.sum((back - weights) ** 2, dtype=np.float64))
        self._exact += lost == 0
        self._lost += lost
        self._power += float(np.sum(weights**2, dtype=np.float64)) if lost else 0.0
        return data
