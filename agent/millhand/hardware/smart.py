"""smartctl --json: what a disk says of itself."""

from __future__ import annotations

import json
from typing import Any

from millhand.hardware.facts import Disk, Hardware, Problem


def read_smart(text: str, source: str) -> Hardware:
    """Read `smartctl -a --json DEVICE` or `smartctl --scan --json`."""
    try:
        data = json.loads(text)
    except ValueError as error:
        problem = Problem(source, "disks", f"it is not whole JSON ({error})", "smartctl -a --json /dev/nvme0n1")
        return Hardware(source=source, problems=(problem,))
    if not isinstance(data, dict):
        return Hardware(source=source, problems=(Problem(source, "disks", "it is no JSON object", "smartctl --json"),))
    if isinstance(data.get("devices"), list):
        named = [_name(device) for device in data["devices"] if isinstance(device, dict)]
        return Hardware(source=source, disks=tuple(Disk(name=name) for name in named if name))
    disk = Disk(
        name=_name(data.get("device")),
        model=_text(data.get("model_name") or data.get("scsi_model_name")),
        kind=_kind(data),
        total_bytes=_number(data, "user_capacity", "bytes", whole=True),
        healthy=_healthy(data),
        temperature_c=_number(data, "temperature", "current"),
        wear_percent=_number(data, "endurance_used", "current_percent"),
    )
    problems = []
    if disk.healthy is False:
        message = f"disk {disk.name} reports that it is failing"
        problems.append(Problem(source, "disks", message, "save its data and have it replaced"))
    return Hardware(source=source, disks=(disk,), problems=tuple(problems))


def _name(device: Any) -> str:
    """`/dev/nvme0n1` as the kernel calls it: `nvme0n1`."""
    return _text(device.get("name")).rpartition("/")[2] if isinstance(device, dict) else ""


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _kind(data: dict[str, Any]) -> str:
    device = data.get("device")
    if isinstance(device, dict) and device.get("type") == "nvme":
        return "nvme"
    speed = data.get("rotation_rate")
    return {True: "ssd", False: "hdd"}[speed == 0] if isinstance(speed, int) else ""


def _number(data: dict[str, Any], *keys: str, whole: bool = False) -> Any:
    current: Any = data
    for key in keys:
        current = current.get(key) if isinstance(current, dict) else None
    if isinstance(current, bool) or not isinstance(current, int | float):
        return None
    return int(current) if whole else float(current)


def _healthy(data: dict[str, Any]) -> bool | None:
    status = data.get("smart_status")
    passed = status.get("passed") if isinstance(status, dict) else None
    return passed if isinstance(passed, bool) else None
