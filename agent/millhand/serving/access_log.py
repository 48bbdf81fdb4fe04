"""The access log of a front process: one structured line a request, limited as all logs are."""

from __future__ import annotations

import json
import logging

from millhand.logs import LogChoice, log_handler

log = logging.getLogger("millhand.access")


class AccessLog:
    """Writes to stderr in the format of the other logs."""

    def __init__(self, choice: LogChoice, lines_per_minute: int) -> None:
        """`choice` says the format; its level does not matter here."""
        log.handlers[:] = [log_handler(choice, lines_per_minute)]
        log.setLevel(logging.INFO)
        log.propagate = False

    def write(self, method: str, path: str, status: int, size_bytes: int, duration_ms: float, trace_id: str) -> None:
        """Write one line. `path` is as the client asked, without the query; `trace_id` may be empty."""
        fields = {
            "method": method,
            "path": path,
            "status": status,
            "bytes": size_bytes,
            "ms": round(duration_ms, 3),
            "trace_id": trace_id,
        }
        text = "method=%s path=%s status=%d bytes=%d ms=%.3f trace_id=%s"
        # A client chooses path and method: quoted, neither can write a line of its own.
        log.info(
            text, _quoted(method), _quoted(path), status, size_bytes, duration_ms, trace_id, extra={"fields": fields}
        )


def _quoted(text: str) -> str:
    return text if text.isalnum() else json.dumps(text)
