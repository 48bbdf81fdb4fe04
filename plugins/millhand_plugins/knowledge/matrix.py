"""Vectors as one plain matrix: exact, and at the sizes of a node quicker than any index (see docs/knowledge.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Matrix:
    """Rows of length 1 with the ids of their passages. Removal is at once: the row is gone, not marked."""

    def __init__(self) -> None:
        self._ids: NDArray[np.int64] = np.zeros(0, np.int64)
        self._rows: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[int], rows: NDArray[np.float32]) -> None:
        """ids: of passages that have no row yet; rows: (ids, dimensions)."""
        if len(ids):
            self._rows = np.vstack([self._rows, rows]) if len(self._ids) else np.array(rows, np.float32)
            self._ids = np.concatenate([self._ids, np.array(ids, np.int64)])

    def remove(self, ids: Sequence[int]) -> None:
        if len(ids) and len(self._ids):
            kept = ~np.isin(self._ids, np.array(ids, np.int64))
            self._ids, self._rows = self._ids[kept], self._rows[kept]

    def nearest(self, vector: NDArray[np.float32], limit: int, allowed: set[int] | None = None) -> list[int]:
        """Ids by falling cosine similarity to a vector of length 1; of `allowed` alone, if given."""
        if not len(self._ids):
            return []
        scores = self._rows @ vector
        if allowed is not None:
            scores[~np.isin(self._ids, np.fromiter(allowed, np.int64, len(allowed)))] = -np.inf
        count = min(limit, len(scores))
        best = np.argpartition(-scores, count - 1)[:count]
        best = best[np.argsort(-scores[best], kind="stable")]
        return [int(self._ids[at]) for at in best if np.isfinite(scores[at])]
