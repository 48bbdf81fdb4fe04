"""The profiles that millhand ships: one `<board>.toml` for each kind of hardware."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from millhand.hookspecs import hookimpl


@hookimpl
def millhand_profiles() -> Sequence[Path]:
    """Return this package's own folder."""
    return [Path(__file__).parent]
