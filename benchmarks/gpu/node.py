"""The agent under measurement, and what loading and unloading costs it."""

from __future__ import annotations

import os
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent import BenchAgent
from card import SAMPLE_EVERY_S, Card
from figures import progress

VRAM_BACK_S = 10.0
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def environment(folder: Path) -> dict[str, str]:
    """What the agent needs to find its plugins where millhand runs from a source tree that is not installed."""
    if any(point.module == "millhand_plugins.onnxruntime" for point in entry_points(group="millhand")):
        return {}
    project = tomllib.loads(PROJECT.read_text())["project"]
    points = [f"{name} = {module}" for name, module in project["entry-points"]["millhand"].items()]
    information = folder / "millhand-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: millhand\nVersion: 0\n")
    (information / "entry_points.txt").write_text("[millhand]\n" + "\n".join(points) + "\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


def config(repository: Path) -> str:
    return f'[models]\npaths = ["{repository}"]\nload_timeout_s = 120\n[http]\nport = 0\n'


@dataclass
class Loaded:
    """One model that was loaded, and what that cost."""

    name: str
    seconds: float
    vram_mib: float | None
    proof: dict[str, Any]
    sockets: list[str]
    """Of the workers that hold it, one for each GPU."""


def load(agent: BenchAgent, card: Card, name: str) -> Loaded:
    before, began = card.used_mib(), time.monotonic()
    agent.call("model.load", model=name)
    seconds, after = time.monotonic() - began, card.used_mib()
    shown = agent.call("model.show", model=name)
    route = next(iter(agent.client.stream("model.routes")))["models"][name]
    proof = shown["accelerator"].get("1", {})
    taken = None if before is None or after is None else after - before
    progress(f"{name}: loaded in {seconds:.1f} s, {taken} MiB, {proof}")
    return Loaded(name, seconds, taken, proof, route["sockets"]["1"])


def unload(agent: BenchAgent, card: Card, names: Sequence[str], before_mib: float | None) -> dict[str, Any]:
    """Unload all; says how much of the card's memory did not come back, and how long it took."""
    full, began = card.used_mib(), time.monotonic()
    for name in names:
        agent.call("model.unload", model=name)
    if before_mib is None:
        return {}
    while (left := (card.used_mib() or 0.0) - before_mib) > 1 and time.monotonic() < began + VRAM_BACK_S:
        time.sleep(SAMPLE_EVERY_S)
    return {"before_mib": before_mib, "full_mib": full, "left_mib": left, "seconds": time.monotonic() - began}
