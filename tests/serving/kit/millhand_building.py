"""Stands in for `millhand.workshop.background`: a build that goes as the file MILLHAND_TEST_BUILD says.

The file holds one word a build, in order: ok, fail, hang, die; the last one holds for all further builds. Each build
adds a line with its task to the file `<that file>.log`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    plan = Path(os.environ["MILLHAND_TEST_BUILD"])
    log = plan.with_suffix(".log")
    done = len(log.read_text().splitlines()) if log.exists() else 0
    with log.open("a") as file:
        file.write(json.dumps({"task": json.loads(sys.argv[1]), "pid": os.getpid()}) + "\n")
    words = plan.read_text().split()
    word = words[min(done, len(words) - 1)]
    if word == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "hang":
        time.sleep(3600)
    if word == "fail":
        print("building ...", file=sys.stderr)
        sys.exit(json.dumps({"message": "no space left on the device", "hint": ""}))


if __name__ == "__main__":
    main()
