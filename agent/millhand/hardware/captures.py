"""Recordings: which tool a text came from, told by its content, and the reader of each."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from pathlib import Path

from millhand.hardware import jetson, smart, smi_query, smi_tables, tegrastats
from millhand.hardware.facts import Hardware, Problem

Reader = Callable[[str, str], Hardware]
FILE_BYTES_CAP = 16 << 20

FAILURES = "NVIDIA-SMI has failed|No devices were found|Failed to initialize NVML|Unable to determine the device handle"
# kind -> (pattern that only this kind's text holds, reader, order of trust: the lower number wins).
KINDS: dict[str, tuple[str, Reader, int]] = {
    "nvidia-smi -q -x": (r"<nvidia_smi_log", smi_query.read_xml, 10),
    "nvidia-smi --query-gpu": (r"\A(?=[^\n]*\b(?:uuid|name|index)\b)[a-z_.]+(?: \[\S+\])?,[^\n]*\b(?:name|uuid)\b",
                               smi_query.read_csv, 11),
    "nvidia-smi -q": (r"={5,}NVSMI LOG={5,}", smi_query.read_text, 12),
    "nvidia-smi": (r"\| NVIDIA-SMI ", smi_tables.read_table, 13),
    "nvidia-smi nvlink": (r"^\s+Link \d+: [\d.]+ GB/s|^Nvlink queries", smi_tables.read_nvlink, 15),
    "nvidia-smi -L": (r"^GPU \d+: .+ \(UUID: ", smi_tables.read_list, 14),
    "nvidia-smi mig -lgip": (r"\| GPU instance profiles:|^GPU\s+\d+ Profile ID", smi_tables.read_profiles, 17),
    "nvidia-smi mig -lgi": (r"\| GPU instances:|No GPU instances found", smi_tables.read_instances, 16),
    "nvidia-smi topo -m": (r"\A\s*(?:\x1b\[4m)?\s*GPU0[\t ]|^GPU0\t", smi_tables.read_topology, 18),
    "fabricmanager.log": (r"\[tid \d+\]", smi_tables.read_fabric_log, 30),
    "lspci -nn": (r"^\S+ [^\n]+ \[0[0-9a-f]{3}\]: .+\[[0-9a-f]{4}:[0-9a-f]{4}\]", smi_tables.read_lspci, 31),
    "nvidia-smi (failed)": (rf"\A\s*(?:{FAILURES})", smi_tables.read_failure, 32),
    "nv_tegra_release": (r"^# R\d\d \(release\)", jetson.read_release, 2),
    "jetson_release": (r"jetson-stats|^\s*- P-Number:", jetson.read_jetson_release, 4),
    "nvpmodel -q": (r"^NV Power Mode: |^pmode:\d+", jetson.read_nvpmodel, 3),
    "tegrastats": (r"\bRAM \d+/\d+MB", tegrastats.read_tegrastats, 5),
    "smartctl --json": (r'"smartctl"\s*:', smart.read_smart, 20),
}  # fmt: skip
# Files that a recorded root names in a fixed way: their kind holds even where the content is damaged.
NAMES = {
    "nvidia-smi-q.xml": "nvidia-smi -q -x",
    "nvidia-smi-q.csv": "nvidia-smi --query-gpu",
    "nvidia-smi-q.txt": "nvidia-smi -q",
    "nvidia-smi.txt": "nvidia-smi",
    "nvidia-smi-L.txt": "nvidia-smi -L",
    "nvidia-smi-lgi.txt": "nvidia-smi mig -lgi",
    "nvidia-smi-lgip.txt": "nvidia-smi mig -lgip",
    "topo-m.txt": "nvidia-smi topo -m",
    "nvlink.txt": "nvidia-smi nvlink",
    "lspci.txt": "lspci -nn",
    "fabricmanager.log": "fabricmanager.log",
    "nv_tegra_release": "nv_tegra_release",
    "jetson_release.txt": "jetson_release",
    "nvpmodel.txt": "nvpmodel -q",
    "tegrastats.txt": "tegrastats",
}
# What looks like a recording and is none: (pattern, why).
REFUSED = (
    (r"^# (?:HELP|TYPE) \w+", "it holds Prometheus metrics, which an exporter made; the hardware is not in it"),
    (
        r"\Amodel,compatible",
        "it lists many boards, one a row; lay one board's model and compatible into proc/device-tree",
    ),
)
# A collection of captures in one file: a bar, a title, the command, a bar.
SECTION = re.compile(r"^#{20,}\n# [^\n]+\n(?:# \$ [^\n]*\n)?#{20,}\n", re.M)


def read_capture(path: Path, label: str) -> tuple[list[tuple[int, Hardware]], str]:
    """Read one file. Returns (order of trust, facts) of each part, and why the file was left out, if it was."""
    try:
        text = _load(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        return [], f"it cannot be read ({type(error).__name__})"
    for pattern, why in REFUSED:
        if re.search(pattern, text, re.M):
            return [], why
    parts = [part for part in SECTION.split(text) if part.strip()] if SECTION.search(text) else [text]
    found: dict[str, Hardware] = {}
    for part in parts:
        kind = recognise(part)
        # In a collection the first of a kind holds: later ones are the same node a little later.
        if kind and kind not in found:
            found[kind] = _read(kind, part, label)
    name = path.name.removesuffix(".gz")
    if not found and name in NAMES:
        found[NAMES[name]] = _read(NAMES[name], text, label)
    if not found:
        return [], "its content is of no kind that millhand knows"
    return [(KINDS[kind][2], facts) for kind, facts in found.items()], ""


def recognise(text: str) -> str:
    """The kind of a text, "" where it is none of KINDS."""
    return next((kind for kind, (pattern, _, _) in KINDS.items() if re.search(pattern, text, re.M)), "")


def _read(kind: str, text: str, label: str) -> Hardware:
    """Read one part; a reader that stumbles over damage costs this part alone."""
    try:
        return KINDS[kind][1](text, label)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        message = f"{kind} could not be understood ({type(error).__name__}: {error})"
        return Hardware(source=label, problems=(Problem(label, kind, message, "record it again"),))


def _load(path: Path) -> str:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        data = stream.read(FILE_BYTES_CAP)
    return data.decode("utf-8", "replace").removeprefix("\ufeff")
