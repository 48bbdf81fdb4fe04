"""Which packages a worker's interpreter has, told without importing any of them.

Another interpreter runs this module's own text, so it keeps to the standard library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

TWINS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that share one import name: whichever was installed last has overwritten files of the other."""
PROBE_DEADLINE_S = 20.0


class Found(TypedDict):
    missing: list[str]
    """Packages that cannot be imported."""
    twins: dict[str, str]
    """Of TWINS those that are imported from, with their versions."""


def look(names: list[str]) -> Found:
    """Look into the interpreter that runs this."""
    return {
        "missing": [name for name in names if find_spec(name) is None],
        "twins": _twins(),
    }


def look_into(interpreter: str, names: list[str]) -> Found:
    """Look into another interpreter. Raises OSError or subprocess.SubprocessError where it does not run."""
    if interpreter == sys.executable:
        return look(names)
    answer = subprocess.run(
        [interpreter, "-c", Path(__file__).read_text(), *names],
        capture_output=True,
        text=True,
        timeout=PROBE_DEADLINE_S,
        check=True,
    )
    found: Found = json.loads(answer.stdout)
    return found


def _twins() -> dict[str, str]:
    """Those of the first folder on the path that has one: what lies in a later folder is never imported."""
    for folder in sys.path:
        found = {name: twin.version for name in TWINS for twin in distributions(name=name, path=[folder])}
        if found:
            return found
    return {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(look(sys.argv[1:])))
