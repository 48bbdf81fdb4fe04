"""Counts numbers and ids in work orders that stand nowhere in what they may rest on. Shares no code with the validator.

It reads character by character: a chunk is what stands between white space and punctuation; a chunk with a digit in it
(of any script) must be found in the grounds, as it is written or, for a plain number, as a rounding of a value there.
A unit behind a number must be one that a value of that size has in the grounds. Number words count from two on.

    python benchmarks/eval/invented.py ORDERS.jsonl

Each line: {"texts": [...], "grounds": [...], "values": {"velocity_rms_mm_s": 4.2}}.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal, InvalidOperation
from pathlib import Path
from typing import Any

EDGES = ".,;:!?()[]{}<>\"'`*_=~|，。；：！？（）【】“”、"
SPLITS = set(' \t\r\n\u00a0\u3000()[]{}<>"`*=~|,;!?，。；：！？（）【】“”、')
UNIT_WORDS = {
    "mm/s": "mm_s", "hz": "hz", "g": "g", "cel": "cel", "°c": "cel", "℃": "cel", "rpm": "rpm", "sigma": "sigma",
    "cycles": "cycles", "bar": "bar", "a": "a", "l/min": "l_min", "mm": "mm", "%": "percent", "nm": "nm", "kw": "kw",
    "v": "v", "kpa": "kpa", "mpa": "mpa", "psi": "psi", "minutes": "minutes", "hours": "hours", "days": "days",
    "weeks": "weeks", "months": "months", "years": "years", "seconds": "seconds", "µm": "um", "kg": "kg", "ml": "ml",
}  # fmt: skip
CASED = {"a": "A", "v": "V", "g": "g"}
"""Units of one letter, which are words otherwise."""
NUMBER_WORDS = """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen
""".split()  # noqa: SIM905 - words are read as words
WORD_VALUES = {word: Decimal(place + 2) for place, word in enumerate(NUMBER_WORDS[:19])} | {
    word: Decimal(10 * (place + 3)) for place, word in enumerate(NUMBER_WORDS[19:26])
} | {"hundred": Decimal(100), "thousand": Decimal(1000), "million": Decimal(10**6), "dozen": Decimal(12)}  # fmt: skip


def has_digit(chunk: str) -> bool:
    return any(unicodedata.numeric(character, None) is not None and not is_han(character) for character in chunk)


def is_han(character: str) -> bool:
    return "\u3400" <= character <= "\u9fff"


def chunks(text: str) -> list[str]:
    """What stands between white space, punctuation and Chinese characters."""
    found, current = [], ""
    for character in text:
        if character in SPLITS or is_han(character):
            found.append(current)
            current = ""
        else:
            current += character
    cleaned = (chunk.strip(EDGES) for chunk in [*found, current])
    return [chunk for chunk in cleaned if chunk]


def number_and_unit(chunk: str, following: str) -> tuple[Decimal, int, str] | None:
    """Value, decimals and unit; None for what is no plain number."""
    body = chunk.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ/%°µ℃")
    glued = chunk[len(body) :]
    if glued and glued.lower() not in UNIT_WORDS:
        return None
    try:
        value = Decimal(body.replace(",", ""))
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    word = glued or following
    unit = UNIT_WORDS.get(word.lower(), "")
    if word.lower() in CASED and word != CASED[word.lower()]:
        unit = ""
    return value, max(0, -int(value.as_tuple().exponent)), unit


class Grounds:
    """Texts and measured values that an order may rest on."""

    def __init__(self, texts: Sequence[str], values: Mapping[str, Any]) -> None:
        self._chunks = {chunk.lower() for text in texts for chunk in (*chunks(text), *chunks(text.replace("_", " ")))}
        self._chunks |= {part for name in values for part in (name.lower(), *name.lower().replace(".", "_").split("_"))}
        self._values: list[tuple[Decimal, str]] = []
        for name, value in values.items():
            if isinstance(value, int | float):
                self._values.append((Decimal(repr(value)), name.lower().rpartition(".")[2]))
        for text in texts:
            self._values += [(value, f"_{unit}" if unit else "") for _, value, _, unit in numbers(text)]
            self._values += [(WORD_VALUES[c.lower()], "") for c in chunks(text) if c.lower() in WORD_VALUES]

    def knows(self, chunk: str) -> bool:
        return chunk.lower() in self._chunks

    def has(self, value: Decimal, decimals: int, unit: str) -> bool:
        return any(self._fits(value, decimals, unit, known, name) for known, name in self._values)

    def _fits(self, value: Decimal, decimals: int, unit: str, known: Decimal, name: str) -> bool:
        if unit == "percent" and not name.endswith("_percent"):
            return self._fits(value, decimals, "", known * 100, "")
        if unit and not name.endswith(f"_{unit}"):
            return False
        step = Decimal(1).scaleb(-decimals)
        if abs(known) > Decimal(10) ** 20 or not known.is_finite():
            return False
        roundings = {known.quantize(step, how) for how in (ROUND_HALF_EVEN, ROUND_HALF_UP)}
        return abs(value) in {abs(rounding) for rounding in roundings} or abs(value) == abs(known)


def numbers(text: str) -> Iterator[tuple[str, Decimal, int, str]]:
    """Plain numbers of a text: the chunk, its value, decimals and unit."""
    words = re.sub(r"[.:](?=\s|$)", " \u2029 ", text)  # a unit does not follow over the end of a sentence: "377. A fan"
    found = chunks(words)
    for place, chunk in enumerate(found):
        if has_digit(chunk):
            read = number_and_unit(chunk, found[place + 1] if place + 1 < len(found) else "")
            if read is not None:
                yield chunk, *read


def invented(texts: Iterable[str], grounds: Grounds) -> dict[str, list[str]]:
    """`numbers`, `ids` and `words` that stand nowhere in the grounds."""
    result: dict[str, list[str]] = {"numbers": [], "ids": [], "words": []}
    for text in texts:
        plain = {chunk: (value, decimals, unit) for chunk, value, decimals, unit in numbers(text)}
        for chunk in chunks(text):
            if chunk.lower() in WORD_VALUES:
                if not grounds.knows(chunk) and not grounds.has(WORD_VALUES[chunk.lower()], 0, ""):
                    result["words"].append(chunk)
            elif not has_digit(chunk):
                continue
            elif chunk in plain:
                if not grounds.has(*plain[chunk]):
                    result["numbers"].append(chunk)
            elif not grounds.knows(chunk) and not all(
                grounds.knows(part) for part in chunk.split("-") if has_digit(part)
            ):
                result["ids"].append(chunk)
    return result


def main() -> int:
    total = {"orders": 0, "numbers": 0, "ids": 0, "words": 0}
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found = invented(row["texts"], Grounds(row["grounds"], row["values"]))
        total["orders"] += 1
        for kind, what in found.items():
            total[kind] += len(what)
            if what:
                print(f"{kind}: {what} in {row['texts']}")
    print(json.dumps(total))
    return int(any(total[kind] for kind in ("numbers", "ids", "words")))


if __name__ == "__main__":
    sys.exit(main())
