"""A light classifier beside the rules: logistic regression over hashed words and pairs of words.

Each word of a text adds the weights of itself and of its pairs with the two words before it. A text is judged window by
window and gets the highest score, so that an attack in a long page is not diluted. All of it is running sums: linear in
the text's length.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BUCKET_BITS = 17
WINDOW = 40
"""Words that are judged together; windows begin at each half."""
FULL_EVIDENCE = 8
"""A text of fewer words counts as if it had so many, the rest of them saying nothing: a word proves little."""
LONGEST_WORD = 40
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W\d_{CJK}]+|\d+|[{{}}<>\[\]=:!?/#]")
"""Scripts without spaces are read sign by sign; a number is a word, and so is a mark that code is made of."""
_FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)
"""Odd constants of multiplicative hashing (Knuth; MurmurHash3)."""
_BEGIN = np.array([1, 2], np.uint32)
"""Stand for the words before a text's first."""


def words(text: str) -> list[str]:
    """Lower case without accents; each number is `0`."""
    folded = text.lower()
    if not folded.isascii():
        folded = "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))
        folded = unicodedata.normalize("NFC", folded)
    return ["0" if word[0].isdigit() else word[:LONGEST_WORD] for word in WORD.findall(folded)]


def buckets(found: Sequence[str]) -> tuple[NDArray[np.uint32], ...]:
    """Of each word, of each with the one before it, and of each with the one before that."""
    hashes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in found], np.uint32)
    edged = np.concatenate((_BEGIN, hashes))
    here, before, earlier = edged[2:], edged[1:-1], edged[:-2]
    return (
        _bucket(here),
        _bucket(here * _FIRST ^ before * _SECOND),
        _bucket(here * _SECOND ^ earlier * _FIRST ^ np.uint32(0x27D4EB2F)),
    )


def _bucket(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return (hashes * _FIRST) >> np.uint32(32 - BUCKET_BITS)


def evidence(count: int) -> float:
    """What the sum over so many words is divided by."""
    return math.sqrt(max(count, FULL_EVIDENCE))


class Classifier:
    """The shipped weights; thread-safe, since it keeps nothing of a text."""

    def __init__(self, weights: NDArray[np.float32], bias: float) -> None:
        self._weights = weights
        self._bias = bias

    @classmethod
    def shipped(cls) -> Classifier:
        with np.load(Path(__file__).with_name("weights.npz")) as file:
            return cls(file["weights"].astype(np.float32) * file["scale"], float(file["bias"]))

    def score(self, text: str) -> float:
        """The logit of the most suspicious window; above 0 an attack is likelier than not."""
        found = words(text)
        if not found:
            return self._bias
        sums = np.sum([self._weights[places] for places in buckets(found)], axis=0, dtype=np.float64)
        totals = np.concatenate(([0.0], sums.cumsum()))
        starts = np.arange(0, max(1, len(found) - WINDOW // 2), WINDOW // 2)
        ends = np.minimum(starts + WINDOW, len(found))
        divisors = np.sqrt(np.maximum(ends - starts, FULL_EVIDENCE))
        return float(((totals[ends] - totals[starts]) / divisors).max()) + self._bias


def windows(found: Sequence[str]) -> list[Sequence[str]]:
    """Words as they are judged together."""
    return [found[at : at + WINDOW] for at in range(0, max(1, len(found) - WINDOW // 2), WINDOW // 2)]
