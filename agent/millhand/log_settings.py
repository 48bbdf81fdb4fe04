"""What the owner may say about logs: the table `[log]`. Apart from millhand.logs, which light processes import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from millhand.validation import StrictTable


class LogSettings(StrictTable):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is written."""
    format: Literal["text", "json"] = "text"
    """text for people and journald, json (one object a line) for collectors."""
    repeats_per_minute: int = Field(default=10, ge=1)
    """A message from one place in the code is written so many times a minute; the rest is counted and said once."""
