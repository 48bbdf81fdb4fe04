"""Says whether a text attacks the language model: patterns, rules over concepts, and a classifier beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from millhand.language.pack import GuardTerms
from millhand_plugins.guard.classifier import Classifier
from millhand_plugins.guard.lexicon import Lexicon
from millhand_plugins.guard.patterns import form_in
from millhand_plugins.guard.readings import clean, readings
from millhand_plugins.guard.settings import InputTable


@dataclass(frozen=True)
class Attack:
    rule: str
    reason: str
    """In words for people."""


REASONS = {
    "injection": "it tells the language model to leave its instructions, or asks for them",
    "jailbreak": "it asks the language model to answer without its limits",
    "exfiltration": "it asks for secrets, or to send data away",
    "tools": "it wants commands or tools run that may do damage",
    "harm": "it asks for help to do harm, or to hide that it was done",
    "obfuscation": "it hides orders to the language model in pieces or codes",
    "classifier": "it reads like an attack on the language model",
    "terms": "it holds a term that the owner does not allow",
}


class Detector:
    """Thread-safe but for the dictionary's cache, which only ever gains."""

    def __init__(self, settings: InputTable, field: GuardTerms) -> None:
        self._threshold = settings.threshold
        self._lexicon = Lexicon.shipped(settings.terms, field.harmless)
        self._classifier = Classifier.shipped()
        self._own = [re.compile(pattern) for pattern in settings.patterns]

    def attack(self, text: str) -> Attack | None:
        """The first rule that speaks, or None."""
        rule = self._rule(text)
        return Attack(rule, REASONS[rule.partition(".")[0]]) if rule else None

    def _rule(self, text: str) -> str:
        if any(pattern.search(text) for pattern in self._own):
            return "terms.pattern"
        for index, reading in enumerate(readings(text)):
            form = form_in(reading)
            if form:
                return form
            found = self._lexicon.read(reading)
            if found.rule:
                return found.rule
            # Other readings than the first may be garbage, in which any word means something by chance.
            if (found.telling or not index) and self._classifier.score(reading) > self._threshold:
                return "classifier.text"
        return ""


class Forbidden:
    """What the field's pack never answers: a text with one phrase of every group of a rule."""

    def __init__(self, field: GuardTerms) -> None:
        self._rules = field.forbidden

    def attack(self, text: str) -> Attack | None:
        lowered = clean(text).lower()
        for rule in self._rules:
            if all(any(phrase in lowered for phrase in group) for group in rule.all):
                return Attack(rule.rule, next(iter(rule.reason.values())))
        return None
