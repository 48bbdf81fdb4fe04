"""The table [plugins.workbench]."""

from __future__ import annotations

from millhand.validation import StrictTable


class Options(StrictTable):
    recipes: tuple[str, ...] = ("folded", "half", "damaged")
    log: str = ""
    """A file that gets a line for each candidate that is made."""
    seed: int = 0
    key: str = ""
    """What `Made.key` holds, and `key` tells."""
    examples: str = ""
    """An .npz that the evaluation gives; empty for none."""
