"""The process that reads one PDF: from stdin to a line of JSON a page on stdout. Started by pdf.py alone."""

from __future__ import annotations

import io
import json
import logging
import resource
import sys
from collections.abc import Iterator
from typing import Any

MEND = "print it to a plain PDF and add that"


def pages(data: bytes, pages_cap: int, characters_cap: int) -> Iterator[dict[str, Any]]:
    """A page an item, `page` and `text`; or one with `error` and `hint`, the last."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            yield {"error": "is encrypted and needs a password", "hint": "save it without one"}
            return
        count = len(reader.pages)
        if count > pages_cap:
            yield {
                "error": f"has {count:,} pages, at most {pages_cap:,} are read",
                "hint": "split it, or raise [plugins.knowledge] pages_cap",
            }
            return
        left = characters_cap
        for number, page in enumerate(reader.pages, 1):
            text = page.extract_text().replace("\0", " ")[: left + 1]
            left -= len(text)
            # A lone surrogate comes from a damaged font table, and cannot be stored.
            yield {"page": number, "text": text.encode("utf-8", "replace").decode()}
            if left < 0:
                return
    except MemoryError:
        yield {"error": "needs more memory than its reader may take", "hint": MEND}
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RecursionError) as error:
        yield {"error": f"is not a PDF that can be read: {str(error)[:200] or type(error).__name__}", "hint": MEND}


def main(arguments: list[str]) -> None:
    pages_cap, characters_cap, memory_bytes_cap, seconds = map(int, arguments)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes_cap, memory_bytes_cap))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    logging.disable()  # its warnings of odd files are for nobody
    for item in pages(sys.stdin.buffer.read(), pages_cap, characters_cap):
        sys.stdout.write(json.dumps(item) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
