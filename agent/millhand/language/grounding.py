"""Judges a version of a work order that a model wrote, whoever wrote it: nothing invented gets through.

The grounds are the alert's evidence, the draft, the passages that the version cites, and what the pack knows of the
alert's kind. Every number (with its unit;
in digits or in words), id, part number and date, and every name of another asset must stand there; what does not is
struck: it gives way to `[?]`, and is listed with its field. A step, part, tool or sentence of which most words stand
nowhere in the grounds is struck whole, and so is one that speaks to a model or defeats a protection.

Identity, evidence, state and priority are the draft's whatever the version says: urgency comes from the alert's
severity, and a text that a sensor or a manual brings must not change it. The draft's steps stay: those that the version
leaves out are put back. A diagnosis is phrased anew, not replaced: a cause that has a gap, or shares no word with what
draft and pack say of the cause, is struck. Passages and evidence are texts of strangers: sentences of theirs that speak
to a model ground nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from millhand.errors import LanguageError
from millhand.language import form
from millhand.language.passages import Passage
from millhand.language.tokens import CJK, Grounds, Token, fold, tokens
from millhand.records import Citation, Struck, WorkOrder, evidence_facts

MARK = "[?]"
STRUCK_CAP, STRUCK_CHARACTERS = 50, 200
SUPPORT_LEAST = 0.5
"""Share of a text's words that must stand in the grounds."""
SUPPORT_LEAST_HAN = 0.4
"""The same of pairs of Chinese characters, of which each new joint of two words makes one that stands nowhere."""
SENTENCES = ("symptom", "likely_cause", "action")
"""Fields whose texts are sentences; a part or tool may be a short name."""
COVERED_LEAST = 0.5
"""A draft's step of which no more than this share of words stands in one step of the version is put back."""
REPEATS_FROM = 16
"""A text of so many words (pairs of characters in Chinese) repeats itself where fewer than half of them differ."""

SPEAKS_TO_A_MODEL = re.compile(
    r"\b(ignore|disregard|forget|override)\b.{0,40}\b(above|previous|prior|earlier|all|instructions?|rules?|prompt)\b"
    r"|\b(system|developer)\s+(prompt|message)\b|<\|?\w+\|?>|\bas an ai\b|\bassistant\b"
    r"|\byou are (now\b|an? (\w+ ){0,2}(ai|model|bot)\b)"
    r"|\b(set|change|lower)\b.{0,30}\bpriority\b|\bpriority\s*(=|:|is|must)"
    r"|忽略.{0,12}(指令|以上|之前|规则|提示)|无视.{0,12}(指令|以上|之前|规则|提示)|系统提示|(设置|修改|改为|降低|提高).{0,8}优先级|你现在是",
    re.IGNORECASE,
)
DEFEATS_A_PROTECTION = re.compile(
    r"\b(bypass|disabl|defeat|overrid|jumper|short out|deactivat|silenc|mut)\w*\b.{0,40}"
    r"\b(guards?|interlocks?|alarms?|protections?|safety|e-?stops?|emergency|trips?|relief)\b"
    r"|\b(turn|switch) off\b.{0,40}\b(guards?|interlocks?|alarms?|protections?)\b"
    r"|(旁路|短接|屏蔽|取消|停用).{0,12}(联锁|保护|报警|急停|安全|防护)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])")
_LATIN = re.compile(r"[A-Za-z]{4,}")
_HAN = re.compile(f"[{CJK}]+")
_STOP = frozenset(
    """
    with that this from then than them they their there these those have been were will would should could must when
    where which while what into onto over under after before until also only very more most some such each every
    both other another about between through because please make sure ensure note take look find check inspect
    verify measure replace clean order plan next stop machine asset equipment likely cause probable possible maybe
    """.split()  # noqa: SIM905 - words are read as words
)
"""Words that every step may have."""


def ground(
    version: WorkOrder,
    draft: WorkOrder,
    passages: Sequence[Passage],
    known: Sequence[str] = (),
    assets: Collection[str] = (),
) -> WorkOrder:
    """The version as it may be stored; `struck` lists what was taken out. `revision` stays the draft's.

    passages: what the reviser was given. known: what the pack says of the alert's kind, in its own words. assets: the
    names of all machines that this node knows. Raises LanguageError where the version is not of the form of an order
    at all.
    """
    try:
        version = msgspec.convert(msgspec.to_builtins(version), WorkOrder)
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as error:
        raise LanguageError(
            f"the reviser's order is not of the form: {error}", hint="report it to its author"
        ) from error
    return _Judgement(version, draft, passages, known, assets).order()


@dataclass
class _Judgement:
    version: WorkOrder
    draft: WorkOrder
    passages: Sequence[Passage]
    known: Sequence[str]
    assets: Collection[str]
    struck: list[Struck] = field(default_factory=list)

    def order(self) -> WorkOrder:
        draft, version = self.draft, self.version
        citations = self._citations()
        self._prepare({citation.id for citation in citations})
        action = self._items("action", version.action, draft.action, form.STEP_CHARACTERS, form.STEPS_CAP)
        fields: dict[str, Any] = {
            "symptom": self._prose("symptom", version.symptom, draft.symptom, form.SYMPTOM_CHARACTERS),
            "likely_cause": self._cause(),
            "action": (*action, *(step for step in draft.action if not _covered(step, action))),
            "parts": self._short("parts", version.parts, draft.parts),
            "tools": self._short("tools", version.tools, draft.tools),
            "skill": next(iter(self._short("skill", (version.skill,) if version.skill else (), (draft.skill,))), ""),
            "minutes": self._minutes(),
            "evidence_ids": self._evidence_ids(),
        }
        if version.priority != draft.priority:
            self._strike("priority", str(version.priority), "the alert's severity decides it")
        return msgspec.structs.replace(
            draft,
            **fields,
            citations=citations,
            writer=fold(version.writer)[: form.ITEM_CHARACTERS],
            revised_ns=version.revised_ns,
            struck=tuple(self.struck[:STRUCK_CAP]),
        )

    # ---- grounds ----------------------------------------------------------------------------------------------------

    def _citations(self) -> tuple[Citation, ...]:
        """Of the passages that were given; the place is the passage's own."""
        places = {passage.id: passage.place for passage in self.passages}
        kept: dict[str, Citation] = {}
        for citation in self.version.citations:
            if citation.id in places:
                kept[citation.id] = Citation(citation.id, places[citation.id])
            else:
                self._strike("citations", citation.id, "no such passage was found")
        return tuple(kept.values())

    def _prepare(self, cited: Collection[str]) -> None:
        draft = self.draft
        own = [draft.symptom, draft.likely_cause, *draft.action, *draft.parts, *draft.tools, draft.skill, *self.known]
        quoted = [_harmless(passage.text) for passage in self.passages if passage.id in cited]
        self._grounds = Grounds()
        self._grounds.add_facts(evidence_facts(draft.evidence))
        for text in (*own, draft.asset, *quoted):
            self._grounds.add_text(text)
        if draft.minutes:
            self._grounds.add_value(draft.minutes, "min")
        self._words = _words([*own, *quoted])
        # What the pack says of the fault beside causes, and the draft has in its own fields, names no cause.
        beside = _words([*draft.action, *draft.tools, *draft.parts, draft.skill])
        self._diagnosis = (_words(self.known) - beside | _words([draft.likely_cause])) - _words([draft.asset])
        said = "\n".join([*own, draft.asset, *quoted]).casefold()
        self._others = [name for name in self.assets if name != draft.asset and not _stands(name, said)]

    # ---- fields -----------------------------------------------------------------------------------------------------

    def _prose(self, name: str, text: str, known: str, characters: int) -> str:
        """Sentences, each judged; the draft's text where none is left."""
        if text == known:
            return known
        if len(text) > characters:
            self._strike(name, text, f"longer than {characters} characters")
            return known
        own = {sentence.strip() for sentence in _SENTENCE.split(fold(known))}
        found = [sentence.strip() for sentence in _SENTENCE.split(fold(text))]
        sentences = [sentence if sentence in own else self._text(name, sentence) for sentence in found]
        return ("" if _HAN.search(text) else " ").join(filter(None, dict.fromkeys(sentences))) or known

    def _cause(self) -> str:
        draft, name = self.draft, "likely_cause"
        if self.version.likely_cause == draft.likely_cause:
            return draft.likely_cause
        before = len(self.struck)
        cause = self._prose(name, self.version.likely_cause, draft.likely_cause, form.CAUSE_CHARACTERS)
        if MARK in cause:
            return draft.likely_cause  # what was struck is listed; what is left names no cause any more
        if cause != draft.likely_cause and not _words([cause]) & self._diagnosis:
            del self.struck[before:]
            self._strike(name, self.version.likely_cause, "another diagnosis than the draft's")
            return draft.likely_cause
        return cause

    def _items(
        self, name: str, items: Sequence[str], known: Sequence[str], characters: int, most: int
    ) -> tuple[str, ...]:
        kept: list[str] = []
        for place, item in enumerate(items):
            where = f"{name}[{place}]"
            if len(kept) == most:
                self._strike(where, item, f"more than {most}")
            elif item in known:
                kept.append(item)
            elif len(item) > characters:
                self._strike(where, item, f"longer than {characters} characters")
            elif text := self._text(where, fold(item)):
                kept.append(text)
        return tuple(dict.fromkeys(kept))

    def _short(self, name: str, items: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
        return self._items(name, items, known, form.ITEM_CHARACTERS, max(form.ITEMS_CAP, len(known)))

    def _minutes(self) -> int:
        minutes, draft = self.version.minutes, self.draft
        if minutes == draft.minutes or (0 < minutes <= form.MINUTES_CAP and minutes in self._grounds.minutes()):
            return minutes
        self._strike("minutes", str(minutes), "no such time stands in the draft or a citation")
        return draft.minutes

    def _evidence_ids(self) -> tuple[str, ...]:
        known = evidence_facts(self.draft.evidence)
        for fact in self.version.evidence_ids:
            if fact not in known:
                self._strike("evidence_ids", fact, "no such fact is in the evidence")
        kept = tuple(dict.fromkeys(fact for fact in self.version.evidence_ids if fact in known))
        return kept or self.draft.evidence_ids

    # ---- texts ------------------------------------------------------------------------------------------------------

    def _text(self, where: str, text: str) -> str:
        """One folded sentence or item without what is invented; empty where all of it must go."""
        why = self._fault(where, text)
        if why:
            self._strike(where, text, why)
            return ""
        for token in reversed(list(tokens(text))):
            if not self._grounds.has(token):
                self._strike(where, token.text, _why(token))
                text = f"{text[: token.start]}{MARK}{text[token.end :]}"
        for name in self._others:
            if _stands(name, text.casefold()):
                self._strike(where, name, "another machine, which stands neither in evidence nor citation")
                text = re.sub(_bounded(name), lambda _: MARK, text, flags=re.IGNORECASE)
        if _repeats(text):  # what is left of it may go round in circles where the whole did not
            self._strike(where, text, "it repeats itself")
            return ""
        return "" if _is_empty(text) else text

    def _fault(self, where: str, text: str) -> str:
        if _is_empty(text):
            return "it says nothing" if text else ""
        if SPEAKS_TO_A_MODEL.search(text):
            return "it speaks to a model, not to a technician"
        if DEFEATS_A_PROTECTION.search(text):
            return "it defeats a protection"
        if _repeats(text):
            return "it repeats itself"
        share, least = _support(text, self._words)
        if share is None and where.startswith(SENTENCES):
            return "it says nothing"
        return (
            "" if share is None or share >= least else "most of its words stand neither in the draft nor in a citation"
        )

    def _strike(self, where: str, text: str, why: str) -> None:
        self.struck.append(Struck(where, fold(text)[:STRUCK_CHARACTERS], why))


def _why(token: Token) -> str:
    what = "number" if token.values else "id"
    return f"this {what} stands neither in evidence, draft nor citation"


def _harmless(text: str) -> str:
    """A stranger's text without the sentences that speak to a model."""
    sentences = _SENTENCE.split(text.replace("\n", " "))
    return " ".join(sentence for sentence in sentences if not SPEAKS_TO_A_MODEL.search(sentence))


def _words(texts: Iterable[str]) -> set[str]:
    """Words that say something, without their endings, and pairs of Chinese characters."""
    found: set[str] = set()
    for text in texts:
        found |= {_stem(word) for word in _LATIN.findall(text.replace("_", " ")) if word.lower() not in _STOP}
        for run in _HAN.findall(text):
            found |= {run[place : place + 2] for place in range(max(1, len(run) - 1))}
    return found


def _stem(word: str) -> str:
    word = word.lower()
    for ending in ("ings", "ing", "ion", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def _support(text: str, known: set[str]) -> tuple[float | None, float]:
    """Which share of the text's words is known, None where it has none, and how much it must be; numbers and ids are
    judged apart.
    """
    least = SUPPORT_LEAST_HAN if _HAN.search(text) else SUPPORT_LEAST
    for token in reversed(list(tokens(text))):
        text = f"{text[: token.start]} {text[token.end :]}"
    words = _words([text])
    return (len(words & known) / len(words) if words else None), least


def _covered(step: str, steps: Sequence[str]) -> bool:
    """Whether most of what a step says is said by one of these."""
    words = _words([step])
    return step in steps or any(len(words & _words([other])) > COVERED_LEAST * len(words) for other in steps)


def _repeats(text: str) -> bool:
    """Whether it goes round in circles, as small models do."""
    spoken = [text[place : place + 2] for place in range(len(text))] if _HAN.search(text) else text.casefold().split()
    return len(spoken) >= REPEATS_FROM and len(set(spoken)) < 0.5 * len(spoken)


def _is_empty(text: str) -> bool:
    return not re.search(r"[^\W_]", text.replace(MARK, ""))


def _bounded(name: str) -> str:
    return rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"


def _stands(name: str, text: str) -> bool:
    return re.search(_bounded(name.casefold()), text) is not None
