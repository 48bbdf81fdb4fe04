"""The access log of a front process: one structured line a request, limited as all logs are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from millhand.logs import LogChoice, log_handler

log = logging.getLogger("millhand.access")


class AccessLog:
    """Writes to stderr in the format of the other logs."""

    def __init__(self, choice: LogChoice, lines_per_minute: int) -> None:
        """`choice` says the format; its level does not matter here."""
        log.handlers[:] = [log_handler(choice, lines_per_minute)]
        log.setLevel(logging.INFO)
        log.propagate = False

    def write(self, fields: Mapping[str, str | int | float]) -> None:
        """Write one line: `key=value` of each field, or with format `json` the same as keys of its object."""
        text = " ".join([f"{key}={_shown(value)}" for key, value in fields.items()])
        log.info("%s", text, extra={"fields": fields})


def _shown(value: str | int | float) -> str:
    """A client chooses paths and more: quoted, none of them can write a line of its own."""
    if isinstance(value, str):
        return value if value.replace("_", "").isalnum() or not value else json.dumps(value)
    return f"{value:.3f}" if isinstance(value, float) else f"{value}"
