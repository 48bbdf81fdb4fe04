"""Calls the guards: on what comes in, what the model is told, and what goes out. Decisions are counted and kept."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from millhand.errors import RefusedError
from millhand.hookspecs import Complete, ConsideringGuard, Guard, StreamingGuard
from millhand.language.guarding import AnswerStream, GuardContext, Part, Stage, Verdict
from millhand.serving.openai.metrics import GUARD_DECISIONS

if TYPE_CHECKING:
    from millhand.serving.openai.asked import Asked
    from millhand.serving.openai.audit import Audit

log = logging.getLogger("millhand.gateway")

LONG_CHARS = 20_000
"""A longer text is judged in a thread: it costs some tens of milliseconds, and a megabyte seconds."""
BROKEN = "guard.error"
"""The rule that speaks where a guard raises."""


class Refused(RefusedError):
    """A guard refused; the message is its reason."""

    def __init__(self, guard: str, stage: Stage, verdict: Verdict) -> None:
        what = {"input": "the request", "model": "what the model is told", "output": "the answer"}[stage]
        super().__init__(
            f"{what} was refused: {verdict.reason or verdict.rule} [{guard}: {verdict.rule}]",
            hint="ask in other words; the node's owner sets [plugins.guard]" if stage == "input" else "",
        )


class Guards:
    """The guards of this process, in order; each sees what the one before it let through."""

    def __init__(self, guards: Iterable[Guard], audit: Audit) -> None:
        self._guards = tuple(guards)
        self._audit = audit

    @property
    def none(self) -> bool:
        """Whether there are no guards at all."""
        return not self._guards

    def at(self, stage: Stage) -> list[Guard]:
        """Those that are asked in a stage."""
        return [guard for guard in self._guards if stage in guard.stages]

    def session(
        self, context: GuardContext, caller: str, complete: Complete, parts: Sequence[Part] = ()
    ) -> GuardSession:
        """Begin with one request. parts: stretches of its texts from elsewhere, judged by their own source."""
        return GuardSession(self, self._audit, context, caller, complete, parts)


class GuardSession:
    """One request before the guards. Every method raises Refused."""

    def __init__(
        self,
        guards: Guards,
        audit: Audit,
        context: GuardContext,
        caller: str,
        complete: Complete,
        parts: Sequence[Part] = (),
    ) -> None:
        self._guards = guards
        self._audit = audit
        self._caller = caller
        self._complete = complete
        self._parts = parts
        self.context = context

    async def admit(self, asked: Asked) -> None:
        """Look at a request: every text of it, then what the model is told. What guards change is changed in it."""
        if self._guards.at("input"):
            for part in self._parts:
                seen = await self._judge("input", part.text, dataclasses.replace(self.context, source=part.source))
                if seen != part.text:
                    asked.exchange(part.text, seen)
            for role, text, holder, key in list(asked.inputs()):
                seen = await self._judge("input", text, _of(self.context, role))
                if seen != text:
                    asked.change(holder, key, seen)
        if self._guards.at("model") and asked.endpoint != "embeddings":
            told = "\n\n".join(asked.system())
            prompt = await self._judge("model", told, self.context)
            if prompt != told:
                asked.set_system(prompt)
        prompts = tuple(text for text in asked.system() if text)
        self.context = dataclasses.replace(self.context, secrets=prompts)

    async def part(self, part: Part) -> str | None:
        """Look at one text by its own source: as it may go on, None where it must not."""
        try:
            return await self._judge("input", part.text, dataclasses.replace(self.context, source=part.source))
        except Refused:
            return None

    async def answer(self, text: str) -> str:
        """Look at a whole answer; returns what may go out."""
        return await self._judge("output", text, self.context)

    def stream(self) -> GuardedStream:
        """Begin with an answer that comes piece by piece."""
        return GuardedStream(self, self._guards.at("output"))

    async def _judge(self, stage: Stage, text: str, context: GuardContext) -> str:
        for guard in self._guards.at(stage):
            check: Callable[[], Verdict] = partial(guard.check, stage, text, context)
            if len(text) > LONG_CHARS:
                check = await _checked_aside(check)
            text = self.ask(guard.name, stage, text, context, check).text
            if isinstance(guard, ConsideringGuard):
                text = await self._consider(guard, stage, text, context)
        return text

    async def _consider(self, guard: ConsideringGuard, stage: Stage, text: str, context: GuardContext) -> str:
        try:
            verdict = await guard.consider(stage, text, context, self._complete)
        except Exception as error:
            verdict = _broken(guard.name, text, error)
        return self._settle(guard.name, stage, verdict, text, context).text

    def ask(
        self, guard: str, stage: Stage, text: str, context: GuardContext, question: Callable[[], Verdict]
    ) -> Verdict:
        """Ask one guard; one that raises counts as a refusal."""
        try:
            verdict = question()
        except Exception as error:
            verdict = _broken(guard, text, error)
        return self._settle(guard, stage, verdict, text, context)

    def _settle(self, guard: str, stage: Stage, verdict: Verdict, text: str, context: GuardContext) -> Verdict:
        self.note(guard, stage, verdict, text, context)
        if verdict.action == "refuse":
            raise Refused(guard, stage, verdict)
        return verdict

    def note(self, guard: str, stage: Stage, verdict: Verdict, text: str, context: GuardContext) -> None:
        """Count a decision and keep it."""
        GUARD_DECISIONS.inc(guard=guard, rule=verdict.rule, action=verdict.action, stage=stage)
        self._audit.write(guard, stage, verdict, text, context, self._caller)


class GuardedStream:
    """One text of an answer on its way through all guards that judge streams."""

    def __init__(self, session: GuardSession, guards: Iterable[Guard]) -> None:
        self._session = session
        self._text = ""
        self._changed: set[str] = set()
        self._streams: list[tuple[str, AnswerStream]] = [
            (guard.name, guard.stream(session.context) if isinstance(guard, StreamingGuard) else _Whole(guard, session))
            for guard in guards
        ]

    def feed(self, text: str) -> str:
        """Take the next piece; returns what may go out now. Raises Refused."""
        self._text += text
        for name, stream in self._streams:
            if text:
                text = self._settled(name, self._asked(name, text, lambda: stream.feed(text)))  # noqa: B023
        return text

    def finish(self) -> str:
        """The text has ended: what was held and may go out. Raises Refused."""
        text = ""
        for name, stream in self._streams:
            fed = self._settled(name, self._asked(name, text, lambda: stream.feed(text))) if text else ""  # noqa: B023
            text = fed + self._settled(name, self._asked(name, "", stream.finish))
        for name, _ in self._streams:
            if name not in self._changed:
                passed = Verdict(action="pass", text=self._text)
                self._session.note(name, "output", passed, self._text, self._session.context)
        return text

    def _asked(self, name: str, text: str, question: Callable[[], Verdict]) -> Verdict:
        try:
            return question()
        except Exception as error:
            return _broken(name, text, error)

    def _settled(self, name: str, verdict: Verdict) -> str:
        """What of a verdict goes on. Passing pieces are no decision by themselves: the answer is counted at its end."""
        if verdict.action != "pass":
            self._changed.add(name)
            self._session.note(name, "output", verdict, self._text, self._session.context)
        if verdict.action == "refuse":
            raise Refused(name, "output", verdict)
        return verdict.text


class _Whole:
    """Makes a stream of a guard that must see the whole answer: everything waits for the end."""

    def __init__(self, guard: Guard, session: GuardSession) -> None:
        self._guard = guard
        self._session = session
        self._text = ""

    def feed(self, text: str) -> Verdict:
        self._text += text
        return Verdict(action="pass", text="")

    def finish(self) -> Verdict:
        return self._guard.check("output", self._text, self._session.context)


async def _checked_aside(check: Callable[[], Verdict]) -> Callable[[], Verdict]:
    """What a guard says, asked in a thread so that other requests go on; raises it where it raised."""
    (found,) = await asyncio.gather(asyncio.to_thread(check), return_exceptions=True)

    def say() -> Verdict:
        if isinstance(found, BaseException):
            raise found
        return found

    return say


def _of(context: GuardContext, role: str) -> GuardContext:
    """The context of one message: what a tool brought is a retrieved text, whoever sends it along."""
    return dataclasses.replace(context, source="knowledge") if role == "tool" else context


def _broken(guard: str, text: str, error: Exception) -> Verdict:
    log.error("guard %s raised %s: %s; what it was asked about is refused", guard, type(error).__name__, error)
    return Verdict(action="refuse", text=text, rule=BROKEN, reason="a guard of this node failed")
