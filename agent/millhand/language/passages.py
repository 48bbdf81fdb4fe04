"""What retrieval finds: passages of manuals, of past orders and of parts lists, with the place they stand at."""

from __future__ import annotations

import msgspec


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """One passage, with its place; a citation is a passage's `id` beside its `place`."""

    id: str
    """Stable for the same text at the same place: what citations name."""
    source: str
    """File name, or `order <id>`."""
    title: str = ""
    page: int = 0
    """Page of a PDF, from 1; 0 where there are none."""
    line: int = 0
    """First line in the text file or page, from 1."""
    kind: str = "manual"
    """`manual`, `order` or `parts`."""
    assets: tuple[str, ...] = ()
    """Assets that it is about; empty: all."""
    text: str = ""
    score: float = 0.0
    """Of the query that found it; comparable within one answer only."""

    @property
    def place(self) -> str:
        """`gearbox.pdf, page 12, line 3`."""
        page = f", page {self.page}" if self.page else ""
        return f"{self.source}{page}, line {self.line}" if self.line else f"{self.source}{page}"
