"""Makes a better version of an order with the node's language model: a small model chooses, a large one writes.

A model below `SMALL_PARAMETERS` repeats the symptom as the cause and calls everything urgent or nothing (SmolLM2-135M
did in trials), yet it ranks texts and phrases a sentence. So it is asked for one short thing at a time: which of the
pack's causes, which further step, one sentence of what is seen; sentence patterns and the pack's terms make the order
of that. A larger model writes the whole order as JSON by schema. Neither sets the priority.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from millhand.errors import LanguageError
from millhand.language import form
from millhand.language.client import SMALL_PARAMETERS
from millhand.records import Alert, Citation, WorkOrder, evidence_facts

if TYPE_CHECKING:
    from millhand.hookspecs import Complete
    from millhand.language.pack import Pack
    from millhand.language.passages import Passage

PASSAGE_CHARACTERS, PASSAGES_SMALL = 300, 1
FACTS_CAP, FACTS_SMALL, HISTORY_CAP = 24, 6, 5
ORDER_TOKENS, SENTENCE_TOKENS = 900, 40
STEPS_CAP = 7
"""Further steps that a small model chooses from."""
STEP = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+(?P<step>\S.{9,300}?)\s*$", re.MULTILINE)
"""A step of a manual: an item of a list."""


class Phrases(NamedTuple):
    """Fixed sentence patterns around what a small model chose, and the names of the fields that it is asked for."""

    cause: str
    cause_field: str
    step_field: str
    symptom_field: str
    none: str


PHRASES = {
    "en": Phrases("{known} Most likely: {cause}", "likeliest cause", "most useful further step", "symptom", "none"),
    "zh": Phrases("{known}最可能的原因：{cause}", "最可能的原因", "最有用的补充步骤", "现象", "无"),
}


@dataclass(frozen=True)
class Question:
    """What one order's questions share."""

    draft: WorkOrder
    alert: Alert
    history: Sequence[Alert]
    passages: Sequence[Passage]
    pack: Pack
    complete: Complete

    @property
    def phrases(self) -> Phrases:
        return PHRASES[self.draft.language]

    @property
    def seen(self) -> dict[str, str]:
        """What a small model is shown, the same for each question: the server has read it already then."""
        return {
            "symptom": self.draft.symptom,
            "evidence": _facts(self.draft, FACTS_SMALL),
            "sources": _sources(self.passages[:PASSAGES_SMALL]),
        }

    def messages(self, prompt: str, **values: str) -> list[Mapping[str, str]]:
        """The pack's policy and one of its prompts, in the order's language."""
        language = self.draft.language
        return [
            {"role": "system", "content": self.pack.prompt("policy", language)},
            {"role": "user", "content": self.pack.prompt(prompt, language, asset=self.draft.asset, **values)},
        ]


class ModelReviser:
    """The reviser `model`."""

    name = "model"

    def __init__(self, temperature: float = 0.0, seed: Callable[[WorkOrder], int] = lambda _: 0) -> None:
        self._temperature = temperature
        self._seed = seed

    async def revise(
        self,
        draft: WorkOrder,
        alert: Alert,
        history: Sequence[Alert],
        passages: Sequence[Passage],
        pack: Pack,
        complete: Complete,
    ) -> WorkOrder:
        """A new version. Raises LanguageError where the model's answer is not of the form, and what `complete` does."""
        question = Question(draft, alert, history, passages, pack, complete)
        if complete.parameters < SMALL_PARAMETERS:
            return await self._chosen(question)
        return await self._written(question)

    # ---- a small model ----------------------------------------------------------------------------------------------

    async def _chosen(self, question: Question) -> WorkOrder:
        draft, language = question.draft, question.draft.language
        version = msgspec.structs.replace(draft, **_needs(question), **await self._cause(question))
        steps = {
            step: passage for passage in question.passages for step in _steps(passage) if step not in version.action
        }
        if steps:
            chosen = await self._choose(
                question, question.phrases.step_field, [*list(steps)[:STEPS_CAP], question.phrases.none]
            )
            if chosen in steps:
                passage = steps[chosen]
                cited = (*version.citations, Citation(passage.id, passage.place))
                version = msgspec.structs.replace(version, action=(*version.action, chosen), citations=cited)
        if language == "en":  # models this small write no Chinese worth reading
            sentence = await self._sentence(question)
            version = msgspec.structs.replace(version, symptom=f"{draft.symptom} {sentence}".strip())
        return version

    async def _cause(self, question: Question) -> dict[str, Any]:
        """One of the pack's causes, and the words of the order that follow from it."""
        fault = question.pack.faults.get(question.alert.kind)
        if fault is None or len(fault.causes) < 2:
            return {}
        causes = [question.pack.say(cause.text, question.draft.language) for cause in fault.causes]
        chosen = await self._choose(question, question.phrases.cause_field, causes)
        known = question.draft.likely_cause
        return {"likely_cause": question.phrases.cause.format(known=known, cause=chosen)}

    async def _choose(self, question: Question, field: str, candidates: Sequence[str]) -> str:
        """The candidate that fits best: by its likelihood, or by an enumeration where the server tells none."""
        messages = question.messages("choose", field=field, **question.seen)
        if self._temperature == 0:
            try:
                scores = await question.complete.score(messages, candidates)
                return max(zip(scores, candidates, strict=True), key=lambda pair: pair[0])[1]
            except LanguageError as error:
                if error.retriable:
                    raise
        schema = {
            "type": "object",
            "properties": {"text": {"type": "string", "enum": list(candidates)}},
            "required": ["text"],
            "additionalProperties": False,
        }
        return self._member(await self._ask(question, messages, schema, 4 * SENTENCE_TOKENS), candidates)

    def _member(self, answer: str, candidates: Sequence[str]) -> str:
        text = _text_of(answer)
        if text not in candidates:
            raise LanguageError("the model chose what was no candidate", hint="ask it again")
        return text

    async def _sentence(self, question: Question) -> str:
        """What is seen, in one sentence of the model's own; a sentence that was cut off is left out."""
        messages = question.messages("field", field=question.phrases.symptom_field, **question.seen)
        answer = await self._ask(question, messages, None, SENTENCE_TOKENS)
        sentence = re.match(r"\s*(.+?[.!])(?:\s|$)", answer, re.DOTALL)
        return " ".join(sentence[1].split()) if sentence else ""

    # ---- a large model ----------------------------------------------------------------------------------------------

    async def _written(self, question: Question) -> WorkOrder:
        draft, passages = question.draft, question.passages
        facts = evidence_facts(draft.evidence)
        schema = form.schema(list(facts), [passage.id for passage in passages])
        messages = question.messages(
            "order", draft=json.dumps(_draft_fields(draft), ensure_ascii=False), evidence=_facts(draft, FACTS_CAP),
            history=_history(question.history), sources=_sources(passages),
        )  # fmt: skip
        text = form.read_text(await self._ask(question, messages, schema, ORDER_TOKENS))
        places = {passage.id: passage.place for passage in passages}
        citations = tuple(Citation(id, places.get(id, "")) for id in text.citations)
        fields = {name: getattr(text, name) for name in text.__struct_fields__ if name != "citations"}
        return msgspec.structs.replace(draft, **fields, citations=citations)

    async def _ask(
        self, question: Question, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None, tokens: int
    ) -> str:
        return await question.complete(
            messages, schema=schema, max_tokens=tokens, temperature=self._temperature, seed=self._seed(question.draft)
        )


def _needs(question: Question) -> dict[str, Any]:
    """What the pack adds where the writer's table had nothing: steps, parts, tools, skill, time, and a symptom in the
    order's language where the draft's is the rule's own English message.
    """
    draft, pack, language = question.draft, question.pack, question.draft.language
    fault = pack.faults.get(question.alert.kind)
    if fault is None:
        return {}
    found = {
        "parts": tuple(pack.term(part, language) for part in fault.parts),
        "tools": tuple(pack.term(tool, language) for tool in fault.tools),
        "skill": pack.term(fault.skill, language) if fault.skill else "",
        "minutes": fault.minutes,
    }
    needs: dict[str, Any] = {name: value for name, value in found.items() if value and not getattr(draft, name)}
    if not (draft.tools or draft.skill):
        steps = pack.steps(question.alert.kind, language)
        needs["action"] = (*steps, *(step for step in draft.action if step not in steps))
    if language != "en" and question.alert.message in draft.symptom:
        needs["symptom"] = pack.say(fault.symptom, language) + draft.symptom
    return needs


def _text_of(answer: str) -> str:
    try:
        return str(msgspec.json.decode(answer, type=dict[str, Any]).get("text", ""))
    except msgspec.MsgspecError as error:
        raise LanguageError(f"the model's choice is no JSON: {error}", hint="ask it again") from error


def _draft_fields(draft: WorkOrder) -> dict[str, Any]:
    names = ("symptom", "likely_cause", "action", "priority", "parts", "tools", "skill", "minutes", "evidence_ids")
    return {name: msgspec.to_builtins(getattr(draft, name)) for name in names}


def _facts(draft: WorkOrder, most: int) -> str:
    """Facts with their ids, those that the draft quotes first."""
    facts = evidence_facts(draft.evidence)
    names = dict.fromkeys([*(name for name in draft.evidence_ids if name in facts), *facts])
    return "; ".join(f"{name} = {_number(facts[name])}" for name in list(names)[:most]) or "-"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:80]


def _sources(passages: Sequence[Passage]) -> str:
    texts = [f"[{passage.id}] {' '.join(passage.text.split())[:PASSAGE_CHARACTERS]}" for passage in passages]
    return "\n".join(texts) or "-"


def _history(history: Sequence[Alert]) -> str:
    return "; ".join(f"{alert.kind}: {alert.message}"[:120] for alert in history[:HISTORY_CAP]) or "-"


def _steps(passage: Passage) -> Iterator[str]:
    yield from (match["step"] for match in STEP.finditer(passage.text))
