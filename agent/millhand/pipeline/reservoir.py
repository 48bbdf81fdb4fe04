"""A uniform sample of a model's inputs that never grows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from millhand.pipeline.recorded import Recorded


class Row(NamedTuple):
    inputs: tuple[NDArray[Any], ...]
    """In the order of the sample's input names; a copy of its own."""
    window_end_ns: int
    asset: str


class Sample(NamedTuple):
    """A reservoir at one moment."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    seen: int
    source: str

    def recorded(self) -> Recorded:
        """The rows as arrays. It copies all of them: not for the event loop."""
        stacks = zip(*(row.inputs for row in self.rows), strict=True)
        return Recorded(
            inputs={name: np.stack(arrays) for name, arrays in zip(self.names, stacks, strict=bool(self.rows))},
            window_end_ns=np.array([row.window_end_ns for row in self.rows], np.int64),
            assets=[row.asset for row in self.rows],
            seen=self.seen,
            source=self.source,
        )


class Reservoir:
    """Each row that was offered is in the sample with the same probability (Vitter 1985, algorithm R).

    J. S. Vitter, "Random sampling with a reservoir", ACM TOMS 11(1), 1985. Draws are seeded by the model's name.

    All rows of a sample have one shape. Where a model takes free dimensions the commonest shape is kept, by majority
    vote (R. S. Boyer, J. S. Moore, "MJRTY", 1981/1991): the sample begins anew once another shape outweighs it.
    """

    def __init__(self, model: str, rows_cap: int, bytes_cap: int, source: str) -> None:
        """`bytes_cap`: of the tensors of all rows. `source`: `source_of` the model's model.toml."""
        self.model = model
        self.source = source
        self.seen = 0
        self.changes = 0
        """Rows that came or were exchanged; whoever saves them sets it back."""
        self._rows_cap = rows_cap
        self._bytes_cap = bytes_cap
        self._rows: list[Row] = []
        self._names: tuple[str, ...] = ()
        self._shapes: list[tuple[int, ...]] = []
        """Of each input, WITHOUT the batch. Names and dtypes are the model's: a row of others has no answer."""
        self._votes = 0
        self._room = 0
        self._random = random.Random(model)  # noqa: S311 - a sample, not a secret

    def offer(self, tensors: Mapping[str, NDArray[Any]], window_end_ns: int, asset: str) -> None:
        """Take one row into account; it is copied where it is kept. tensors: input name -> array WITHOUT the batch."""
        arrays = [np.asarray(array) for array in tensors.values()]
        if [array.shape for array in arrays] != self._shapes:
            self._votes -= 1
            if self._votes > 0:
                return
            self._begin(tuple(tensors), arrays)
        elif self._votes < self._rows_cap:
            self._votes += 1
        self.seen += 1
        if len(self._rows) < self._room:
            self._rows.append(_row(arrays, window_end_ns, asset))
        else:
            place = self._random.randrange(self.seen)
            if place >= self._room:
                return
            self._rows[place] = _row(arrays, window_end_ns, asset)
        self.changes += 1

    def clear(self) -> None:
        """Begin anew."""
        self._names, self._shapes, self._votes, self._room = (), [], 0, 0
        self._rows, self.seen, self.changes = [], 0, 0

    def restore(self, recorded: Recorded) -> None:
        """Go on with rows that were kept; rows of another kind are left out."""
        if recorded.source != self.source or not recorded.rows:
            return
        stacks = list(recorded.inputs.values())
        self._begin(tuple(recorded.inputs), [stack[0] for stack in stacks])
        # A part of a uniform sample is one. Where there is more room now than there was, later rows weigh more.
        draws = random.Random(f"{self.model} {recorded.seen}")  # noqa: S311 - and not those of the first life again
        for place in draws.sample(range(recorded.rows), min(recorded.rows, self._room)):
            arrays = [stack[place] for stack in stacks]
            self._rows.append(_row(arrays, int(recorded.window_end_ns[place]), recorded.assets[place]))
        full = len(self._rows) == self._room
        self.seen = max(recorded.seen, len(self._rows)) if full else len(self._rows)
        self._votes, self._random = max(len(self._rows), 1), draws

    def sample(self) -> Sample:
        """The rows as they are now; what is offered later does not change it."""
        return Sample(self._names, tuple(self._rows), self.seen, self.source)

    def _begin(self, names: tuple[str, ...], arrays: Sequence[NDArray[Any]]) -> None:
        size = max(sum(array.nbytes for array in arrays), 1)
        self._names, self._shapes, self._votes = names, [array.shape for array in arrays], 1
        self._rows, self.seen = [], 0
        self._room = min(self._rows_cap, self._bytes_cap // size)
        if any(array.dtype.hasobject for array in arrays):
            self._room = 0  # strings: nothing that a precision is fitted to


def _row(arrays: Sequence[NDArray[Any]], window_end_ns: int, asset: str) -> Row:
    return Row(tuple(array.copy() for array in arrays), window_end_ns, asset)
