"""ONNX Runtime's quantizers print, and advise by the root logger: not in a process whose output others read."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Neither stdout nor warnings of the root logger; errors are raised as ever."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
