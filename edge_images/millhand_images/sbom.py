"""A software bill of materials of an installed environment, as CycloneDX JSON (ECMA-424).

Two builds of the same parts give the same bytes: it holds no time and no random number.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from millhand_images.process import call

FIELDS = r"${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"
INSTALLED = "ii"


def python_packages(python: Path, project: Path | None) -> Bom:
    """What the environment of this interpreter holds, by cyclonedx-py. Raises BuildError.

    project: the pyproject.toml of what the bill is of; its name, version and licence head the bill.
    """
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--output-format", "JSON"]
    command += ["--spec-version", "1.6", "--mc-type", "application"]
    command += ["--pyproject", str(project)] if project is not None else []
    return Bom.from_json(json.loads(call([*command, str(python)])))  # type: ignore[attr-defined, no-any-return]


def system_packages(root: Path) -> Iterator[Component]:
    """What dpkg installed below `root`, by its own database. Raises BuildError."""
    release = root / "usr/lib/os-release"
    found = re.search(r"^ID=\"?([a-z]+)", release.read_text(), re.M) if release.exists() else None
    distribution = found[1] if found else "debian"
    listed = call(["dpkg-query", f"--admindir={root / 'var/lib/dpkg'}", f"--showformat={FIELDS}", "--show"])
    for line in listed.splitlines():
        state, name, version, architecture = line.split("\t")
        if state.strip() != INSTALLED:
            continue
        yield package(PackageURL("deb", distribution, name, version, {"arch": architecture}))


def package(url: PackageURL) -> Component:
    """One package, by its URL (ECMA-427)."""
    return Component(name=url.name, version=url.version, type=ComponentType.LIBRARY, purl=url, bom_ref=url.to_string())


def write(bom: Bom) -> str:
    """The bill as JSON."""
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document.pop("serialNumber", None)
    document.get("metadata", {}).pop("timestamp", None)
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


@click.command("sbom")
@click.option("--python", type=click.Path(path_type=Path), required=True, help="The environment's interpreter.")
@click.option("--project", type=click.Path(path_type=Path), help="The pyproject.toml of what the bill is of.")
@click.option("--system", type=click.Path(path_type=Path), help="List what dpkg installed below this root too.")
@click.option("--output", type=click.Path(path_type=Path), help="Write there instead of printing.")
def command(python: Path, project: Path | None, system: Path | None, output: Path | None) -> None:
    """Print what an installed environment is made of, as CycloneDX JSON."""
    bom = python_packages(python, project)
    bom.components.update(system_packages(system) if system is not None else ())
    text = write(bom)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        click.echo(f"{output}: {len(bom.components)} components")
