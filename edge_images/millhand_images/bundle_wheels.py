"""Wheels beyond the package's own, for the folder that stands before them."""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from millhand_images.lock import canonical, read
from millhand_images.process import pip
from millhand_images.target import MACHINES, ROOT, Target


def requirements(target: Target, extras: Sequence[str]) -> list[str]:
    """What these extras ask for on the target; markers are judged here, since pip would judge them for this machine."""
    from packaging.requirements import Requirement

    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    environment = {"platform_machine": MACHINES[target.arch], "python_version": target.python, "sys_platform": "linux"}
    found = []
    for line in (line for extra in extras for line in named[extra]):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            found.append(str(requirement))
    return found


def further(target: Target, extras: Sequence[str], cache: Path) -> list[Path]:
    """The wheels of these extras with all that they need and the package lacks, sorted. Raises BuildError.

    What the package has keeps its version.
    """
    wanted = requirements(target, extras)
    if not wanted:
        return []
    here = read(target)
    names = {pin.name for pin in here}
    folder = cache / f"{target.name}-further"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        constraints, report = Path(scratch) / "constraints.txt", Path(scratch) / "report.json"
        constraints.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in here), encoding="ascii")
        words: list[str | Path] = ["install", "--quiet", "--dry-run", "--ignore-installed", "--target", scratch]
        pip([*words, "--report", report, "--constraint", constraints, *target.pip_options(), *wanted])
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
        pins = [
            f"{entry['metadata']['name']}=={entry['metadata']['version']} "
            f"--hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}\n"
            for entry in found
            if canonical(entry["metadata"]["name"]) not in names
        ]
        listed = Path(scratch) / "pins.txt"
        listed.write_text("".join(pins), encoding="ascii")
        words = ["download", "--quiet", "--no-deps", "--require-hashes", "--requirement", listed]
        pip([*words, "--find-links", folder, "--dest", folder, *target.pip_options()])
    versions = {
        (canonical(entry["metadata"]["name"]), entry["metadata"]["version"])
        for entry in found
        if canonical(entry["metadata"]["name"]) not in names
    }
    return sorted(path for path in folder.glob("*.whl") if name_and_version(path) in versions)


def name_and_version(path: Path) -> tuple[str, str]:
    """The name (PEP 503) and version of a wheel, from its file name."""
    name, version, *_ = path.name.split("-")
    return canonical(name), version
