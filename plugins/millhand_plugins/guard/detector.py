"""Says whether a text attacks the language model: patterns, rules over concepts, and a classifier beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from millhand_plugins.guard.classifier import Classifier
from millhand_plugins.guard.lexicon import Lexicon
from millhand_plugins.guard.patterns import patterns_in
from millhand_plugins.guard.readings import readings


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

    def __init__(self, threshold: float, terms: Sequence[str] = (), patterns: Sequence[str] = ()) -> None:
        self._threshold = threshold
        self._lexicon = Lexicon.shipped(terms)
        self._classifier = Classifier.shipped()
        self._own = [re.compile(pattern) for pattern in patterns]

    def attack(self, text: str) -> Attack | None:
        """The first rule that speaks, or None."""
        rule = self._rule(text)
        return Attack(rule, REASONS[rule.partition(".")[0]]) if rule else None

    def score(self, text: str) -> float:
        """The classifier's logit alone, for evaluation."""
        return self._classifier.score(text)

    def _rule(self, text: str) -> str:
        if any(pattern.search(text) for pattern in self._own):
            return "terms.pattern"
        for reading in readings(text):
            for name, _, _ in patterns_in(reading):
                return name
            for finding in self._lexicon.findings(reading):
                return finding.rule
            if self._classifier.score(reading) > self._threshold:
                return "classifier.text"
        return ""
