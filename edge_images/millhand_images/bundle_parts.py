"""What a bundle is made of, as a CycloneDX bill of materials (ECMA-424): without a time or a random number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millhand_images import wheels
from millhand_images.bundle_debs import Found
from millhand_images.bundle_wheels import name_and_version
from millhand_images.lock import read
from millhand_images.target import Target

SPECIFICATION = "1.6"


def bill(target: Target, system: str, debs: Sequence[Found], libraries: Sequence[Path]) -> str:
    """Every package of the system and of Python that a bundle installs, JSON."""
    parts = [_part(f"pkg:pypi/{pin.name}@{pin.version}", pin.name, pin.version) for pin in read(target)]
    for name, version in map(name_and_version, libraries):
        parts.append(_part(f"pkg:pypi/{name}@{version}", name, version))
    distribution = system.partition(" ")[0]
    for found in debs:
        if found.package != "millhand":
            url = f"pkg:deb/{distribution}/{found.package}@{found.version}?arch={target.arch}"
            parts.append(_part(url, found.package, found.version))
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "millhand", "version": wheels.version()}},
        "components": sorted(parts, key=lambda part: str(part["bom-ref"])),
    }
    return json.dumps(document, indent=2) + "\n"


def _part(url: str, name: str, version: str) -> dict[str, Any]:
    return {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}
