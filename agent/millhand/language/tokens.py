"""Numbers, ids and dates in a text, with their units: what may not be invented."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

CJK = "\u3400-\u9fff"

_UNITS = {
    "mm/s": "mm/s mm_s",
    "m/s": "m/s m_s",
    "m/s2": "m/s2 m/s^2 m_s2",
    "g": "g",
    "Hz": "hz 赫兹 赫",
    "kHz": "khz",
    "Cel": "°c ℃ cel degc 摄氏度 celsius 度",
    "degF": "°f ℉ degf fahrenheit",
    "K": "K kelvin",
    "rpm": "rpm r/min 转/分",
    "%": "% percent pct",
    "Nm": "nm n·m n.m 牛米",
    "N": "N",
    "bar": "bar barg",
    "mbar": "mbar",
    "Pa": "pa",
    "kPa": "kpa",
    "MPa": "mpa",
    "psi": "psi psig",
    "V": "V volt volts 伏",
    "mV": "mv",
    "kV": "kv",
    "A": "A amp amps ampere amperes 安",
    "mA": "ma",
    "W": "W watt watts",
    "kW": "kw 千瓦",
    "kWh": "kwh",
    "mm": "mm millimetre millimetres millimeter millimeters 毫米",
    "um": "µm μm um micron microns 微米",
    "m": "m metre metres 米",
    "cm": "cm 厘米",
    "in": "inch inches",
    "kg": "kg 千克 公斤",
    "t": "t tonne tonnes 吨",
    "l": "l litre litres liter liters 升",
    "ml": "ml 毫升",
    "l/min": "l/min",
    "m3/h": "m3/h",
    "h": "h hr hrs hour hours 小时",
    "min": "min mins minute minutes 分钟",
    "s": "s sec secs second seconds 秒",
    "ms": "ms 毫秒",
    "d": "day days 天",
    "week": "week weeks 周",
    "month": "month months 个月",
    "a": "year years 年",
    "cycles": "cycle cycles 循环",
    "sigma": "sigma σ",
    "dB": "db",
    "deg": "° degree degrees",
    "Ohm": "ohm ohms Ω 欧",
}
UNITS = {alias: unit for unit, aliases in _UNITS.items() for alias in aliases.split()}
"""How a unit is written -> the unit; what has several letters, in lower case."""
_LONG = "|".join(re.escape(alias) for alias in sorted(UNITS, key=len, reverse=True) if len(alias) > 1)
_UNIT = f"(?i:{_LONG})|[{''.join(alias for alias in UNITS if len(alias) == 1)}]"
_AFTER = re.compile(rf"\s?({_UNIT})(?![A-Za-z0-9])")

FIGURE_CHARACTERS = 15
"""What is longer is compared to the letter, as an id is: a float does not hold so many digits."""
_PLAIN = r"\d+(?:[.,]\d+)*(?:[eE][+-]?\d+)?"
_RUN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9]|[._,:/+#\\'-](?=[A-Za-z0-9]))*")
_NUMBER = re.compile(_PLAIN)
_RANGE = re.compile(rf"({_PLAIN})-({_PLAIN})")
_WITH_UNIT = re.compile(rf"({_PLAIN})(?:-({_PLAIN}))?({_UNIT})")
_CAPITALS = re.compile(r"[A-Z]{2,}(?:-[A-Z]{2,})+")

_ONES = "zero . two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate((*_ONES.split(), "eighteen", "nineteen")) if word != "."}
"""Not `one`, which mostly counts nothing."""
_WORDS |= {word: 10 * tens for tens, word in enumerate(_TENS, 2)}
_WORDS |= {"dozen": 12, "twice": 2, "thrice": 3}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_WORD = "|".join([*_WORDS, *_SCALES])
_IN_WORDS = re.compile(rf"\b(?:{_WORD})(?:(?:[\s-]+(?:and\s+)?)(?:{_WORD}|one))*\b", re.IGNORECASE)

_HAN = {"零": 0, "〇": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
_HAN_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10_000}
_MEASURES = "个次天台根颗条秒毫厘米度周月年转倍套只件步处片组张瓶升克公小分伏安瓦赫巴吨"
_IN_HAN = re.compile(f"[零〇一二两三四五六七八九十百千万]+(?=[{_MEASURES}])")
_NO_COUNTS = ("千分尺", "千分表", "百分表", "十分重", "十分必", "万分")
"""Words that only look like counts: tools and degrees."""


@dataclass(frozen=True)
class Token:
    """Something in a text that must stand in the grounds. unit: as `UNITS` names it, empty where there is none."""

    start: int
    end: int
    text: str
    values: tuple[float, ...] = ()
    """What the number may be: `1,234` is two. Empty for an id or a date, which must be the same to the letter."""
    unit: str = ""
    decimals: int = 0
    digits: int = 0
    """Significant digits that are written; 0 where there is an exponent, which is never taken for a rounding."""


class Figure(NamedTuple):
    """A number of the grounds."""

    value: float
    unit: str


def fold(text: str) -> str:
    """The text on one line, without invisible characters, all digits as ASCII."""
    folded = []
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cf", "Cs", "Co", "Cn"):
            continue
        if category in ("Cc", "Zl", "Zp"):
            folded.append(" ")
        elif category in ("Nd", "Nl", "No") or "\uff10" <= character <= "\uff5a" or character in "．％－／＋":
            folded.append(_plain(character))
        elif character in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212":
            folded.append("-")
        else:
            folded.append(character)
    return " ".join("".join(folded).split())


def _plain(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    return unicodedata.normalize("NFKC", character).replace("\u2044", "/") if digit is None else str(digit)


def tokens(text: str) -> Iterator[Token]:
    """Numbers, ids and dates of a folded text, in their order."""
    found = [*_runs(text), *_words(text), *_han(text), *_odd(text)]
    end = 0
    for token in sorted(found, key=lambda token: (token.start, -token.end)):
        if token.start >= end:
            yield token
            end = token.end


def _runs(text: str) -> Iterator[Token]:
    for match in _RUN.finditer(text):
        run, start = match[0], match.start()
        if not any(character.isdigit() for character in run):
            if _CAPITALS.fullmatch(run):
                yield Token(start, match.end(), run)
            continue
        attached = _WITH_UNIT.fullmatch(run)
        pair = _RANGE.fullmatch(run)
        if attached:
            first, second, unit = attached.groups()
            yield from _numbers(text, start, match.end(), [first, second] if second else [first], unit)
        elif pair or _NUMBER.fullmatch(run):
            after = _AFTER.match(text, match.end())
            end, unit = (after.end(), after[1]) if after else (match.end(), "")
            yield from _numbers(text, start, end, list(pair.groups()) if pair else [run], unit)
        else:
            yield Token(start, match.end(), run)


def _numbers(text: str, start: int, end: int, written: list[str], unit: str) -> Iterator[Token]:
    """One or two numbers with the unit of the last; a sign belongs to the first where nothing stands before it."""
    signed = start > 0 and text[start - 1] == "-" and (start == 1 or text[start - 2] in " (,=:：（")
    place = start - signed
    for index, number in enumerate(written):
        stop = end if index == len(written) - 1 else place + signed * (index == 0) + len(number) + 1
        sign = -1.0 if signed and index == 0 else 1.0
        values = tuple(sign * value for value in _values(number))
        mantissa = re.split("[eE]", number)[0]
        _, _, decimals = mantissa.replace(",", ".").rpartition(".") if re.search("[.,]", mantissa) else ("", "", "")
        digits = len(re.sub(r"\D", "", mantissa).lstrip("0")) if mantissa == number else 0
        is_id = (len(number) > 1 and number[0] == "0" and number.isdigit()) or len(number) > FIGURE_CHARACTERS
        yield Token(place, stop, text[place:stop], () if is_id else values, _canonical(unit), len(decimals), digits)
        place = stop


def _canonical(unit: str) -> str:
    return UNITS.get(unit) or UNITS.get(unit.lower(), "")


def _values(number: str) -> set[float]:
    """What a number may mean: commas group thousands, or one is the decimal mark."""
    readings = {number.replace(",", "")}
    if number.count(",") == 1 and "." not in number:
        readings.add(number.replace(",", "."))
    values = set()
    for reading in readings:
        try:
            values.add(float(reading))
        except ValueError:  # 1.2.3: a version or a clause, an id
            continue
    return values


def _words(text: str) -> Iterator[Token]:
    for match in _IN_WORDS.finditer(text):
        total, part = 0, 0
        for word in re.findall(r"[a-z]+", match[0].lower()):
            if word in _SCALES:
                part = max(part, 1) * _SCALES[word]
                if word != "hundred":
                    total, part = total + part, 0
            elif word != "and":
                part += 1 if word == "one" else _WORDS[word]
        yield _counted(text, match.start(), match.end(), _float(total + part))


def _han(text: str) -> Iterator[Token]:
    for match in _IN_HAN.finditer(text):
        if match[0] == "一" or text.startswith(_NO_COUNTS, match.start()):
            continue
        total, digit = 0, 0
        for character in match[0]:
            if character in _HAN_SCALES:
                total += max(digit, 1) * _HAN_SCALES[character]
                digit = 0
            else:
                digit = 10 * digit + _HAN[character]
        yield _counted(text, match.start(), match.end(), _float(total + digit))


def _counted(text: str, start: int, end: int, value: float) -> Token:
    after = _AFTER.match(text, end)
    stop, unit = (after.end(), _canonical(after[1])) if after else (end, "")
    return Token(start, stop, text[start:stop], (value,), unit, 0, len(f"{value:.0f}"))


def _float(value: float) -> float:
    """Also of a whole number that no float holds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _odd(text: str) -> Iterator[Token]:
    """Numeric signs of scripts that `fold` has no digits for: nobody can compare them."""
    for place, character in enumerate(text):
        if not character.isascii() and not re.match(f"[{CJK}]", character) and character.isnumeric():
            yield Token(place, place + 1, character)


class Grounds:
    """What numbers and ids may rest on."""

    def __init__(self) -> None:
        self._figures: set[Figure] = set()
        self._ids: set[str] = set()

    def add_text(self, text: str) -> None:
        """Everything that stands in a text."""
        folded = fold(text)
        for token in tokens(folded):
            self._figures |= {Figure(value, token.unit) for value in token.values}
            self._ids.add(_name(token.text))
        self._ids |= {_name(match[0]) for match in _RUN.finditer(folded)}

    def add_facts(self, facts: Mapping[str, object]) -> None:
        """Measured facts, their units from their names: `velocity_rms_mm_s`."""
        for name, value in facts.items():
            folded = fold(name)
            self._ids |= {_name(folded), _name(folded.rpartition(".")[2]), *map(_name, re.split(r"[_.]", folded))}
            self.add_value(value, unit_of(name))

    def add_value(self, value: object, unit: str) -> None:
        if isinstance(value, str):
            self.add_text(value)
        elif isinstance(value, int | float):
            self._figures.add(Figure(_float(value), unit))
        elif isinstance(value, Iterable):
            for item in value:
                self.add_value(item, unit)

    def has(self, token: Token) -> bool:
        """Whether the grounds say it: a number may be rounded, to no fewer than two digits."""
        if _name(token.text) in self._ids:
            return True
        return any(_same(token, value, figure) for value in token.values for figure in self._figures)

    def minutes(self) -> set[float]:
        """Every time that the grounds tell, in minutes."""
        lengths = {"min": 1.0, "h": 60.0}
        return {figure.value * lengths[figure.unit] for figure in self._figures if figure.unit in lengths}


def _same(token: Token, value: float, figure: Figure) -> bool:
    candidates = [figure.value]
    if token.unit == "%" and not figure.unit:
        candidates.append(figure.value * 100)
    elif token.unit and token.unit != figure.unit:
        return False
    return any(
        _is_rounded(token, value, known) or (value > 0 and _is_rounded(token, -value, known)) for known in candidates
    )


def _is_rounded(token: Token, value: float, known: float) -> bool:
    if not math.isfinite(known):
        return False  # else any number would be near it
    if value == known or (not value.is_integer() and math.isclose(value, known, rel_tol=1e-12)):
        return True
    # Half a unit of the last written place, with room for what binary fractions cannot hold.
    return token.digits >= 2 and abs(value - known) <= 10.0**-token.decimals * (0.5 + 1e-6)


def unit_of(name: str) -> str:
    """The unit that ends a fact's name."""
    parts = name.lower().rpartition(".")[2].split("_")
    for length in (2, 1):
        last = "_".join(parts[-length:])
        if len(parts) > length and (_canonical(last) or _canonical(last.upper())):
            return _canonical(last) or _canonical(last.upper())
    return ""


def _name(text: str) -> str:
    return text.casefold()
