"""The first line: what clients, retrieved passages and order fields may say to the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

from millhand.language.guarding import GuardContext, Stage, Verdict
from millhand.language.pack import GuardTerms
from millhand_plugins.guard.detector import Detector, Forbidden
from millhand_plugins.guard.personal import masked, personal_data
from millhand_plugins.guard.settings import InputTable

REMOVED = "[removed by the guard]"
PIECE = re.compile(r"<!--.*?-->|[^.!?。！？\n<]+[.!?。！？]*\s*|.", re.DOTALL)
NEIGHBOURS = 3
"""An attack may be spread over so many sentences; more are cut out with the whole text."""
KNOWN_TEXTS = 8192
KNOWN_CHARS = 20_000


class InputGuard:
    """Refuses a client's attack; cuts attacks out of what is data: passages, sensor names, fields of orders."""

    name = "guard.input"
    stages: Sequence[Stage] = ("input",)

    def __init__(self, settings: InputTable, field: GuardTerms) -> None:
        self._settings = settings
        self._detector = Detector(settings, field)
        self._forbidden = Forbidden(field)
        self._known: dict[bytes, None] = {}

    def check(self, stage: Stage, text: str, context: GuardContext) -> Verdict:
        if len(text) > self._settings.chars_cap:
            reason = f"the text has {len(text)} characters, {self._settings.chars_cap} are allowed"
            return Verdict(action="refuse", text=text, rule="size.chars", reason=reason)
        if context.source == "agent":
            return Verdict(action="pass", text=text)
        key = _key(text, context) if len(text) <= KNOWN_CHARS else b""
        if key in self._known:
            return Verdict(action="pass", text=text)
        verdict = self._client(text) if context.source == "client" else self._data(text)
        if verdict.action == "pass" and key:
            self._remember(key)
        return verdict

    def _client(self, text: str) -> Verdict:
        attack = None
        if self._settings.attacks == "refuse":
            attack = self._forbidden.attack(text) or self._detector.attack(text)
        if attack:
            return Verdict(action="refuse", text=text, rule=attack.rule, reason=attack.reason)
        if self._settings.personal == "pass":
            return Verdict(action="pass", text=text)
        hidden, kind = masked(text, personal_data(text))
        if not kind:
            return Verdict(action="pass", text=text)
        rule = f"personal.{kind.replace(' ', '_').replace('-', '_')}"
        if self._settings.personal == "refuse":
            return Verdict(action="refuse", text=text, rule=rule, reason=f"it holds personal data: {kind}")
        return Verdict(action="change", text=hidden, rule=rule, reason=f"personal data was masked: {kind}")

    def _data(self, text: str) -> Verdict:
        """Without the sentences that attack; the whole text where no sentence can be named."""
        attack = self._detector.attack(text)
        if attack is None:
            return Verdict(action="pass", text=text)
        left = text
        for width in range(1, NEIGHBOURS + 1):
            left = self._without_attacks(left, width)
            if self._detector.attack(left) is None:
                break
        else:
            left = REMOVED
        return Verdict(action="change", text=left, rule=attack.rule, reason=f"cut out of the data: {attack.reason}")

    def _without_attacks(self, text: str, width: int) -> str:
        pieces = PIECE.findall(text)
        bad: set[int] = set()
        for start in range(len(pieces) - width + 1):
            if self._detector.attack("".join(pieces[start : start + width])):
                bad.update(range(start, start + width))
        kept = [None if index in bad else piece for index, piece in enumerate(pieces)]
        return "".join(
            piece if piece is not None else _gap(pieces[index]) if index == 0 or kept[index - 1] is not None else ""
            for index, piece in enumerate(kept)
        ).strip()

    def _remember(self, key: bytes) -> None:
        """A chat sends its whole past with each turn: what has passed is not read again."""
        if len(self._known) >= KNOWN_TEXTS:
            self._known.pop(next(iter(self._known)))
        self._known[key] = None


def _gap(piece: str) -> str:
    """What stands in the place of a piece; a line that ended there ends still."""
    return f"{REMOVED}\n" if piece.endswith("\n") else f"{REMOVED} "


def _key(text: str, context: GuardContext) -> bytes:
    return blake2b(f"{context.source}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
