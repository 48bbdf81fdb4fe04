"""A release: wheel, sdist, packages, bundle, bill of materials, sums, upgrade notes; the same bytes each time."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click

from millhand.bundle import openpgp
from millhand.bundle.archive import TRAILER_BYTES
from millhand.proof.keys import PrivateKey
from millhand_images import deb, wheels
from millhand_images.bundle import Order, build, signing_key
from millhand_images.process import BuildError, call
from millhand_images.target import ROOT, Target

SUMS = "SHA256SUMS"
NOTES = "UPGRADE.md"
BILL = "sbom.cdx.json"
PYTHON = "3.11"


def notes(version: str, changelog: str) -> str:
    """What CHANGELOG.md says of a version. Raises BuildError where it has no section of it, or an empty one."""
    found = re.search(
        rf"^## \[?{re.escape(version)}(?![\w.])[^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if found is None or not found[1].strip():
        raise BuildError(
            f"CHANGELOG.md has no section '## {version}' with text",
            hint=f"name '## Unreleased' so, or change __version__ in {wheels.VERSION_FILE}",
        )
    return f"# millhand {version}\n\n{found[1].strip()}\n"


def require_clean(root: Path = ROOT) -> None:
    """Raises BuildError where the tree differs from its last commit."""
    changed = call(["git", "status", "--porcelain"], cwd=root).strip()
    if changed:
        raise BuildError(f"the tree differs from its last commit:\n{changed}", hint="commit it, or git stash -u")


def python_files(out: Path, root: Path = ROOT) -> list[Path]:
    """Build wheel and sdist of what is committed into the folder `out`. Raises BuildError."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(deb.source_date())}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Files that are ignored or not tracked never reach a release.
        archive = Path(folder) / "tree.tar"
        call(["git", "archive", "--format=tar", f"--output={archive}", "HEAD"], cwd=root)
        tree = Path(folder) / "tree"
        with tarfile.open(archive) as source:
            source.extractall(tree, filter="data")
        call([sys.executable, "-m", "hatchling", "build", "-d", out], environment, tree)
    return sorted([*out.glob("millhand-*.whl"), *out.glob("millhand-*.tar.gz")])


def release(out: Path, key: PrivateKey, architectures: tuple[str, ...]) -> list[Path]:
    """Build everything into the folder `out`, which must be empty. Raises MillhandError."""
    require_clean()
    text = notes(wheels.version(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if out.exists() and any(out.iterdir()):
        raise BuildError(f"'{out}' is not empty", hint="name an empty folder with --out")
    python_files(out)
    (out / NOTES).write_text(text, encoding="utf-8")
    packages = {architecture: deb.build(Target(architecture, PYTHON), out) for architecture in architectures}
    if "amd64" in packages:
        path = build(Order(target="cpu", key=key, package=packages["amd64"]), out)
        with tarfile.open(path, "r:") as archive:
            bill = archive.extractfile(BILL)
            assert bill is not None
            (out / BILL).write_bytes(bill.read())
    sign(out, key)
    return sorted(out.iterdir())


def sign(out: Path, key: PrivateKey) -> None:
    """Write SHA256SUMS of all files in a folder, its signature and the certificate that checks it."""
    lines = []
    for path in sorted(out.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    text = "".join(lines).encode()
    (out / SUMS).write_bytes(text)
    (out / f"{SUMS}.sig").write_bytes(openpgp.signature(key, text))
    (out / "KEY.pgp").write_bytes(openpgp.certificate(key))


def differences(one: Path, other: Path) -> Iterator[str]:
    """What differs between two builds: the file, and in archives its members."""
    names = sorted({path.name for path in one.iterdir()} | {path.name for path in other.iterdir()})
    for name in names:
        first, second = one / name, other / name
        if not (first.exists() and second.exists()):
            yield f"{name}: only in '{one if first.exists() else other}'"
        elif first.read_bytes() != second.read_bytes():
            left, right = members(first), members(second)
            inside = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
            yield f"{name}: {', '.join(inside) or 'its own bytes'}"


def members(path: Path) -> dict[str, str]:
    """Member of an archive -> its content's SHA-256, with a package's data inside; of no archive none."""
    if path.suffix == ".deb":
        with tempfile.TemporaryDirectory() as folder:
            call(["dpkg-deb", "--raw-extract", path, Path(folder) / "raw"])
            raw = Path(folder) / "raw"
            return {str(file.relative_to(raw)): _sum(file.read_bytes()) for file in raw.rglob("*") if file.is_file()}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {name: _sum(archive.read(name)) for name in archive.namelist()}
    if path.suffix in (".gz", ".bundle"):
        data = path.read_bytes()
        body = data[:-TRAILER_BYTES] if path.suffix == ".bundle" else data
        with tarfile.open(fileobj=io.BytesIO(body)) as source:
            return {
                member.name: f"{member.mode:o} {member.mtime} {_sum(content.read())}"
                for member in source
                if (content := source.extractfile(member)) is not None
            }
    return {}


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@click.group("release")
def command() -> None:
    """Build a release, or build it twice and compare."""


def _options(function: click.decorators.FC) -> click.decorators.FC:
    function = click.option("--key", type=click.Path(path_type=Path), help="The plant's private key (PEM).")(function)
    return click.option(
        "--arch", "architectures", multiple=True, default=("amd64", "arm64"), show_default=True, help="Packages for."
    )(function)


@command.command("build")
@_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("dist/release"), show_default=True)
def build_command(key: Path | None, architectures: tuple[str, ...], out: Path) -> None:
    """Build a release into an empty folder."""
    for path in release(out, signing_key(key), architectures):
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@command.command("check")
@_options
@click.option("--quick", is_flag=True, help="Only wheel and sdist.")
def check_command(key: Path | None, architectures: tuple[str, ...], quick: bool) -> None:
    """Build twice in different folders and compare every byte; ends with 1 where something differs."""
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "one", Path(folder) / "somewhere/else"
        signer = signing_key(key)
        for out in (one, other):
            if quick:
                require_clean()
                python_files(out)
            else:
                release(out, signer, architectures)
        found = list(differences(one, other))
        names = [path.name for path in sorted(one.iterdir())]
    for line in found:
        click.echo(f"differs  {line}")
    if found:
        sys.exit(1)
    click.echo(f"the same bytes twice: {', '.join(names)}")
