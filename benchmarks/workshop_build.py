"""What `millhand model build` makes of the shipped models on this node, and what a second build of the same costs.

    python benchmarks/workshop_build.py [--data DIR] [--model NAME ...]

DIR holds the C-MAPSS files (default: $MILLHAND_DATA/cmapss); without it turbofan-rul is left out. Everything goes
through the command line, on a node of its own: a build for the CPU, the same again from the shelf, and one ahead of
time for A100 and A30 (engines only where TensorRT-RTX is installed). The screens that it printed are kept in the JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure, parser, progress, report

CONFIG = """
[node]
id = "press-7"
data_dir = "{folder}/data"
run_dir = "{folder}/run"
profile = "generic-cpu"
[plugins.rig]
[plugins.turbofan]
[plugins.quantize]
[plugins.tensorrt]
"""
ABROAD = "a100"
DEADLINE_S = 3600


class Node:
    """A node's folder, and the command line to it."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "millhand.toml"
        self._config.write_text(CONFIG.format(folder=folder))

    def millhand(self, *words: str) -> tuple[str, float]:
        """(what it printed, seconds). Raises CalledProcessError."""
        started_s = time.monotonic()
        command = [sys.executable, "-m", "millhand", "--config", str(self._config), "model", *words]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=DEADLINE_S).stdout
        return text, time.monotonic() - started_s

    def report(self, model: str, *words: str) -> dict[str, Any]:
        """The last build's."""
        found: dict[str, Any] = json.loads(self.millhand("compare", model, "--json", *words)[0])
        return found


def build(node: Node, model: str, data: list[str]) -> tuple[list[Figure], dict[str, str]]:
    """Build one model three times; returns the figures and the screens."""
    progress(f"{model}: building")
    _, first_s = node.millhand("build", model, *data)
    screens = {model: node.millhand("compare", model)[0]}
    chosen = node.report(model)["chosen"]
    progress(f"{model}: building again")
    _, again_s = node.millhand("build", model, *data)
    again = node.report(model)
    progress(f"{model}: building for {ABROAD}")
    _, abroad_s = node.millhand("build", model, "--target", ABROAD, *data)
    abroad = node.report(model, "--target", ABROAD)
    screens[f"{model} for {ABROAD}"] = node.millhand("compare", model, "--target", ABROAD)[0]
    states = [outcome["state"] for outcome in again["outcomes"]]
    print(screens[model])
    return [
        Figure(f"{model}: first build for the CPU", round(first_s, 1), "s"),
        Figure(f"{model}: candidates that passed, of {len(states)}", states.count("passed"), ""),
        Figure(f"{model}: another build of the same", round(again_s, 1), "s"),
        Figure(f"{model}: made or judged again by it", _made_again(again), "", "== 0"),
        Figure(f"{model}: chosen otherwise by it", int(again["chosen"] != chosen), "", "== 0"),
        Figure(f"{model}: build for {ABROAD}", round(abroad_s, 1), "s"),
        Figure(f"{model}: built for {ABROAD}, of {len(abroad['outcomes'])}", _count(abroad, "built"), ""),
        Figure(f"{model}: chosen for {ABROAD}, which is not here", int(bool(abroad["chosen"])), "", "== 0"),
    ], screens


def _made_again(found: dict[str, Any]) -> int:
    return sum(outcome["made"] or outcome["minutes"] > 0.05 for outcome in found["outcomes"])


def _count(found: dict[str, Any], state: str) -> int:
    return sum(outcome["state"] == state for outcome in found["outcomes"])


def main() -> int:
    options = parser(__doc__)
    data = os.environ.get("MILLHAND_DATA")
    options.add_argument("--data", type=Path, default=Path(data) / "cmapss" if data else None)
    options.add_argument("--model", nargs="*", default=["rig-fault", "rig-wave", "turbofan-rul"])
    arguments = options.parse_args()
    figures: list[Figure] = []
    screens: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder))
        for model in arguments.model:
            if model == "turbofan-rul" and arguments.data is None:
                progress("MILLHAND_DATA is not set: turbofan-rul is left out")
                continue
            found, shown = build(node, model, ["--data", str(arguments.data)] if model == "turbofan-rul" else [])
            figures += found
            screens |= shown
    return report("workshop_build", figures, screens=screens)


if __name__ == "__main__":
    sys.exit(main())
