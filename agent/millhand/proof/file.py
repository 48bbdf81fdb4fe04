"""proof.json as bytes: written in one way only, so that a reader notices every byte that has changed since."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millhand.durable import write_durably
from millhand.errors import ModelError
from millhand.proof.document import FORMAT, PAGE, PROOF, Proof

BYTES_CAP = 8 << 20
"""A proof of ten thousand layers takes 2 MB."""
MAKE_ANEW = "take the proof as it was written, or prove the artifact anew"


class _Head(msgspec.Struct):
    format: int


def encode(proof: Proof) -> bytes:
    """The bytes of proof.json: JSON in UTF-8, every key written out and sorted, two spaces, a line break at the end."""
    return msgspec.json.format(msgspec.json.encode(proof, order="sorted"), indent=2) + b"\n"


def decode(data: bytes, source: Path) -> Proof:
    """A proof of its bytes. Raises ModelError naming `source` and the key, for any bytes but those of `encode`."""
    if len(data) > BYTES_CAP:
        raise ModelError(f"'{source}' is longer than {BYTES_CAP >> 20} MiB, which no proof is", hint=MAKE_ANEW)
    try:
        found = msgspec.json.decode(data, type=_Head).format
        if found != FORMAT:
            raise ModelError(
                f"'{source}': key 'format' = {found}, this millhand reads {FORMAT}",
                hint="update millhand, or prove the artifact anew",
            )
        proof = msgspec.json.decode(data, type=Proof)
        written = encode(proof)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise ModelError(f"'{source}' cannot be read as a proof: {error}", hint=MAKE_ANEW) from error
    if written != data:
        raise ModelError(
            f"'{source}' has been changed since it was written: {_first_difference(written, data)}", hint=MAKE_ANEW
        )
    return proof


def normal(proof: Proof) -> Proof:
    """The proof as a reader gets it: whole numbers where a float belongs become floats, tuples become lists.

    Raises ModelError naming the key that cannot be written: not finite, of a wrong type, or no plain value.
    """
    source = Path(PROOF)
    try:
        for key, number in _floats(msgspec.to_builtins(proof), ""):
            if not math.isfinite(number):
                raise ModelError(f"a proof cannot hold '{key}' = {number}", hint="measure it again, or leave it out")
        plain = msgspec.json.decode(msgspec.json.encode(proof, order="sorted"), type=Proof)
        return decode(encode(plain), source)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"a proof of model '{proof.model}' cannot be written: {error}", hint="mend the value"
        ) from error


def read_proof(path: Path) -> Proof:
    """Read proof.json. Raises FileNotFoundError where there is none, ModelError naming what is wrong with it."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"'{path}' is no plain file", hint=MAKE_ANEW)
        with path.open("rb") as file:
            data = file.read(BYTES_CAP + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="check its permissions") from error
    return decode(data, path)


def write_proof(folder: Path, proof: Proof) -> None:
    """Write proof.html and proof.json beside an artifact, each whole or not at all. Raises ModelError or OSError."""
    from millhand.proof.page import page

    proof = normal(proof)
    write_durably(folder / PAGE, page(proof).encode())
    write_durably(folder / PROOF, encode(proof))


def _floats(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every float with the dotted key it lies under."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _floats(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, part in enumerate(value):
            yield from _floats(part, f"{key}.{index}")


def _first_difference(written: bytes, data: bytes) -> str:
    """The first line that differs, as it is and as it would have been written."""
    lines = written.decode().splitlines(), data.decode(errors="replace").splitlines()
    for number, (expected, found) in enumerate(zip(*lines, strict=False), 1):
        if expected != found:
            return f"line {number} is {found.strip()[:60]!r}, not {expected.strip()[:60]!r}"
    return "something was added or cut off at its end"
