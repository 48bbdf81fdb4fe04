"""What a bundle is made of, as a CycloneDX bill of materials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from packageurl import PackageURL

from millhand_images import wheels
from millhand_images.bundle_debs import Found
from millhand_images.bundle_wheels import key
from millhand_images.lock import read
from millhand_images.sbom import write
from millhand_images.target import Target


def bill(target: Target, system: str, debs: Sequence[Found], libraries: Sequence[Path]) -> str:
    """Every package of the system and of Python that a bundle installs, JSON. Raises SbomError."""
    bom = Bom()
    version = wheels.version()
    bom.metadata.component = Component(name="millhand", version=version, type=ComponentType.APPLICATION)
    parts = [PackageURL("pypi", None, pin.name, pin.version) for pin in read(target)]
    parts += [PackageURL("pypi", None, *key(path)) for path in libraries]
    distribution = system.partition(" ")[0]
    parts += [
        PackageURL("deb", distribution, found.package, found.version, {"arch": target.arch})
        for found in debs
        if found.package != "millhand"
    ]
    for url in parts:
        bom.components.add(
            Component(
                name=url.name,
                version=url.version,
                type=ComponentType.LIBRARY,
                purl=url,
                bom_ref=url.to_string(),
            )
        )
    return write(bom)
