"""Several rankings made one: reciprocal-rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Sequence

K = 10
"""How little a first place counts beyond a second. The paper has 60, for rankings of a thousand; where five answers
are taken of fifty, 10 found more (benchmarks/eval/retrieval.py)."""


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """(id, score) by falling score: the sum over the rankings of 1 / (K + rank), ranks from 1."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] = scores.get(id, 0.0) + 1 / (K + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
