"""What a long run has found so far: a JSON line for each part, written at once; and the time that is left."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """Lines go to stdout and to a file; a part that fails is told there, and the next goes on."""

    def __init__(self, path: Path | None, deadline_s: float) -> None:
        """deadline_s: from now on; what does not fit in is left out."""
        self._path = path
        self._began = time.monotonic()
        self._deadline_s = deadline_s
        self.failures: dict[str, str] = {}

    @property
    def left_s(self) -> float:
        return self._deadline_s - (time.monotonic() - self._began)

    def write(self, part: str, **facts: Any) -> None:
        line = json.dumps({"part": part, "at_s": round(time.monotonic() - self._began, 1), **facts}, default=str)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Whatever goes wrong inside ends this part alone: it is written down, not raised."""
        began = time.monotonic()
        try:
            yield
        except (Exception, SystemExit) as error:
            self.failures[name] = f"{type(error).__name__}: {error}"[-6000:]
            self.write(name, failed=self.failures[name], trace=traceback.format_exc()[-2000:])
        else:
            self.write(name, done=True, seconds=round(time.monotonic() - began, 1))

    def fits(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, the part is told as left out."""
        if self.left_s >= seconds:
            return True
        self.failures[name] = f"left out: {self.left_s:.0f} s are left, it takes {seconds:.0f}"
        self.write(name, failed=self.failures[name])
        return False
