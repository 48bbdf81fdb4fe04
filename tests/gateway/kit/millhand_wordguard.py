"""A plugin with guards that look for words, in each of the ways that a guard may work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from millhand.hookspecs import hookimpl
from millhand.language.guarding import GuardContext, Stage, Verdict

REFUSED, STARRED, RAISES = "FORBIDDEN", "hunter2", "EXPLODE"


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    policy: str = ""
    whole: bool = False
    """Judge only whole answers."""


def verdict(text: str) -> Verdict:
    if RAISES in text:
        raise RuntimeError("the guard is broken")
    if REFUSED in text:
        return Verdict(action="refuse", text=text, rule="words.forbidden", reason="a forbidden word")
    if STARRED in text:
        return Verdict(action="change", text=text.replace(STARRED, "***"), rule="words.starred", reason="a password")
    return Verdict(action="pass", text=text)


class WordGuard:
    name = "words"
    stages: Sequence[Stage] = ("input", "output")

    def check(self, stage: Stage, text: str, context: GuardContext) -> Verdict:
        return verdict(text)


class WordStream:
    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> Verdict:
        text, self._held = self._held + text, ""
        found = verdict(text)
        if found.action != "pass":
            return found
        for size in range(min(len(text), 8), 0, -1):
            if any(word.startswith(text[-size:]) for word in (REFUSED, STARRED)):
                self._held = text[-size:]
                return Verdict(action="pass", text=text[:-size])
        return found

    def finish(self) -> Verdict:
        return verdict(self._held)


class StreamingWordGuard(WordGuard):
    def stream(self, context: GuardContext) -> WordStream:
        return WordStream()


class PolicyGuard:
    name = "policy"
    stages: Sequence[Stage] = ("model",)

    def __init__(self, policy: str) -> None:
        self._policy = policy

    def check(self, stage: Stage, text: str, context: GuardContext) -> Verdict:
        if "forbidden_tool" in context.tools:
            return Verdict(action="refuse", text=text, rule="tools.unknown", reason="this tool is not allowed")
        told = f"{self._policy} {text}".strip()
        return Verdict(action="change" if self._policy else "pass", text=told, rule="policy.told")


@hookimpl
def millhand_config() -> type[BaseModel]:
    return Options


@hookimpl
def millhand_guards(config: Any) -> Sequence[Any]:
    return [WordGuard() if config.whole else StreamingWordGuard(), PolicyGuard(config.policy)]
