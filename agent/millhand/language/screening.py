"""What a reviser may see of an alert: texts that came from elsewhere, as the guards let them through.

Passages, sensor names, messages of alerts and the draft's own words are judged before any of them stands in a prompt,
so that a reviser need not say which of its words are whose. Without a gateway there are no guards, and all passes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from millhand.errors import RefusedError
from millhand.language.guarding import Part, Source
from millhand.language.passages import Passage
from millhand.records import Alert, WorkOrder, evidence_facts

Judge = Callable[[Sequence[Part]], Awaitable[Sequence[str | None]]]
"""Each text as it may go on, in order; None for one that must not."""
LINES = ("symptom", "likely_cause", "skill")
LISTS = ("action", "parts", "tools")
"""Words of a draft that a reviser is shown."""


@dataclass(frozen=True)
class Material:
    """What one order is revised from."""

    draft: WorkOrder
    alert: Alert
    history: Sequence[Alert]
    passages: Sequence[Passage]

    def texts(self) -> dict[str, Source]:
        """Every text that a prompt may hold, once each, with where it comes from."""
        found: dict[str, Source] = {passage.text: "knowledge" for passage in self.passages}
        words = [*(getattr(self.draft, name) for name in LINES)]
        words += [text for name in LISTS for text in getattr(self.draft, name)]
        words += [text for alert in (self.alert, *self.history) for text in (alert.kind, alert.message)]
        words += [*_words(self.draft.evidence), *_words(self.alert.evidence)]
        return {**found, **dict.fromkeys(words, "order")}


async def screened(material: Material, judge: Judge) -> Material:
    """The same without what attacks. A passage loses the lines that guards changed; a fact or an earlier alert that
    they changed goes whole. Raises RefusedError where they refuse words of the draft itself, and what `judge` does.
    """
    texts = material.texts()
    parts = [Part(source, text) for text, source in texts.items()]
    seen = dict(zip(texts, await judge(parts), strict=True))
    if all(seen[text] == text for text in texts):
        return material
    alert = material.alert
    return Material(
        _draft(material.draft, seen),
        msgspec.structs.replace(
            alert,
            kind=_shown(alert.kind, seen),
            message=_shown(alert.message, seen),
            evidence=_facts(alert.evidence, seen),
        ),
        [one for one in material.history if _stays(one.kind, seen) and _stays(one.message, seen)],
        [shown for passage in material.passages if (shown := _passage(passage, seen[passage.text])) is not None],
    )


def restored(version: WorkOrder, seen: WorkOrder, draft: WorkOrder) -> WorkOrder:
    """The version with the draft's own words where it holds those that the reviser was shown in their place."""
    fields: dict[str, Any] = {}
    for name in LINES:
        shown, own = getattr(seen, name), getattr(draft, name)
        fields[name] = getattr(version, name).replace(shown, own, 1) if shown != own else getattr(version, name)
    for name in LISTS:
        own_of = dict(zip(getattr(seen, name), getattr(draft, name), strict=True))
        fields[name] = tuple(own_of.get(text, text) for text in getattr(version, name))
    return msgspec.structs.replace(version, **fields)


Seen = Mapping[str, str | None]


def _draft(draft: WorkOrder, seen: Seen) -> WorkOrder:
    words: dict[str, Any] = {name: _shown(getattr(draft, name), seen) for name in LINES}
    words |= {name: tuple(_shown(text, seen) for text in getattr(draft, name)) for name in LISTS}
    evidence = _facts(draft.evidence, seen)
    known = evidence_facts(evidence)
    ids = tuple(fact for fact in draft.evidence_ids if fact in known)
    return msgspec.structs.replace(draft, **words, evidence=evidence, evidence_ids=ids)


def _shown(text: str, seen: Seen) -> str:
    shown = seen[text]
    if shown is None:
        raise RefusedError("a guard refused the draft's own words", hint="millhand gateway audit tells which rule")
    return shown


def _stays(text: str, seen: Seen) -> bool:
    return seen[text] == text


def _passage(passage: Passage, text: str | None) -> Passage | None:
    """What is left of a line is no step to choose, so the line goes whole; None where nothing is left."""
    if text == passage.text:
        return passage
    own = set(passage.text.splitlines())
    kept = [line for line in (text or "").splitlines() if line in own]
    return msgspec.structs.replace(passage, text="\n".join(kept)) if any(map(str.strip, kept)) else None


def _words(evidence: Mapping[str, Any]) -> Iterator[str]:
    """Names and texts of facts, at every depth."""
    for name, value in evidence.items():
        yield str(name)
        if isinstance(value, Mapping):
            yield from _words(value)
        elif not isinstance(value, int | float):
            yield str(value)


def _facts(evidence: Mapping[str, Any], seen: Seen) -> dict[str, Any]:
    """Those whose names and texts the guards left as they are."""
    kept: dict[str, Any] = {}
    for name, value in evidence.items():
        if not _stays(str(name), seen):
            continue
        if isinstance(value, Mapping):
            kept[name] = _facts(value, seen)
        elif isinstance(value, int | float) or _stays(str(value), seen):
            kept[name] = value
    return kept
