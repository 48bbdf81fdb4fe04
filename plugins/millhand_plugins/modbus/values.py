"""Registers -> values, in every type and order that devices use."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.modbus.options import NUMBERS, Location

Value = float | int | bool | str


class Layout:
    """Turns the registers of one location into its value. The orders are settled: "big" or "little"."""

    def __init__(self, form: str, *, length: int = 0, bit: int = -1, word_order: str, byte_order: str) -> None:
        self._form, self._length, self._bit = form, length, bit
        self._reverse_words = word_order == "little"
        self._word = ">H" if byte_order == "big" else "<H"

    def value(self, words: Sequence[int]) -> Value:
        """`words`: as many registers as the location takes, or one bit."""
        if self._form == "bool":
            return bool(words[0]) if self._bit < 0 else bool(int.from_bytes(self._bytes(words), "big") >> self._bit & 1)
        if self._length:
            raw = b"".join(struct.pack(self._word, word) for word in words)[: self._length]
            return raw.split(b"\x00")[0].decode("utf-8", errors="replace").rstrip()
        number: float | int = struct.unpack(">" + NUMBERS[self._form][1], self._bytes(words))[0]
        return number

    def samples(self, words: Sequence[int], scale: float) -> NDArray[np.float32]:
        """All values that lie one after the other in `words`, times `scale`: shape [n], float32."""
        size, code = NUMBERS[self._form]
        order = np.asarray(words, dtype=self._word.replace("H", "u2")).reshape(-1, size)
        if self._reverse_words:
            order = order[:, ::-1]
        raw = np.frombuffer(order.tobytes(), dtype=f">{code}")
        return (raw * np.float64(scale)).astype("<f4")

    def _bytes(self, words: Sequence[int]) -> bytes:
        ordered = reversed(words) if self._reverse_words else words
        return b"".join(struct.pack(self._word, word) for word in ordered)


def layout_of(location: Location, word_order: str, byte_order: str) -> Layout:
    """The layout of `location`, with the adapter's usual orders where it names none."""
    return Layout(
        location.form,
        length=location.length,
        bit=getattr(location, "bit", -1),
        word_order=location.word_order or word_order,
        byte_order=location.byte_order or byte_order,
    )
