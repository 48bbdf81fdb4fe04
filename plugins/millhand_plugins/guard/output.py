"""The third line: what goes out. System prompts, secrets, personal data, and numbers that nothing supports."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache

from millhand.errors import MillhandError
from millhand.hookspecs import Complete
from millhand.language.guarding import GuardContext, Stage, Verdict
from millhand_plugins.guard.grounds import Grounds
from millhand_plugins.guard.personal import masked, personal_data, secrets
from millhand_plugins.guard.readings import clean, hidden_in
from millhand_plugins.guard.segments import Segments
from millhand_plugins.guard.settings import OutputTable

LEAK_REASON = "the answer repeats the system prompt"
DOUBTED = "the model itself does not find the answer in what was retrieved"


class OutputGuard:
    name = "guard.output"
    stages: Sequence[Stage] = ("output",)

    def __init__(self, settings: OutputTable) -> None:
        self._settings = settings

    def stream(self, context: GuardContext) -> OutputStream:
        return OutputStream(self._settings, context)

    def check(self, stage: Stage, text: str, context: GuardContext) -> Verdict:
        """The same as the stream of the text in one piece."""
        stream = self.stream(context)
        verdicts: list[Verdict] = []
        while len(verdicts) < 2:
            verdict = stream.finish() if verdicts else stream.feed(text)
            if verdict.action == "refuse":
                return Verdict(action="refuse", text=text, rule=verdict.rule, reason=verdict.reason)
            verdicts.append(verdict)
        speaking = next((verdict for verdict in verdicts if verdict.action == "change"), verdicts[0])
        left = "".join(verdict.text for verdict in verdicts)
        return Verdict(action=speaking.action, text=left, rule=speaking.rule, reason=speaking.reason)

    async def consider(self, stage: Stage, text: str, context: GuardContext, complete: Complete) -> Verdict:
        """Asks the model whether a grounded answer rests on its grounds. Without an opinion the text passes."""
        passed = Verdict(action="pass", text=text)
        if not (self._settings.second_opinion and context.grounds and text.strip()):
            return passed
        if complete.parameters < self._settings.second_opinion_parameters:
            return passed
        question = (
            "Sources:\n" + "\n".join(context.grounds) + f"\n\nAnswer:\n{text}\n\n"
            "Does everything in the answer follow from the sources? Reply with yes or no."
        )
        schema = {"type": "string", "enum": ["yes", "no"]}
        try:
            opinion = await complete([{"role": "user", "content": question}], schema=schema, max_tokens=8)
        except MillhandError:
            return passed
        if opinion.strip().strip('"').lower() != "no":
            return passed
        return Verdict(action="refuse", text=text, rule="grounds.second_opinion", reason=DOUBTED)


class OutputStream:
    """One answer, piece by piece."""

    def __init__(self, settings: OutputTable, context: GuardContext) -> None:
        self._settings = settings
        self._context = context
        self._segments = Segments()
        watched = context.secrets if settings.leak == "refuse" else ()
        self._leak = Leak(watched, context.grounds, settings.leak_chars) if watched else None
        self._grounds = _grounds(context.grounds) if context.grounds and settings.unsupported != "pass" else None
        self._line_start = True
        self._quoted = "\n".join(context.grounds)

    def feed(self, text: str) -> Verdict:
        if self._leak and self._leak.feed(text):
            return Verdict(action="refuse", text="", rule="leak.prompt", reason=LEAK_REASON)
        return self._judge(self._segments.feed(text))

    def finish(self) -> Verdict:
        return self._judge(self._segments.finish())

    def _judge(self, segments: Iterable[str]) -> Verdict:
        out, rule, reason = [], "", ""
        for segment in segments:
            verdict = self._segment(segment)
            if verdict.action == "refuse":
                return verdict
            if verdict.action == "change" and not rule:
                rule, reason = verdict.rule, verdict.reason
            out.append(verdict.text)
            self._line_start = "\n" in segment or (self._line_start and segment.isspace())
        return Verdict(action="change" if rule else "pass", text="".join(out), rule=rule, reason=reason)

    def _segment(self, segment: str) -> Verdict:
        if self._leak and len(segment) > self._settings.leak_chars and self._leak.hidden(segment):
            return Verdict(action="refuse", text="", rule="leak.prompt", reason=LEAK_REASON)
        text, rule, reason = segment, "", ""
        for name, find, action in (
            ("secrets.masked", secrets, self._settings.secrets),
            ("personal.masked", personal_data, self._settings.personal),
        ):
            if action == "pass":
                continue
            text, kind = masked(text, find(text), self._quotes)
            if kind and action == "refuse":
                rule = name.replace("masked", "refused")
                return Verdict(action="refuse", text="", rule=rule, reason=f"the answer holds: {kind}")
            if kind and not rule:
                rule, reason = name, f"masked: {kind}"
        if self._grounds:
            text, kind = self._grounds.unsupported(text, self._line_start, self._replace)
            if kind and not rule:
                rule, reason = f"grounds.{kind}", f"a {kind} stands in nothing that was retrieved"
        return Verdict(action="change" if rule else "pass", text=text, rule=rule, reason=reason)

    def _quotes(self, found: str) -> bool:
        """Whether it stands in a passage: a manual's service number may be told."""
        return bool(self._quoted) and found in self._quoted

    def _replace(self, kind: str, found: str) -> str:
        return "[unverified]" if self._settings.unsupported == "strike" else f"{found} [unverified]"


class Leak:
    """Looks for stretches of secret texts: letters and digits alone, whatever stands between them."""

    def __init__(self, texts: tuple[str, ...], grounds: tuple[str, ...], chars: int) -> None:
        self._chars = chars
        self._stretches = _stretches(texts, grounds, chars)
        self._tail = ""

    def feed(self, text: str) -> bool:
        """Whether the answer up to here repeats a secret."""
        letters = self._tail + _letters(text)
        self._tail = letters[max(0, len(letters) - self._chars + 1) :]
        return self._within(letters)

    def hidden(self, segment: str) -> bool:
        """Whether a segment holds a secret in code."""
        return any(self._within(_letters(found)) for found in hidden_in(segment))

    def _within(self, letters: str) -> bool:
        size = self._chars
        return any(letters[at : at + size] in self._stretches for at in range(len(letters) - size + 1))


def _letters(text: str) -> str:
    """Letters and digits, folded one by one, so that pieces give the same as the whole."""
    if not text.isascii():
        text = "".join(map(_folded, text))
    return "".join(filter(str.isalnum, text.lower()))


@lru_cache(4096)
def _folded(char: str) -> str:
    return clean(char)


@lru_cache(64)
def _stretches(texts: tuple[str, ...], grounds: tuple[str, ...], chars: int) -> frozenset[str]:
    """Stretches of the secrets, also backwards and in rot13, less those that the retrieved texts hold as well."""
    found: set[str] = set()
    for text in texts:
        letters = _letters(text)
        size = min(chars, len(letters)) if len(letters) >= chars else 0
        for form in (letters, letters[::-1], codecs.encode(letters, "rot13")) if size else ():
            found.update(form[at : at + chars] for at in range(len(form) - chars + 1))
    open_letters = _letters("\n".join(grounds))
    found.difference_update(open_letters[at : at + chars] for at in range(len(open_letters) - chars + 1))
    return frozenset(found)


@lru_cache(64)
def _grounds(texts: tuple[str, ...]) -> Grounds:
    return Grounds(texts)
