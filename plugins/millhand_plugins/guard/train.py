"""Trains weights.npz on the parts `tuning` and `broad` of benchmarks/eval/guard_texts, and on nothing else.

    python plugins/millhand_plugins/guard/train.py

Needs NumPy alone. Templates go to four folds, with all their texts; each fold is judged by weights that have not seen
it. The shipped weights are then trained on all templates, and judged on choosing.toml, texts by hand.
"""

from __future__ import annotations

import random
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.guard.classifier import BUCKET_BITS, Classifier, buckets, evidence, windows, words
from millhand_plugins.guard.settings import InputTable

HERE = Path(__file__).parent
TEXTS = HERE.parents[2] / "benchmarks/eval/guard_texts"
sys.path.insert(0, str(TEXTS))

STEPS, RATE, PENALTY = 60, 0.1, 3e-6
FOLDS = 4
PER_TEMPLATE = 24
"""Texts of one template that are used: more of them only repeat its words."""
FALSE_ALARMS = (0.002, 0.005, 0.01)


class Set(NamedTuple):
    """Texts as features: a sparse matrix (row, column, value), what they are, and of which template."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    value: NDArray[np.float32]
    labels: NDArray[np.float32]
    groups: NDArray[np.int64]

    def part(self, rows: NDArray[np.bool_]) -> Set:
        numbers = np.cumsum(rows) - 1
        kept = rows[self.row]
        return Set(numbers[self.row[kept]], self.column[kept], self.value[kept], self.labels[rows], self.groups[rows])


class Weights(NamedTuple):
    weights: NDArray[np.float32]
    bias: float

    def logits(self, found: Set) -> NDArray[np.float64]:
        return np.bincount(found.row, self.weights[found.column] * found.value, len(found.labels)) + self.bias


def samples() -> list[tuple[list[str], bool, int]]:
    """(words of a window, attack, template). A disguised text teaches letters, not words: it is left to the rules."""
    from generate import texts

    chosen: list[tuple[list[str], bool, int]] = []
    taken: Counter[tuple[bool, int]] = Counter()
    for part in ("tuning", "broad"):
        found = texts(part)
        random.Random(1).shuffle(found)
        for text in found:
            taken[text.attack, text.template] += 1
            if text.family.startswith("hidden.") or taken[text.attack, text.template] > PER_TEMPLATE:
                continue
            if text.attack:
                chosen.append((words(text.core), True, text.template))
            else:
                chosen += [(list(window), False, text.template) for window in windows(words(text.text))]
    return chosen


def features(chosen: list[tuple[list[str], bool, int]]) -> Set:
    parts = []
    for index, (found, _, _) in enumerate(chosen):
        columns, counts = np.unique(np.concatenate(buckets(found)), return_counts=True)
        parts.append((np.full(len(columns), index), columns, counts / evidence(len(found))))
    row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    labels = np.array([attack for _, attack, _ in chosen], np.float32)
    groups = np.array([template for _, _, template in chosen])
    return Set(row.astype(np.int64), column.astype(np.int64), value.astype(np.float32), labels, groups)


def importance(found: Set) -> NDArray[np.float32]:
    """Both classes weigh the same; a template weighs as the root of its number of texts."""
    _, places, counts = np.unique(found.groups, return_inverse=True, return_counts=True)
    worth = 1 / np.sqrt(counts[places])
    for label in (0, 1):
        worth[found.labels == label] *= 0.5 / worth[found.labels == label].sum()
    return worth.astype(np.float32)


def fit(found: Set) -> Weights:
    """By Adam on the whole set."""
    weights, bias = np.zeros(1 << BUCKET_BITS, np.float32), 0.0
    worth = importance(found)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, STEPS + 1):
        logits = Weights(weights, bias).logits(found)
        error = (1 / (1 + np.exp(-np.clip(logits, -30, 30))) - found.labels) * worth
        slope = np.bincount(found.column, error[found.row] * found.value, len(weights)) + PENALTY * weights
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        weights -= (RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-6)).astype(np.float32)
        bias -= RATE * float(error.sum())
    return Weights(weights, bias)


def unseen(found: Set) -> NDArray[np.float64]:
    """Each text's logit by weights that have not seen its template."""
    logits = np.zeros(len(found.labels))
    for fold in range(FOLDS):
        held = found.groups % FOLDS == fold
        logits[held] = fit(found.part(~held)).logits(found.part(held))
    return logits


def tell(title: str, attacks: NDArray[np.float64], harmless: NDArray[np.float64], threshold: float) -> None:
    """Prints what is caught at the threshold of the settings, and where some shares of the harmless texts lie."""

    def caught(limit: float) -> str:
        return f"{100 * (attacks > limit).mean():.1f} % of attacks, {100 * (harmless > limit).mean():.2f} % of harmless"

    print(f"{title}: {caught(threshold)} texts above {threshold}")
    for share in FALSE_ALARMS:
        limit = float(np.quantile(harmless, 1 - share))
        print(f"  {caught(limit)} texts above {limit:.2f}")


def main() -> int:
    found = features(samples())
    threshold = InputTable().threshold
    logits = unseen(found)
    tell("unseen templates", logits[found.labels > 0], logits[found.labels == 0], threshold)
    weights, bias = fit(found)
    step = float(np.abs(weights).max() / 127)
    np.savez_compressed(
        HERE / "weights.npz",
        weights=np.round(weights / step).astype(np.int8),
        scale=np.float32(step),
        bias=np.float32(bias),
    )
    shipped = Classifier.shipped()
    by_hand = tomllib.loads((TEXTS / "choosing.toml").read_text(encoding="utf-8"))
    attacks, harmless = (np.array([shipped.score(text) for text in by_hand[kind]]) for kind in ("attacks", "harmless"))
    tell("by hand", attacks, harmless, threshold)
    print(f"{len(found.labels)} texts, {(HERE / 'weights.npz').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
