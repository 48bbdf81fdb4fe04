"""What is known of GPU models without asking them, and one spelling for what the tools print."""

from __future__ import annotations

import re

# Model name -> (architecture, compute capability), from NVIDIA's CUDA GPUs page. The first that matches holds, so the
# narrow ones stand before the wide ones. A driver or NVML that says it itself wins.
MODELS = (
    (r"\bGB?300\b|\bB300\b", "Blackwell", "10.3"),
    (r"\bGB?200\b|\bB[12]00\b", "Blackwell", "10.0"),
    (r"Blackwell|RTX 50\d0|RTX PRO \d000", "Blackwell", "12.0"),
    (r"\bG?H[128]00\b|\bH20\b", "Hopper", "9.0"),
    (r"\bL40S?\b|\bL4\b|\bL20?\b|RTX 40\d0|\bAda\b", "Ada Lovelace", "8.9"),
    (r"Orin", "Ampere", "8.7"),
    (r"\bA[138]00X?\b|\bA30\b", "Ampere", "8.0"),
    (r"\bA(10[GM]?|16|2|40)\b|RTX 30\d0|RTX A\d{3,4}", "Ampere", "8.6"),
    (r"Thor", "Blackwell", "11.0"),
    (r"Xavier", "Volta", "7.2"),
    (r"\bT4G?\b|RTX 20\d0|GTX 16\d0|Quadro RTX|\bT(400|600|1000)\b|TITAN RTX", "Turing", "7.5"),
    (r"\bV100|TITAN V", "Volta", "7.0"),
    (r"Tegra X2|\bTX2\b", "Pascal", "6.2"),
    (r"\bP100\b|\bGP100\b", "Pascal", "6.0"),
    (r"\bP(40|4|6)\b|GTX 10\d0|Quadro P\d+|TITAN X[pP]", "Pascal", "6.1"),
)
# Streaming multiprocessors of the smallest MIG slice, and so the `1g` of a profile's name.
SLICE_MULTIPROCESSORS = {"8.0": 14, "9.0": 16}
# What the tools print where they know nothing.
NOTHING = ("", "n/a", "not supported", "not available", "none", "unknown error", "err!", "gpu is lost")
GIB = 1 << 30
UNITS = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "kb": 1 << 10, "mb": 1 << 20}


def model_facts(name: str) -> tuple[str, str]:
    """(architecture, compute capability) of a GPU by its name; empty where the name is not known."""
    for pattern, architecture, capability in MODELS:
        if re.search(pattern, name):
            return architecture, capability
    return "", ""


def known(text: str | None) -> str:
    """The text, or "" where it says in one of the tools' ways that there is nothing."""
    bare = (text or "").strip().strip("[]").strip()
    if bare.lower() in NOTHING or bare.lower().startswith(("requested functionality", "unknown error")):
        return ""
    return bare


def number(text: str | None) -> float | None:
    """The leading number of `67.03 W` or `27 C`, else None."""
    match = re.match(r"-?\d{1,12}(\.\d{1,9})?(?![\w.])", known(text), re.A)
    return float(match[0]) if match else None


def whole(text: str | None) -> int | None:
    value = number(text)
    return None if value is None else int(value)


def size_bytes(text: str | None) -> int | None:
    """`24576 MiB` or `24576MiB` in bytes, else None."""
    match = re.match(r"(\d{1,12})\s*([KMG]?i?B)\b", known(text), re.A | re.I)
    return int(match[1]) * UNITS.get(match[2].lower(), GIB) if match else None


def flag(text: str | None) -> bool | None:
    """`Enabled`/`On` and `Disabled`/`Off` as a bool, anything else None."""
    return {"enabled": True, "on": True, "disabled": False, "off": False}.get(known(text).lower())


def bus_address(text: str | None) -> str:
    """One spelling for `0B:00.0`, `0000:0B:00.0` and `00000000:0B:00.0`: `00000000:0b:00.0`."""
    match = re.fullmatch(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", known(text).lower())
    return f"{int(match[1] or '0', 16):08x}:{match[2]}:{match[3]}.{match[4]}" if match else ""


def slice_name(capability: str, multiprocessors: int | None, memory_bytes: int | None) -> str:
    """The MIG profile by its size: 14 multiprocessors and 5952 MiB on a card of 8.0 are `1g.6gb`."""
    unit = SLICE_MULTIPROCESSORS.get(capability)
    if not unit or not multiprocessors or not memory_bytes or multiprocessors < unit:
        return ""
    return f"{multiprocessors // unit}g.{-(-memory_bytes // GIB)}gb"


def slice_bytes(profile: str) -> int | None:
    """The nominal memory of a MIG profile's name: 6 GiB for `1g.6gb`."""
    match = re.search(r"g\.(\d{1,3})gb", profile)
    return int(match[1]) * GIB if match else None
