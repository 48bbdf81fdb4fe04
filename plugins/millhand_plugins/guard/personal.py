"""Personal data and secrets in a text: found by form, and by their check digits where they have some."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Spot(NamedTuple):
    kind: str
    """As it stands in the placeholder: `e-mail`."""
    start: int
    end: int


def personal_data(text: str) -> Iterator[Spot]:
    """E-mail addresses, telephone numbers, IBANs, payment cards, US social security and Chinese identity numbers.

    Names and postal addresses are not found: no form tells them from machines and places.
    """
    if "@" in text:
        yield from _spots("e-mail", _EMAIL, text)
    if not _FOUR_DIGITS.search(text):
        return
    yield from _spots("iban", _IBAN, text, _iban_holds)
    yield from _spots("card", _CARD, text, _luhn_holds)
    yield from _spots("identity number", _CHINESE_ID, text, _chinese_id_holds)
    yield from _spots("identity number", _SSN, text)
    for match in _PHONE.finditer(text):
        group = match.lastindex or 0
        if _phone_holds(match[group]):
            yield Spot("telephone", match.start(group), match.end(group))


def secrets(text: str) -> Iterator[Spot]:
    """Private keys, tokens by their issuers' prefixes, JWTs, and what follows `password:` and the like."""
    for pattern in _SECRETS:
        for match in pattern.finditer(text):
            group = match.lastindex or 0
            yield Spot("secret", match.start(group), match.end(group))


def masked(text: str, spots: Iterator[Spot], keep: Callable[[str], bool] = lambda found: False) -> tuple[str, str]:
    """The text with placeholders, and the first kind that was masked ('' for none). keep: what may stay."""
    pieces, end, first = [], 0, ""
    for spot in sorted(spots, key=lambda spot: (spot.start, -spot.end)):
        if spot.start >= end and not keep(text[spot.start : spot.end]):
            pieces += [text[end : spot.start], f"[{spot.kind}]"]
            end, first = spot.end, first or spot.kind
    return ("".join([*pieces, text[end:]]), first) if pieces else (text, "")


def _spots(
    kind: str, pattern: re.Pattern[str], text: str, holds: Callable[[str], bool] | None = None
) -> Iterator[Spot]:
    for match in pattern.finditer(text):
        if holds is None or holds(match[0]):
            yield Spot(kind, match.start(), match.end())


def _luhn_holds(found: str) -> bool:
    """Payment cards (ISO/IEC 7812): 13 to 19 digits and Luhn's check. Ungrouped ones also occur as serial numbers."""
    digits = [int(char) for char in found if char.isdigit()]
    doubled = [digit if index % 2 == 0 else digit * 2 - 9 * (digit > 4) for index, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _iban_holds(found: str) -> bool:
    """ISO 13616: the remainder by 97 is 1."""
    compact = found.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return len(compact) >= 15 and int("".join(str(int(char, 36)) for char in moved)) % 97 == 1


def _chinese_id_holds(found: str) -> bool:
    """GB 11643: the weighted sum by 11."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(digit) * weight for digit, weight in zip(found[:17], weights, strict=True))
    return "10X98765432"[total % 11] == found[17].upper()


def _phone_holds(found: str) -> bool:
    return 8 <= sum(map(str.isdigit, found)) <= 15


_FOUR_DIGITS = re.compile(r"\d[ .()/-]{0,2}\d[ .()/-]{0,2}\d[ .()/-]{0,2}\d")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}", re.ASCII)
_IBAN = re.compile(r"(?<![A-Z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(
    r"(?<![\w.-])(?:[3-6]\d{3}([ -])\d{4}\1\d{4}\1\d{1,7}|3[47]\d{2}[ -]\d{6}[ -]\d{5}"
    r"|(?:4\d{3}|5[1-5]\d{2})\d{12})(?![\w.-]?\d)"
)
_CHINESE_ID = re.compile(
    r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:[0-2][1-9]|[123]0|31)\d{3}[\dXx](?![\dA-Za-z])"
)
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9]\d{0,2}[ ./()-]{0,3}(?:\d{1,5}[ ./()-]{0,2}){2,6}\d{1,5}(?!\w)"
    r"|(?:(?<=tel)|(?<=phone)|(?<=mobile)|(?<=call)|(?<=Tel)|(?<=Phone)|(?<=telefon)|(?<=Telefon)|(?<=Handy)|(?<=电话)|(?<=手机))"
    r"[.:： ]{1,3}(\(?0?\d{2,5}\)?[ ./-]{0,2}\d{2,5}(?:[ ./-]{0,2}\d{2,5}){0,3})(?!\w)"
    r"|(?<![\w.+-])1[3-9]\d{9}(?![\w.-])"
)
_SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,8000}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
        r"\b(?:sk|rk|pk)[-_](?:live|test|proj|ant|or)?[-_A-Za-z0-9]{20,200}",
        r"\bgh[pousr]_[A-Za-z0-9]{30,80}|\bgithub_pat_[A-Za-z0-9_]{40,120}|\bglpat-[A-Za-z0-9_-]{20,60}|\bhf_[A-Za-z0-9]{30,60}",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}|\bxox[abprs]-[A-Za-z0-9-]{10,100}",
        r"\beyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,2000}",
        r"(?i)\bbearer {1,2}([A-Za-z0-9._~+/-]{16,2000}={0,2})",
        (
            r"(?i)\b(?:password|passwd|passphrase|passwort|kennwort|api[_ -]?key|secret[_ -]?key|access[_ -]?token)\b"
            r"[\"']?(?: is| lautet)?\s{0,2}[:=]\s{0,2}[\"']?([^\s\"',;]{4,200})"
        ),
        r"(?:密码|口令|密钥)(?:是|为)?\s{0,2}[:：=]?\s{0,2}([A-Za-z0-9!@#$%^&*._-]{4,200})",
    )
)
