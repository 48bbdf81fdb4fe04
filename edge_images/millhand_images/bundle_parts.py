"""What a bundle is made of, as a bill of materials: it is not installed where it is built, so its parts are listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from packageurl import PackageURL

from millhand_images import sbom, wheels
from millhand_images.bundle_debs import Found
from millhand_images.bundle_wheels import name_and_version
from millhand_images.lock import read
from millhand_images.target import Target


def bill(target: Target, system: str, debs: Sequence[Found], libraries: Sequence[Path]) -> str:
    """Every package of the system and of Python that a bundle installs, as CycloneDX JSON."""
    python = [(pin.name, pin.version) for pin in read(target)] + [name_and_version(path) for path in libraries]
    urls = [PackageURL("pypi", None, name, version) for name, version in python]
    distribution = system.partition(" ")[0]
    urls += [
        PackageURL("deb", distribution, found.package, found.version, {"arch": target.arch})
        for found in debs
        if found.package != "millhand"
    ]
    whole = Component(name="millhand", version=wheels.version(), type=ComponentType.APPLICATION, bom_ref="millhand")
    bom = Bom(components=[sbom.package(url) for url in dict.fromkeys(urls)])
    bom.metadata.component = whole
    bom.register_dependency(whole, bom.components)
    return sbom.write(bom)
