"""What ran of the package on boards that are not here: `make test-arm64` once, and what the nodes said.

Nothing is timed: under emulation Python is ten to thirty times slower. Needs root, debootstrap, qemu-user and the
recordings below MILLHAND_DATA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, parser, progress, report

ROOT = Path(__file__).parents[1]
BOARDS = ("orin", "a30", "a100")


def main() -> int:
    parser(__doc__).parse_args()
    if not os.environ.get("MILLHAND_DATA"):
        progress("MILLHAND_DATA does not name the folder of public data sets: no recordings to dress boards from")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TEST_RECORD": folder}
        # The interpreter that runs this has what the tests need: nothing is installed.
        command = ["make", "--old-file=.venv/.dev", f"BIN={Path(sys.executable).parent}", "test-arm64"]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode
        found = {name: _read(Path(folder) / f"{name}.json") for name in BOARDS}
    figures = [Figure("tests of it that failed", code, "make's exit code", "== 0")]
    for name, seen in found.items():
        figures += [
            Figure(f"{name}: packets that left the node", seen.get("packets_sent_out"), "packets", "== 0"),
            Figure(f"{name}: errors of check", seen.get("check", {}).get("errors"), "errors", "== 0"),
            Figure(f"{name}: readings of the demo lost", seen.get("demo", {}).get("lost"), "readings", "== 0"),
            Figure(f"{name}: exit code of the agent after SIGTERM", seen.get("stopped"), "", "== 0"),
        ]
    return report("emulation", figures, boards=found)


def _read(path: Path) -> dict[str, object]:
    seen: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return seen


if __name__ == "__main__":
    sys.exit(main())
