"""The command line, called in this process, which is as real as one of its own and quicker."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millhand.cli import main

TEST_FOLDER = re.compile(r"/\S*?/pytest-of-\w+/pytest-\d+(/popen-gw\d+)?")
"""Where pytest makes its folders: longer than an owner's paths, and as long as the number of its processes says."""


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What it said on stderr, each message on one line."""
        return re.sub(r"\n {5,7}", " ", self.err)

    @property
    def data(self) -> Any:
        return json.loads(self.out)


def run(config_path: Path, *words: str | Path, stdin: bytes = b"") -> Done:
    """Run `millhand` with a configuration; text for people must fit 80 columns."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(["--config", str(config_path), *map(str, words)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdin = before
    text = TEST_FOLDER.sub("", out.getvalue() + err.getvalue())
    assert max(map(len, [*text.splitlines(), ""])) <= 80 or "--json" in words
    return Done(code, out.getvalue(), err.getvalue())
