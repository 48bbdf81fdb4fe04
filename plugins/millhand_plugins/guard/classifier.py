"""A light classifier beside the rules: logistic regression over hashed n-grams of characters.

A text's features are its 3-, 4- and 5-grams (UTF-8 bytes, lower case, digits as one), each counted as its share of the
text. A long text is judged window by window and gets the highest score, so that an attack in a long page is not
diluted. Weighting by shares keeps all of it a running sum: linear in the text's length.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BUCKET_BITS = 16
GRAMS = (3, 4, 5)
WINDOW = 160
"""Bytes that are judged together; windows begin at each half."""
SCALE = 40.0
"""Logits are shares of n-grams times their weights; the scale keeps weights near 1."""
FULL_EVIDENCE = 180
"""A text of fewer n-grams counts as if it had so many, the rest of them saying nothing: a word proves little."""
DIGITS = re.compile(rb"[0-9]+")
SPACES = re.compile(rb"\s+")


def signature(text: str) -> NDArray[np.uint8]:
    """(bytes,) what n-grams are made of: lower case, one 0 for each number, one space for each gap, spaces around."""
    raw = text.lower().encode("utf-8", "replace")
    return np.frombuffer(b" " + SPACES.sub(b" ", DIGITS.sub(b"0", raw)).strip() + b" ", np.uint8)


def buckets(letters: NDArray[np.uint8]) -> list[NDArray[np.uint32]]:
    """For each length of n-gram, the bucket of each place (Knuth's multiplicative hash)."""
    wide = letters.astype(np.uint32)
    found = []
    for length in GRAMS:
        places = len(wide) - length + 1
        if places < 1:
            continue
        mixed = np.zeros(places, np.uint32)
        for offset in range(length):
            mixed = (mixed ^ wide[offset : offset + places]) * np.uint32(0x9E3779B1)
        found.append((mixed ^ np.uint32(length)) >> np.uint32(32 - BUCKET_BITS))
    return found


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
        letters = signature(text)
        if len(letters) < GRAMS[0]:
            return self._bias
        sums = np.zeros(len(letters) + 1)
        counts = np.zeros(len(letters) + 1)
        for found in buckets(letters):
            sums[1 : len(found) + 1] += self._weights[found]
            counts[1 : len(found) + 1] += 1
        sums, counts = sums.cumsum(), counts.cumsum()
        starts = np.arange(0, max(1, len(letters) - WINDOW // 2), WINDOW // 2)
        ends = np.minimum(starts + WINDOW, len(letters))
        shares = (sums[ends] - sums[starts]) / np.maximum(counts[ends] - counts[starts], FULL_EVIDENCE)
        return float(shares.max() * SCALE + self._bias)
