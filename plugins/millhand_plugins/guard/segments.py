"""Cuts an answer into segments that no finding crosses, the same ones whether it comes whole or in pieces.

A segment ends after white space, or after a character of a script without spaces, unless the word before could belong
to what follows: it holds a digit (groups of a number), ends in `:` or `=` (a key and its value), or begins a private
key. It always ends with a line, but for private keys. So ordinary words go out when they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u3001-\u303f\uff00-\uff65]"
    r"|\s+|[^\s\u3001-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uff65]+"
)
GLUE_WORDS = frozenset(
    {"bearer", "is", "lautet", "key", "token", "(", "+", "tel", "tel.", "phone", "mobile", "call", "telefon", "handy"}
    | {"api", "secret", "access", "private"}
)
CAREFUL_STARTS = GLUE_WORDS | {"pass", "pwd", "kennwort", "ey", "sk", "pk", "rk", "gh", "gl", "hf"}
CAREFUL_STARTS |= {"akia", "asia", "aiza", "xox"}
GLUE_GLYPHS = "是为密码口令钥电话手机：:"
KEY_BEGIN, KEY_END, KEY_CLOSES = "-----BEGIN", "-----END", "KEY-----"
SEGMENT_CAP = 4096
"""A segment ends here whatever stands there: nothing is held for ever."""


class Segments:
    """Feed pieces, get segments. `feed` and `finish` give together exactly the text that came in."""

    def __init__(self) -> None:
        self._held = ""
        self._first = True
        self._begun = False

    def feed(self, text: str) -> Iterator[str]:
        """Segments that are complete now."""
        self._held += text
        if self._first:
            letters = _leading_letters(self._held)
            ended = letters < len(self._held)
            careful = not self._begun and _careful(self._held[:letters])
            if careful and not ended:
                return
            if letters and not careful:
                # The first word goes out letter by letter: the time to the first token is what people feel.
                yield self._held[:letters]
                self._held = self._held[letters:]
                self._begun = True
            self._first = not ended
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
        if not (char.isascii() and char.isalpha()):
            return index
    return len(text)


def _careful(word: str) -> bool:
    """Whether it may become a secret, or a word before one. What may not, may not with more letters either."""
    lowered = word.lower()
    return any(start.startswith(lowered) or lowered.startswith(start) for start in CAREFUL_STARTS)


def _cuts(text: str) -> Iterator[int]:
    """Where segments end. The last word may still grow, and so does white space: neither ends one."""
    start, glued, key = 0, False, ""
    for match in WORD.finditer(text):
        word = match[0]
        if match.end() == len(text) and not _is_glyph(word):
            return
        if match.end() - start > SEGMENT_CAP:
            yield match.end()
            start, glued, key = match.end(), False, ""
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
            key = _key_state(key, word)
            glued = _glues(word)


def _key_state(state: str, word: str) -> str:
    """Where a private key stands after a word: not in one, in it, or in its last line."""
    if KEY_BEGIN in word:
        return KEY_BEGIN
    if state and KEY_END in word:
        return KEY_END
    return "" if state == KEY_END and KEY_CLOSES in word else state


def _is_glyph(word: str) -> bool:
    return len(word) == 1 and (
        "\u3001" <= word <= "\u9fff" or "\uac00" <= word <= "\ud7af" or "\uff00" <= word <= "\uff65"
    )


def _glues(word: str) -> bool:
    return word[-1] in ":=" or word.lower() in GLUE_WORDS or any(map(str.isdigit, word)) or "KEY-" in word
