"""Whether the numbers and ids of an answer stand in what was retrieved."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

ID = re.compile(r"(?<![\w.-])(?=[\w./-]{0,60}\d)(?=[\w./-]{0,60}[^\W\d_])[\w][\w./-]{1,60}(?<![./-])", re.ASCII)
"""Letters and digits in one word: part numbers, codes, names of assets."""
NUMBER = re.compile(
    r"(?<![\w.,])[-+]?\d{1,3}(?:[,' \u202f]\d{3})+(?:\.\d+)?(?![\w])"
    r"|(?<![\w.,])[-+]?\d{1,18}(?:[.,]\d{1,12})?(?![\w]|[.,]\d)"
)
UNIT = re.compile(
    r"^[-+]?[\d.,]{1,20}(?:mm|cm|m|nm|bar|kpa|mpa|pa|v|a|ma|kw|w|hz|khz|rpm|h|s|ms|min|kg|g|l|ml|c|f|k|d|x|%)$",
    re.IGNORECASE,
)
ENUMERATION = re.compile(r"^[ \t>*-]{0,8}\d{1,2}[.)](?:\s|$)")
CITATION = re.compile(r"\[\d{1,3}\]")


class Grounds:
    """Numbers and ids of the passages and the evidence of one answer."""

    def __init__(self, texts: Sequence[str]) -> None:
        joined = "\n".join(texts)
        self._ids = {_plain(match[0]) for match in ID.finditer(joined)}
        self._numbers = {value for found in NUMBER.findall(joined) for value in _values(found)}
        self._numbers |= {value for found in re.findall(r"\d+(?:[.,]\d+)?", joined) for value in _values(found)}

    def unsupported(self, segment: str, line_start: bool, replace: Callable[[str, str], str]) -> tuple[str, str]:
        """(segment with what nothing supports replaced, first kind replaced). Kinds: `id`, `number`.

        The number of a list's item and of a citation need no support.
        """
        first = ""
        skip = ENUMERATION.match(segment) if line_start else None
        start = skip.end() if skip else 0
        citations = [match.span() for match in CITATION.finditer(segment)]

        def judge(kind: str, holds: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
            def substitute(match: re.Match[str]) -> str:
                nonlocal first
                cited = any(begin <= match.start() < end for begin, end in citations)
                if match.start() < start or cited or holds(match[0]):
                    return match[0]
                first = first or kind
                return replace(kind, match[0])

            return substitute

        # Both kinds in one pass, since a replacement must not be read again.
        combined = re.compile(f"(?P<id>{ID.pattern})|(?P<number>{NUMBER.pattern})")
        judges = {"id": judge("id", self._id_holds), "number": judge("number", self._number_holds)}
        return combined.sub(lambda match: judges[str(match.lastgroup)](match), segment), first

    def _id_holds(self, found: str) -> bool:
        if UNIT.match(found):
            return self._number_holds(re.match(r"[-+]?[\d.,]+", found)[0])  # type: ignore[index]
        return _plain(found) in self._ids

    def _number_holds(self, found: str) -> bool:
        """Equal to a number there, or one there rounded to so many places; at least two digits must then be left."""
        for value in _values(found):
            if value in self._numbers or -value in self._numbers:
                return True
            places = len(found.replace(",", ".").partition(".")[2])
            if sum(map(str.isdigit, found)) >= 2 and any(round(other, places) == value for other in self._numbers):
                return True
        return False


def _plain(found: str) -> str:
    return re.sub(r"[./-]", "", found).lower()


def _values(found: str) -> set[float]:
    """What a number may mean: 1,200 is 1200 in English and 1.2 in German."""
    compact = re.sub(r"[' \u202f]", "", found)
    readings = {compact.replace(",", ""), compact.replace(",", ".")}
    if re.fullmatch(r"[-+]?\d{1,3}(?:\.\d{3})+", compact):
        readings.add(compact.replace(".", ""))
    return {float(reading) for reading in readings if reading.count(".") <= 1}
