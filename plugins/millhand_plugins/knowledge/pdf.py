"""PDFs, read in a process of their own: a damaged or hostile one ends that process by its limits, never the daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from millhand.errors import InputError
from millhand_plugins.knowledge.settings import KnowledgeConfig

READER = "millhand_plugins.knowledge.pdf_reader"


def pdf_pages(path: Path, data: bytes, config: KnowledgeConfig) -> Iterator[tuple[int, str]]:
    """Yield (page from 1, its text). Raises InputError naming the file and why it cannot be read."""
    if find_spec("pypdf") is None:
        raise InputError(
            f"'{path}': reading PDFs needs the package pypdf", hint="install it with: pip install 'millhand[knowledge]'"
        )
    limits = [str(config.pages_cap), str(config.text_characters_cap), str(config.pdf_memory_bytes_cap)]
    seconds = max(1, round(config.pdf_timeout_s))
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as answer:
        given.write(data)
        given.seek(0)
        try:
            done = subprocess.run(
                [sys.executable, "-m", READER, *limits, str(seconds)],
                stdin=given,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                timeout=config.pdf_timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"'{path}' is not read within {config.pdf_timeout_s:g} s",
                hint="print it to a plain PDF, or raise [plugins.knowledge] pdf_timeout_s",
            ) from error
        answer.seek(0)
        for line in answer:
            if not line.endswith(b"\n"):
                break  # it was ended while it wrote
            item = json.loads(line)
            if "error" in item:
                raise InputError(f"'{path}' {item['error']}", hint=item["hint"])
            yield item["page"], item["text"]
    if done.returncode:
        raise InputError(
            f"'{path}' ended the process that reads it (status {done.returncode}): too much memory or time, or damage",
            hint="print it to a plain PDF, or raise [plugins.knowledge] pdf_memory_bytes_cap",
        )
