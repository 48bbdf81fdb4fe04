"""Trains weights.npz on the tuning part of benchmarks/eval/guard_texts, and on nothing else.

    python plugins/millhand_plugins/guard/train.py

Needs NumPy alone. Every fifth template is held back, with all its texts, to choose the strength of the penalty and to
print what the classifier does on templates that it has not seen. The shipped weights are then trained on all of tuning.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.guard.classifier import BUCKET_BITS, FULL_EVIDENCE, SCALE, WINDOW, buckets, signature

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "benchmarks/eval/guard_texts"))

STEPS, RATE = 120, 0.3
PENALTIES = (1e-6, 1e-5)


def rows(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
    """A sparse matrix of shares times SCALE, one row a text: (row, column, value)."""
    parts = []
    for index, text in enumerate(texts):
        found = np.concatenate(buckets(signature(text)) or [np.zeros(0, np.uint32)])
        columns, counts = np.unique(found, return_counts=True)
        parts.append(
            (np.full(len(columns), index, np.uint32), columns, counts * (SCALE / max(FULL_EVIDENCE, len(found))))
        )
    row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    return row, column, value.astype(np.float32)


def fit(texts: list[str], labels: NDArray[np.float32], penalty: float) -> tuple[NDArray[np.float32], float]:
    """Weights and bias by Adam on the whole set; both classes weigh the same."""
    row, column, value = rows(texts)
    weights, bias = np.zeros(1 << BUCKET_BITS, np.float32), 0.0
    balance = np.where(labels > 0, 0.5 / labels.sum(), 0.5 / (1 - labels).sum()).astype(np.float32)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, STEPS + 1):
        logits = np.bincount(row, weights[column] * value, len(texts)) + bias
        error = (1 / (1 + np.exp(-np.clip(logits, -30, 30))) - labels) * balance
        slope = np.bincount(column, error[row] * value, len(weights)) + penalty * weights
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        weights -= (RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-4)).astype(np.float32)
        bias -= RATE * float(error.sum())
    return weights, bias


def windows(text: str) -> list[str]:
    """A text as it is judged: whole where it is short, else in windows of its characters."""
    return [text[at : at + WINDOW] for at in range(0, max(1, len(text) - WINDOW // 2), WINDOW // 2)]


def samples() -> tuple[list[str], NDArray[np.float32], NDArray[np.int64]]:
    """Texts, labels and groups. A disguised text teaches letters, not words: it is left to the rules."""
    from generate import texts

    chosen, labels, groups = [], [], []
    for text in texts("tuning"):
        if text.family.startswith("hidden."):
            continue
        pieces = windows(text.text) if not text.attack else [text.core]
        chosen += pieces
        labels += [text.attack] * len(pieces)
        groups += [text.template] * len(pieces)
    return chosen, np.array(labels, np.float32), np.array(groups)


def main() -> int:
    texts, labels, groups = samples()
    held = groups % 5 == 0
    best = (-1.0, PENALTIES[0])
    for penalty in PENALTIES:
        weights, bias = fit([t for t, h in zip(texts, held, strict=True) if not h], labels[~held], penalty)
        row, column, value = rows([t for t, h in zip(texts, held, strict=True) if h])
        logits = np.bincount(row, weights[column] * value, int(held.sum())) + bias
        truth = labels[held] > 0
        limit = np.quantile(logits[~truth], 0.998)
        caught = float((logits[truth] > limit).mean())
        print(
            f"penalty {penalty:g}: {100 * caught:.2f} % of unseen templates' attacks; "
            f"0.2 % of the harmless texts have more than {limit:.2f}"
        )
        best = max(best, (caught, penalty))
    weights, bias = fit(texts, labels, best[1])
    step = float(np.abs(weights).max() / 127)
    np.savez_compressed(
        HERE / "weights.npz",
        weights=np.round(weights / step).astype(np.int8),
        scale=np.float32(step),
        bias=np.float32(bias),
    )
    print(f"{len(texts)} texts, penalty {best[1]:g}, {(HERE / 'weights.npz').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
