"""Cuts an answer into segments that no finding crosses, the same ones whether it comes whole or in pieces.

A segment ends after white space, or after a character of a script without spaces, unless the word before could belong
to what follows: it holds a digit (groups of a number), ends in `:` or `=` (a key and its value), or begins a private
key. It always ends with a line, but for private keys. So ordinary words go out when they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u3001-\u303f\uff00-\uff65]|\s+|[^\s\u3001-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uff65]+")  # fmt: skip
GLUE_WORDS = ("bearer", "is", "lautet", "key", "key:", "token", "(", "+", "tel", "tel.", "tel:", "phone", "telefon", "api", "secret", "access", "private")  # fmt: skip
GLUE_GLYPHS = "是为密码口令钥电话手机：:"
KEY_BEGIN, KEY_END = "-----BEGIN", "-----END"
SEGMENT_CAP = 4096
"""A segment ends here whatever stands there: nothing is held for ever."""


class Segments:
    """Feed pieces, get segments. `feed` and `finish` give together exactly the text that came in."""

    def __init__(self) -> None:
        self._held = ""
        self._first = True

    def feed(self, text: str) -> Iterator[str]:
        """Segments that are complete now."""
        if self._first:
            text = self._held + text
            self._held = ""
            letters = _leading_letters(text)
            if letters == len(text):
                # The first word goes out at once: the time to the first token is what people feel.
                yield text
                return
            self._first = False
            if letters:
                yield text[:letters]
            text = text[letters:]
        self._held += text
        if "\n" not in text and not text[-1:].isspace() and len(self._held) == len(text) and len(text) < 2:
            return
        end = 0
        for cut in _cuts(self._held):
            yield self._held[end:cut]
            end = cut
        self._held = self._held[end:]

    def finish(self) -> Iterator[str]:
        if self._held:
            yield self._held
        self._held = ""


def _leading_letters(text: str) -> int:
    for index, char in enumerate(text):
        if not char.isalpha():
            return index
    return len(text)


def _cuts(text: str) -> Iterator[int]:
    """Where segments end. The last word may still grow, and so does white space: neither ends one."""
    start, glued, key = 0, False, False
    for match in WORD.finditer(text):
        word = match[0]
        if match.end() == len(text) and not _is_glyph(word):
            return
        if match.end() - start > SEGMENT_CAP:
            yield match.end()
            start, glued, key = match.end(), False, False
        elif word.isspace():
            if not key and ("\n" in word or not glued):
                yield match.end()
                start, glued = match.end(), False
        elif _is_glyph(word):
            glued = word in GLUE_GLYPHS
            if not glued and not key:
                yield match.end()
                start = match.end()
        else:
            key = (key or KEY_BEGIN in word) and KEY_END not in word
            glued = _glues(word)


def _is_glyph(word: str) -> bool:
    return len(word) == 1 and (
        "\u3001" <= word <= "\u9fff" or "\uac00" <= word <= "\ud7af" or "\uff00" <= word <= "\uff65"
    )


def _glues(word: str) -> bool:
    return word[-1] in ":=" or word.lower() in GLUE_WORDS or any(map(str.isdigit, word)) or "KEY-" in word
