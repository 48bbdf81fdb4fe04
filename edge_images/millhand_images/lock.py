"""The wheels of a package, pinned with their hashes: edge_images/locks/<arch>-python<version>.txt, in pip's form."""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click

from millhand_images.process import BuildError, pip
from millhand_images.target import ROOT, Target, target_options

EXTRAS = ("cpu", "gateway", "knowledge", "quantize", "demo")
"""Extras of the project that every package carries."""

KINDS = {
    "": EXTRAS,
    # Container images: without a GPU's wheels, with them, and what builds an image.
    "cpu": (*EXTRAS, "language"),
    "gpu": ("gpu", "tensorrt-rtx", "gateway", "knowledge", "quantize", "language"),
    "tools": (),
}
TOOLS = ("click>=8.1,<9", "cyclonedx-bom>=7", "hatchling>=1.26")

LEFT_OUT = frozenset(
    {
        # sqlite-utils needs it to install plugins of its own.
        "pip",
        # tokenizers needs it, with all below it, to fetch from a hub; ours lie in the node's own files.
        *("huggingface-hub", "hf-xet", "filelock", "fsspec", "tqdm", "pyyaml"),
        *("httpx2", "httpcore2", "h11", "anyio", "truststore"),
    }
)
"""Wheels that others ask for and nothing in the package imports; 30 MB together."""

HEAD = "# Written by `python -m millhand_images lock`, from pyproject.toml and constraints.txt.\n"


@dataclass(frozen=True)
class Pin:
    """One wheel; `name` in its canonical form (PEP 503)."""

    name: str
    version: str
    sha256: str


def canonical(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(kind: str = "") -> list[str]:
    """What pyproject.toml asks for, with the extras of a kind."""
    if kind == "tools":
        return list(TOOLS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in KINDS[kind] for line in extras[extra])]
    # An extra that names onnxruntime is content with onnxruntime-gpu, which has the same import name.
    return [line for line in lines if kind != "gpu" or not line.startswith("onnxruntime>")]


def read(target: Target) -> list[Pin]:
    """The pins of a target. Raises BuildError where there is no lock for it, or a line is not a pin."""
    try:
        text = target.lock_path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BuildError(
            f"there is no lock for {target.name}",
            hint=f"python -m millhand_images lock --arch {target.arch} --python {target.python}",
        ) from error
    pins = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line)
        if found is None:
            raise BuildError(f"'{target.lock_path.name}': '{line}' is not a pin", hint="write the lock anew")
        pins.append(Pin(*found.groups()))
    return pins


def resolve(target: Target) -> list[Pin]:
    """Ask the package index which wheels a target needs. Raises BuildError."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(requirements(target.kind)), encoding="utf-8")
        dry: list[str | Path] = ["install", "--quiet", "--dry-run", "--ignore-installed", "--target", folder]
        pip([*dry, "--report", report, "-c", ROOT / "constraints.txt", "-r", wanted, *target.pip_options()])
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = [
        Pin(
            canonical(entry["metadata"]["name"]),
            entry["metadata"]["version"],
            entry["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for entry in found
    ]
    left_out = LEFT_OUT if target.kind != "tools" else ()
    return sorted((pin for pin in pins if pin.name not in left_out), key=lambda pin: pin.name)


@click.command("lock")
@target_options
@click.option("--kind", type=click.Choice(list(KINDS)), default="", help="Of an image: cpu, gpu or tools.")
def command(arch: str, python: str, kind: str) -> None:
    """Write the lock of a target anew."""
    target = Target(arch, python, kind)
    pins = resolve(target)
    lines = [f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n" for pin in pins]
    target.lock_path.write_text(HEAD + "".join(lines), encoding="utf-8")
    click.echo(f"{target.lock_path}: {len(pins)} wheels")
