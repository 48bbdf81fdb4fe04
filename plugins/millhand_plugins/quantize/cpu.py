"""What this machine's CPU does with int8."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
EXACT = ("avx512_vnni", "avx_vnni", "amx_int8")
"""They multiply and add in 32 bits. Without them x86 adds pairs of products of 8 bits in 16, which overflow: ONNX
Runtime's own advice is weights of 7 bits there (`reduce_range`)."""


def is_exact(cpuinfo: Path = CPUINFO, machine: str = "") -> bool:
    """Whether products of 8 bits are added without overflow; Arm's instructions do."""
    if (machine or platform.machine()) not in ("x86_64", "AMD64"):
        return True
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return any(flag in flags for flag in EXACT)


def weight_levels(bits: str) -> int:
    """Levels of int8 weights on each side of 0. bits: `7`, `8`, or `auto` for what this CPU needs."""
    exact = is_exact() if bits == "auto" else bits == "8"
    return 127 if exact else 63


def int8_key() -> dict[str, str]:
    """What a candidate is tied to: one made for 8 bits goes wrong on a CPU that needs 7, the other way it does not."""
    return {"int8": "8 bits"} if is_exact() else {}
