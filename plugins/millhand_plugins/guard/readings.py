"""What a text may say beside what it seems to say: letters of other scripts folded, codes decoded, pieces joined.

Every step is linear in the text's length: patterns have no nested choice, and each decoding is done once, to a depth.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import unicodedata
from collections.abc import Callable, Iterator

import numpy as np

DEPTH = 3
"""Codes within codes are opened so often."""
DECODED_CAP = 200_000
"""Characters that all decoded parts of one text may have together."""
CIPHER_CAP, CIPHER_PARTS, CIPHER_LETTERS = 2000, 8, 16
"""Ciphers are looked for in so many characters and parts, and in parts with so many letters."""
# Letters of English text, in tenths of a percent, a to z (the usual table, as in Lewand, Cryptological Mathematics).
_ENGLISH = (82, 15, 28, 43, 127, 22, 20, 61, 70, 2, 8, 40, 24, 67, 75, 19, 1, 60, 63, 91, 28, 10, 24, 2, 20, 1)
_SHIFTED_ENGLISH = np.array([np.roll(_ENGLISH, by) for by in range(26)])
READABLE_SHARE = 0.85
"""So much of a decoded part must be letters, digits, spaces and usual punctuation, else it is no text."""

# Unicode's confusables (UTS 39) as far as they are lower-case Latin letters in usual fonts; written by hand.
_LOOKALIKES = (
    "aаɑαⲁꭺᴀɐ bЬƅʙвᏼ cсϲⅽᴄⲥɔ dԁɗⅾᴅꓒđ eеєҽεᴇℯꬲǝ fғſꞙϝꜰɟ gɡցɢԍ hһհʜнḩ iіıιɩɪӏⅰ jјϳᴊյ kкκᴋⲕ lⅼןʟⵏł mмⅿᴍɯ nпոηɴ "
    "oоοσօᴏ૦௦๐ø pрρᴘⲣ qԛգզ rгᴦʀⲅɹ sѕƽꜱ tтτᴛʇ uυսᴜцʋ vνѵᴠⅴʌ wԝաᴡωшʍ xхχⅹ× yуүγʏყʎ zᴢʐ"
)
_SQUARED = {base + index: chr(97 + index) for base in (0x1F130, 0x1F150, 0x1F170, 0x1F1E6) for index in range(26)}
FOLD = str.maketrans(
    {
        form: group[0]
        for group in _LOOKALIKES.split()
        for other in group[1:]
        for form in {other, other.upper()}
        if len(form) == 1 and not form.isascii()
    }
)
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f\U000e0100-\U000e01ef]+"
)
TAGS = re.compile("[\U000e0020-\U000e007e]+")
MARKS = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+")
NATIVE = re.compile("[\u0370-\u052f]{3}")
"""Greek or Cyrillic that may be meant as such."""

SPACED = re.compile(r"(?<![^\W_])([^\W_])[ .\-_*·/|~](?=[^\W_](?![^\W_]))")
"""A letter by itself, a separator, and another letter by itself."""
SPACED_GATE = re.compile(r"(?<![^\W_])[^\W_]([ .\-_*·/|~])[^\W_]\1[^\W_]\1[^\W_](?![^\W_])")
BROKEN = re.compile(r"(?<=[^\W\d_])(?:[-._*·|~+'#/]{1,3}|\.\.\.)(?=[^\W\d_])")
MIRRORED = re.compile(r"//:s?(?:ptth|ptf|tqm)|(?:gro|moc|ten|oi)\.[\w-]|\][^\]\n]{0,80}\[!|fr- mr")
"""Links and commands from right to left; words are read backwards anyway."""
QUOTED = re.compile(r"'([^'\n]{1,200})'|\"([^\"\n]{1,200})\"")
CODED_GATE = re.compile(
    r"[A-Za-z0-9+/_-]{16}|[&%\\][#xu0-9A-F]|[01]{8}|[.-] |\d[ ,;:]\d|[0-9a-fA-F]{2}[ :][0-9a-fA-F]{2}"
)


def clean(text: str) -> str:
    """The text with compatibility forms, look-alikes and invisible characters folded to plain letters."""
    if text.isascii():
        return text
    text = INVISIBLE.sub("", text).translate(_SQUARED)
    text = MARKS.sub("", unicodedata.normalize("NFKD", text))
    return unicodedata.normalize("NFC", text).translate(FOLD)


def readings(text: str, depth: int = DEPTH) -> Iterator[str]:
    """The text as it reads, then every other way to read it that differs."""
    plain = clean(text)
    yield plain
    if plain is not text and NATIVE.search(text):
        yield MARKS.sub("", INVISIBLE.sub("", text))
    budget = DECODED_CAP
    for hidden in _hidden(text, plain):
        budget -= len(hidden)
        if budget < 0:
            return
        if depth > 0 and hidden != text:
            yield from readings(hidden, depth - 1)
    if SPACED_GATE.search(plain):
        yield re.sub(r" {2,}", " ", re.sub(r" ([.:@/-]) ", r"\1", SPACED.sub(r"\1", plain)))
    if BROKEN.search(plain):
        yield BROKEN.sub("", plain)
    yield from unshifted(plain)
    if MIRRORED.search(plain):
        yield plain[::-1]
        yield " ".join(word[::-1] for word in plain.split())
    quoted = ["".join(pair) for pair in QUOTED.findall(plain)]
    if len(quoted) > 1:
        yield "".join(quoted)
        yield " ".join(quoted)


def unshifted(text: str) -> Iterator[str]:
    """A Caesar cipher's plain text, where the letters are spread as English is, but moved in the alphabet.

    Each line, and what follows a colon, is looked at by itself, since a sentence in plain words may stand before.
    """
    for part in re.split("[\n:]", text[:CIPHER_CAP])[:CIPHER_PARTS]:
        letters = np.frombuffer(part.lower().encode("ascii", "ignore"), np.uint8)
        letters = letters[(letters >= ord("a")) & (letters <= ord("z"))] - ord("a")
        if len(letters) < CIPHER_LETTERS:
            continue
        likely = np.argsort(_SHIFTED_ENGLISH @ np.bincount(letters, minlength=26))[:-4:-1]
        if likely[0] != 0:
            yield from (_shifted(part, int(by)) for by in likely if by)


def _shifted(text: str, by: int) -> str:
    return "".join(chr((ord(char) - 97 - by) % 26 + 97) if "a" <= char <= "z" else char for char in text.lower())


def hidden_in(text: str) -> Iterator[str]:
    """The decoded parts of a text."""
    return _hidden(text, clean(text))


def _hidden(text: str, plain: str) -> Iterator[str]:
    if not text.isascii():
        for match in TAGS.finditer(text):
            yield "".join(chr(ord(char) - 0xE0000) for char in match[0])
        smuggled = _selectors(text)
        if smuggled:
            yield smuggled
    if not CODED_GATE.search(plain):
        return
    for pattern, decode in _CODES:
        for match in pattern.finditer(plain):
            found = decode(match[0])
            if found and _readable(found):
                yield found
    for pattern, unescape in _ESCAPES:
        if pattern.search(plain):
            yield unescape(plain)


def _selectors(text: str) -> str:
    """Bytes that were written as variation selectors."""
    codes = [ord(char) for char in text if 0xFE00 <= ord(char) <= 0xFE0F or 0xE0100 <= ord(char) <= 0xE01EF]
    if len(codes) < 8:
        return ""
    return bytes(code - 0xFE00 if code < 0xFF00 else code - 0xE0100 + 16 for code in codes).decode("utf-8", "ignore")


def _readable(text: str) -> bool:
    usual = sum(char.isalnum() or char in " .,;:!?'\"-_/()\n=+<>|" for char in text)
    return len(text) >= 4 and usual >= READABLE_SHARE * len(text) and sum(map(str.isalpha, text)) >= len(text) // 2


def _from_base64(code: str) -> str:
    code = code.rstrip("=").replace("-", "+").replace("_", "/")
    code = code[: len(code) - (len(code) % 4 == 1)]
    return _text(base64.b64decode, code + "=" * (-len(code) % 4))


def _from_base32(code: str) -> str:
    code = code.rstrip("=")
    return _text(base64.b32decode, code + "=" * (-len(code) % 8))


def _from_hex(code: str) -> str:
    digits = re.sub("[^0-9a-fA-F]", "", code.replace("\\x", "").replace("0x", ""))
    return _text(bytes.fromhex, digits[: len(digits) // 2 * 2])


def _from_binary(code: str) -> str:
    digits = re.sub("[^01]", "", code)
    return _text(bytes, [int(digits[at : at + 8], 2) for at in range(0, len(digits) - 7, 8)])


def _from_decimal(code: str) -> str:
    values = [int(value) for value in re.findall(r"\d+", code)]
    return "".join(map(chr, values)) if all(value in (9, 10, 13) or 32 <= value < 127 for value in values) else ""


def _from_morse(code: str) -> str:
    between = r"\s*[/|]\s*" if "/" in code or "|" in code else r"\s{2,}"
    words = re.split(between, code.replace("–", "-").replace("_", "-"))
    return " ".join("".join(_MORSE.get(sign, "") for sign in word.split()) for word in words)


def _text(decode: Callable[..., bytes], code: object) -> str:
    try:
        return decode(code).decode("utf-8")
    except (ValueError, binascii.Error):
        return ""


def _unescape_percent(text: str) -> str:
    return re.sub(
        "(?:%[0-9A-Fa-f]{2})+", lambda match: bytes.fromhex(match[0].replace("%", "")).decode("utf-8", "replace"), text
    )


def _unescape_unicode(text: str) -> str:
    return re.sub(
        r"\\u\{?([0-9A-Fa-f]{4})\}?|\\x([0-9A-Fa-f]{2})", lambda match: chr(int(match[1] or match[2], 16)), text
    )


_MORSE_CODE = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.."
)
_MORSE = {sign: chr(97 + index) for index, sign in enumerate(_MORSE_CODE.split())}
_CODES: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}"), _from_base64),
    (
        re.compile(r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{40,}\r?\n)+[A-Za-z0-9+/]{4,}={0,2}"),
        lambda code: _from_base64(re.sub(r"\s", "", code)),
    ),
    (re.compile(r"[A-Z2-7]{16,}={0,6}"), _from_base32),
    (re.compile(r"(?:(?:0x|\\x)?[0-9a-fA-F]{2}[ :,]?){8,}"), _from_hex),
    (re.compile(r"(?:[01]{8}[ ,]?){6,}"), _from_binary),
    (re.compile(r"(?:\d{2,3}[ ,;]{1,2}){7,}\d{2,3}"), _from_decimal),
    (re.compile(r"(?:[.\-–_]{1,4}[ /|]{1,6}){8,}[.\-–_]{1,4}"), _from_morse),
)
_ESCAPES: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (re.compile(r"&(?:#x?[0-9A-Fa-f]{2,6}|[a-z]{2,8});"), html.unescape),
    (re.compile("%[0-9A-Fa-f]{2}"), _unescape_percent),
    (re.compile(r"\\u\{?[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}"), _unescape_unicode),
)
