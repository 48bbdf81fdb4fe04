"""The form of a work order's text: what a model or a person may write, how much of it, and its JSON schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from millhand.errors import InputError, LanguageError
from millhand.records import WorkOrder

SYMPTOM_CHARACTERS, CAUSE_CHARACTERS, STEP_CHARACTERS = 1000, 600, 400
STEPS_CAP, ITEMS_CAP, ITEM_CHARACTERS = 12, 10, 120
MINUTES_CAP = 7 * 24 * 60
ANSWER_CHARACTERS_CAP = 64 * 1024
"""A longer answer of a model is not read."""

Item = Annotated[str, Meta(min_length=1, max_length=ITEM_CHARACTERS)]
Step = Annotated[str, Meta(min_length=1, max_length=STEP_CHARACTERS)]
Items = Annotated[tuple[Item, ...], Meta(max_length=ITEMS_CAP)]


class OrderText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a work order that are words; `citations` holds ids of passages."""

    symptom: Annotated[str, Meta(min_length=1, max_length=SYMPTOM_CHARACTERS)]
    likely_cause: Annotated[str, Meta(min_length=1, max_length=CAUSE_CHARACTERS)]
    action: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=STEPS_CAP)]
    priority: Annotated[int, Meta(ge=1, le=4)]
    parts: Items = ()
    tools: Items = ()
    skill: Annotated[str, Meta(max_length=ITEM_CHARACTERS)] = ""
    minutes: Annotated[int, Meta(ge=0, le=MINUTES_CAP)] = 0
    evidence_ids: tuple[str, ...] = ()
    citations: tuple[str, ...] = ()


EDITABLE = frozenset({"symptom", "likely_cause", "action", "priority", "parts", "tools", "skill", "minutes"})


def edited(order: WorkOrder, changes: Mapping[str, Any]) -> WorkOrder:
    """The order with a person's changes. Raises InputError naming the field that is not known or does not fit."""
    unknown = sorted(set(changes) - EDITABLE)
    if unknown:
        raise InputError(
            f"field '{unknown[0]}' of a work order cannot be edited", hint=f"one of: {', '.join(sorted(EDITABLE))}"
        )
    if not changes:
        raise InputError("nothing of the work order is changed", hint="name a field, such as --cause")
    # Only what is changed is judged: an alert's own long message may stand in the symptom already.
    filled = {"symptom": "-", "likely_cause": "-", "action": ["-"], "priority": order.priority}
    try:
        text = msgspec.convert({**filled, **changes}, OrderText)
    except msgspec.ValidationError as error:
        minutes = changes.get("minutes", 0)
        if type(minutes) is int and not 0 <= minutes <= MINUTES_CAP:
            raise InputError(
                f"minutes = {minutes} is not 0 to {MINUTES_CAP}", hint="0 where it is not known; at most a week"
            ) from error
        raise InputError(f"the edit does not fit: {error}", hint="shorten it, or mend the value") from error
    fields: Mapping[str, Any] = {name: getattr(text, name) for name in changes}
    blank = [name for name, value in fields.items() if _is_blank(value)]
    if blank:
        raise InputError(f"field '{blank[0]}' has a blank text", hint="write what it is to say, or leave it as it was")
    return msgspec.structs.replace(order, **fields)


def _is_blank(value: Any) -> bool:
    """Whether a text, or one text of a list, is only white space; an empty list or skill is a choice."""
    texts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(text, str) and text != text.strip() == "" for text in texts)


def read_text(answer: str) -> OrderText:
    """What a model wrote as JSON by `schema`. Raises LanguageError: it may be asked again."""
    try:
        if len(answer) > ANSWER_CHARACTERS_CAP:
            raise ValueError(f"it has {len(answer)} characters")
        return msgspec.json.decode(answer.encode(), type=OrderText)
    except (ValueError, RecursionError) as error:
        raise LanguageError(f"the model's work order is not of the form: {error}", hint="ask it again") from error


def schema(evidence_ids: Sequence[str], passages: Sequence[str]) -> dict[str, Any]:
    """JSON schema of `OrderText` (draft 2020-12, of it what llama.cpp and vLLM both keep), its ids as enumerations."""

    def texts(characters: int, most: int, least: int = 0) -> dict[str, Any]:
        item = {"type": "string", "minLength": 1, "maxLength": characters}
        return {"type": "array", "items": item, "minItems": least, "maxItems": most}

    def chosen(names: Sequence[str]) -> dict[str, Any]:
        if not names:
            return {"type": "array", "items": {"type": "string"}, "maxItems": 0}
        return {"type": "array", "items": {"type": "string", "enum": list(names)}, "maxItems": min(len(names), 8)}

    properties: dict[str, Any] = {
        "symptom": {"type": "string", "minLength": 1, "maxLength": SYMPTOM_CHARACTERS},
        "likely_cause": {"type": "string", "minLength": 1, "maxLength": CAUSE_CHARACTERS},
        "action": texts(STEP_CHARACTERS, STEPS_CAP, 1),
        "priority": {"type": "integer", "enum": [1, 2, 3, 4]},
        "parts": texts(ITEM_CHARACTERS, ITEMS_CAP),
        "tools": texts(ITEM_CHARACTERS, ITEMS_CAP),
        "skill": {"type": "string", "maxLength": ITEM_CHARACTERS},
        "minutes": {"type": "integer", "minimum": 0, "maximum": MINUTES_CAP},
        "evidence_ids": chosen(evidence_ids),
        "citations": chosen(passages),
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
