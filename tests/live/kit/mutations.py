"""Mutations of valid bytes: what a broken client, a bad line or somebody who tries may send.

All chance comes from the generator that is given, so that a seed and a number name one mutation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

EXTREMES = (
    *(b"0", b"-1", b"1", b"127", b"128", b"255", b"256", b"65535", b"65536"),
    *(b"2147483647", b"2147483648", b"4294967295", b"4294967296", b"9223372036854775807", b"9223372036854775808"),
    *(b"18446744073709551615", b"18446744073709551616", b"1e308", b"1e309", b"-1e400", b"5e-324", b"0.5", b"-0"),
    *(b"9" * 30, b"9" * 400, b"0x10", b"NaN", b"Infinity", b"1e", b"+1", b"01"),
)
VALUES = (
    *(b"null", b"true", b"false", b"{}", b"[]", b'""', b'"x"', b'"FP32"', b"[[]]", b'{"a":{"b":[1,{"c":null}]}}'),
    *(b"[" * 2000, b"[" * 200 + b"]" * 200, b'"\\ud800"', b'"\\u0000"', b'"' + b"y" * 3000 + b'"', b"[1,null]"),
    *(b'"\xff"', b'"\\x"', b"-", b"[true,1]"),
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
_VALUE = re.compile(rb'"[^"]*"|\[[^\[\]]*\]|-?\d+(?:\.\d+)?|true|false|null')

Mutator = Callable[[random.Random, bytes], bytes]


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def delete(rng: random.Random, data: bytes) -> bytes:
    start, end = _slice(rng, data)
    return data[:start] + data[end:]


def duplicate(rng: random.Random, data: bytes) -> bytes:
    start, end = _slice(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 3, 20)) + data[end:]


def insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 2, 4, 64))) + data[place:]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    start, end = _slice(rng, data)
    return data[:start] + bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * (end - start) + data[end:]


def extreme_number(rng: random.Random, data: bytes) -> bytes:
    """A number in the text becomes an extreme one."""
    return _replace_one(rng, data, _NUMBER, EXTREMES)


def other_value(rng: random.Random, data: bytes) -> bytes:
    """A value of JSON becomes another, of another type as a rule."""
    return _replace_one(rng, data, _VALUE, VALUES)


ON_BYTES: Sequence[Mutator] = (flip_bits, truncate, delete, duplicate, insert, overwrite)
ON_TEXT: Sequence[Mutator] = (*ON_BYTES, *[extreme_number] * 3, *[other_value] * 3)


def mutate(rng: random.Random, data: bytes, mutators: Sequence[Mutator] = ON_BYTES) -> bytes:
    """One to three mutations in a row."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(mutators)(rng, data)
    return data


def splice(rng: random.Random, first: bytes, second: bytes) -> bytes:
    """The beginning of one, the end of another."""
    return first[: rng.randrange(len(first) + 1)] + second[rng.randrange(len(second) + 1) :]


def _slice(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 16, 64)))


def _replace_one(rng: random.Random, data: bytes, pattern: re.Pattern[bytes], values: Sequence[bytes]) -> bytes:
    found = list(pattern.finditer(data))
    if not found:
        return flip_bits(rng, data)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(values) + data[match.end() :]
