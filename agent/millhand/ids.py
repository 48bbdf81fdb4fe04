"""Finding a record by the beginning of its id, as people type it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from millhand.errors import InputError

ID_SEARCH_LIMIT = 10_000
"""So many of the newest records are looked through."""
ID_CHARACTERS_LEAST = 4
"""A shorter beginning of an id is refused: it fits too many."""


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=Identified)


def by_prefix(records: Sequence[Record], prefix: str, what: str) -> Record:
    """The one record whose id is `prefix` or begins with it. Raises InputError."""
    matches = [record for record in records if record.id == prefix]
    if not matches and len(prefix) < ID_CHARACTERS_LEAST:
        raise InputError(
            f"'{prefix}' is too short for the beginning of an id",
            hint=f"give at least {ID_CHARACTERS_LEAST} characters",
        )
    matches = matches or [record for record in records if record.id.startswith(prefix)]
    if len(matches) != 1:
        found = "no" if not matches else f"{len(matches)}"
        raise InputError(
            f"{found} {what}s have an id that begins with '{prefix}'",
            hint=f"millhand {what.rsplit(maxsplit=1)[-1]} list",
        )
    return matches[0]
