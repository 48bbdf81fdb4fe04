"""The header of a GGUF file: what a model is, read without its weights and within bounds.

The format is ggml's (docs/gguf.md in ggml-org/ggml, versions 2 and 3). Arrays of words (a vocabulary of 150,000) are
counted and passed over, so that a header takes little memory whatever it says.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from millhand.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KEYS_CAP = 1 << 16
TENSORS_CAP = 1 << 17
DIMENSIONS_CAP = 4
"""ggml's GGML_MAX_DIMS."""
KEY_BYTES_CAP = 1 << 16
TEXT_BYTES_CAP = 4 << 20
"""Of one text; the longest chat templates have 20 kB."""
ITEMS_CAP = 1 << 24
"""Of one array; the largest vocabularies have 300,000 words."""
FETCH_AGAIN = "fetch or copy it again; a GGUF file that is whole loads in llama.cpp"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Block(NamedTuple):
    """How ggml stores the numbers of a type: `weights` of them in `bytes`."""

    name: str
    weights: int
    bytes: int


BLOCKS = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    9: Block("Q8_1", 32, 40),
    10: Block("Q2_K", 256, 84),
    11: Block("Q3_K", 256, 110),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
    15: Block("Q8_K", 256, 292),
    16: Block("IQ2_XXS", 256, 66),
    17: Block("IQ2_XS", 256, 74),
    18: Block("IQ3_XXS", 256, 98),
    19: Block("IQ1_S", 256, 50),
    20: Block("IQ4_NL", 32, 18),
    21: Block("IQ3_S", 256, 110),
    22: Block("IQ2_S", 256, 82),
    23: Block("IQ4_XS", 256, 136),
    24: Block("I8", 1, 1),
    25: Block("I16", 1, 2),
    26: Block("I32", 1, 4),
    27: Block("I64", 1, 8),
    28: Block("F64", 1, 8),
    29: Block("IQ1_M", 256, 56),
    30: Block("BF16", 1, 2),
    34: Block("TQ1_0", 256, 54),
    35: Block("TQ2_0", 256, 66),
    39: Block("MXFP4", 32, 17),
}
"""By ggml's number (enum ggml_type in ggml.h); newer ones are refused by name."""

Value = int | float | bool | str


class Tensor(NamedTuple):
    """One tensor: ggml's order of dimensions, the fastest first."""

    shape: tuple[int, ...]
    block: Block

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.weights // self.block.weights * self.block.bytes


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    path: Path
    bytes: int
    values: dict[str, Value]
    """Numbers and texts, by key; of lists only the length, in `lengths`."""
    lengths: dict[str, int]
    tensors: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        return sum(tensor.weights for tensor in self.tensors.values())

    def text(self, key: str) -> str:
        """A text; empty where it is not there or none."""
        value = self.values.get(key, "")
        return value if isinstance(value, str) else ""

    def count(self, key: str) -> int:
        """A whole number from 0 on; 0 where it is not there or none."""
        value = self.values.get(key, 0)
        return value if isinstance(value, int) and value > 0 else 0


def read_header(path: Path) -> GgufHeader:
    """Raises ModelError where the file is none, is cut off, damaged, or too new."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise ModelError(f"'{path}' is a GGUF file that is cut off or damaged in its header", hint=FETCH_AGAIN) from (
            error
        )
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="check path and permissions") from error


class _Reader:
    """Reads a header from its beginning to its end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._bytes = os.fstat(file.fileno()).st_size

    def header(self) -> GgufHeader:
        self._check_version()
        tensors, keys = self._number("Q"), self._number("Q")
        self._cap("tensors", tensors, TENSORS_CAP)
        self._cap("keys", keys, KEYS_CAP)
        values: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(keys):
            key = self._text(KEY_BYTES_CAP)
            kind = self._number("I")
            if kind == _ARRAY:
                lengths[key] = self._pass_array()
            else:
                values[key] = self._value(kind)
        found, end = self._tensors(tensors)
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"key 'general.alignment' = {alignment!r} is no power of two")
        begin = -(-self._file.tell() // alignment) * alignment
        if end and begin + end > self._bytes:
            raise self._damaged(f"it has {self._bytes:,} bytes, its header speaks of {begin + end:,}")
        return GgufHeader(self._path, self._bytes, values, lengths, found)

    def _check_version(self) -> None:
        magic = self._file.read(4)
        if magic != MAGIC:
            raise ModelError(
                f"'{self._path}' is no GGUF file: it begins with {magic!r}",
                hint="give a .gguf file, or a folder of Hugging Face's form",
            )
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "of a big-endian machine" if swapped in VERSIONS else f"of version {version}"
            raise ModelError(
                f"'{self._path}' is a GGUF file {what}; versions 2 and 3, little-endian, are read",
                hint="convert it anew with llama.cpp's tools of today",
            )

    def _tensors(self, count: int) -> tuple[dict[str, Tensor], int]:
        """(tensors by name, where the last byte of them lies, from the begin of the data)."""
        found: dict[str, Tensor] = {}
        end = 0
        for _ in range(count):
            name = self._text(KEY_BYTES_CAP)
            dimensions = self._number("I")
            self._cap(f"dimensions of tensor '{name}'", dimensions, DIMENSIONS_CAP)
            shape = tuple(self._number("Q") for _ in range(dimensions))
            kind, offset = self._number("I"), self._number("Q")
            if kind not in BLOCKS:
                raise ModelError(
                    f"'{self._path}': tensor '{name}' has type {kind}, which this millhand does not know",
                    hint="update millhand, or take the model in another precision",
                )
            tensor = Tensor(shape, BLOCKS[kind])
            if name in found or (shape and shape[0] % tensor.block.weights):
                raise self._damaged(f"tensor '{name}' comes twice, or is no whole number of blocks")
            found[name] = tensor
            end = max(end, offset + tensor.bytes)
        return found, end

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._text(TEXT_BYTES_CAP)
        if kind not in _NUMBERS:
            raise self._damaged(f"a key has type {kind}, which the format does not know")
        value: Value = struct.unpack("<" + _NUMBERS[kind], self._read(struct.calcsize(_NUMBERS[kind])))[0]
        return value

    def _pass_array(self) -> int:
        """Pass over a list; returns how long it is."""
        kind, length = self._number("I"), self._number("Q")
        self._cap("items of a list", length, ITEMS_CAP)
        if kind in _NUMBERS:
            self._skip(length * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(length):
                self._skip(self._number("Q"))
        else:
            raise self._damaged(f"a list has items of type {kind}")
        return length

    def _skip(self, count: int) -> None:
        place = self._file.tell() + count
        if place > self._bytes:
            raise EOFError
        self._file.seek(place)

    def _text(self, bytes_cap: int) -> str:
        length = self._number("Q")
        self._cap("bytes of a text", length, bytes_cap)
        return self._read(length).decode()

    def _number(self, code: str) -> int:
        number: int = struct.unpack("<" + code, self._read(struct.calcsize("<" + code)))[0]
        return number

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _cap(self, what: str, count: int, cap: int) -> None:
        if count > cap:
            raise self._damaged(f"{count:,} {what}, at most {cap:,} make sense")

    def _damaged(self, why: str) -> ModelError:
        return ModelError(f"'{self._path}' is cut off or damaged: {why}", hint=FETCH_AGAIN)
