"""Bundles with a small package in place of the real one, and roots to install them in: a system, written elsewhere.

A root is an overlay on `/`, or on the folder of another system, in a mount and network namespace of its own: what an
install changes lies in `upper`, and nothing else. It knows no package lists, as a node without a network.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from millhand.bundle.archive import TRAILER_BYTES, trailer
from millhand.bundle.manifest import INDEX, SCRIPT, Deb
from millhand.proof.keys import PrivateKey
from millhand_images.bundle_debs import describe, index
from millhand_images.bundle_file import Content, write

PROJECT = Path(__file__).parents[3]
INSTALL = PROJECT / "agent/millhand/bundle" / SCRIPT
CODE = ("agent", "plugins", "profiles", "hub")
EPOCH_S = 1_700_000_000
RECORDED = "var/lib/millhand/millhand.db"
STUB = """#!/bin/sh
PYTHONPATH={path} exec {python} -m millhand "$@"
"""


def architecture() -> str:
    return subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()


def system() -> str:
    lines = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return f"{lines['ID']} {lines['VERSION_ID']}".replace('"', "")


def deb(folder: Path, version: str, needs: str = "") -> Path:
    """A package `millhand` whose command is this checkout's."""
    tree = folder / f"tree-{version}"
    for name in ("usr/bin", "var/lib/millhand", f"usr/share/doc/millhand/{version}"):
        (tree / name).mkdir(parents=True)
    stub = tree / "usr/bin/millhand"
    stub.write_text(STUB.format(path=":".join(str(PROJECT / name) for name in CODE), python=sys.executable))
    stub.chmod(0o755)
    return packed(tree, folder / f"millhand-{version}.deb", "millhand", version, needs)


def packed(tree: Path, path: Path, name: str, version: str, needs: str = "") -> Path:
    """A folder as a package."""
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture()}\n"
        f"Maintainer: The millhand maintainers\n{f'Depends: {needs}' if needs else 'Section: misc'}\n"
        "Description: stands in for the real one\n"
    )
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, path], check=True, capture_output=True)
    return path


def bundle(
    path: Path, key: PrivateKey, version: str, files: dict[str, Path], parts: Sequence[Path] = (), **changes: object
) -> Path:
    """A bundle of the package millhand, the packages that it needs, and further files."""
    package = path.parent / f"millhand-{version}.deb"
    if not package.exists():
        package = deb(path.parent, version)
    found = [describe(each) for each in (*parts, package)]
    debs = {f"debs/{number:02}-{one.package}.deb": one for number, one in enumerate(found, 1)}
    listed = path.parent / f"Packages-{version}"
    listed.write_text(index({place: one.path for place, one in debs.items()}))
    fields = {
        "version": version,
        "package": version,
        "target": "cpu",
        "architecture": architecture(),
        "system": system(),
        "python": "3.11",
        "epoch_s": EPOCH_S,
        "system_bytes": 4096,
        "debs": tuple(Deb(place, one.package, one.version) for place, one in debs.items()),
        "files": {SCRIPT: INSTALL, INDEX: listed, **{place: one.path for place, one in debs.items()}, **files},
        **changes,
    }
    write(path, Content(**fields), key)  # type: ignore[arg-type]
    return path


@dataclass(frozen=True)
class Root:
    """A system of its own, without a network."""

    folder: Path
    """On a file system that an overlay can be written to."""
    lower: tuple[Path, ...] = (Path("/"),)
    """What it was before, the uppermost first."""

    @property
    def upper(self) -> Path:
        """What differs from this machine."""
        return self.folder / "upper"

    def words(self, *words: str | Path) -> list[str]:
        script = (
            f"mount -t overlay overlay -o lowerdir={':'.join(map(str, self.lower))},upperdir={self.folder}/upper,"
            f"workdir={self.folder}/work {self.folder}/root && mount -t proc proc {self.folder}/root/proc && "
            f"for each in run var/lib/apt/lists; do mount -t tmpfs tmpfs {self.folder}/root/$each; done && "
            f"mount --bind /dev {self.folder}/root/dev && {{ ip link set lo up || true; }} 2>/dev/null && "
            f'exec chroot {self.folder}/root "$@"'
        )
        return ["unshare", "--mount", "--net", "sh", "-c", script, "sh", *map(str, words)]

    def run(self, *words: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(*words), capture_output=True, text=True, timeout=timeout_s, check=False)

    def killed(self, delay_s: float, *words: str | Path) -> bool:
        """Run a command and kill it and all its children after so long; whether it was still there."""
        process = subprocess.Popen(
            self.words(*words), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._wait_for_release()
            return True
        return False

    def files(self) -> dict[str, str]:
        """Every path that differs from this machine, and what it is; runtime folders' own times left out."""
        return {str(path.relative_to(self.upper)): _facts(path) for path in sorted(self.upper.rglob("*"))}

    def _wait_for_release(self) -> None:
        """Until no process holds the overlay any more: two mounts with one upper folder must not meet."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not self._is_free():
            time.sleep(0.01)

    def _is_free(self) -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder) in (process / "mounts").read_text():
                    return False
            except OSError:
                continue
        return True


def root(folder: Path, *lower: Path) -> Root:
    """A system that begins as `lower`, the uppermost first; none: this machine's."""
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(parents=True)
    return Root(folder, lower or (Path("/"),))


def above(origin: Root, folder: Path) -> Root:
    """The same system once more, written above the origin, which must not change any more."""
    return root(folder, origin.upper, *origin.lower)


def copied(origin: Root, folder: Path) -> Root:
    """The same system once more, with what it has changed as its own."""
    made = root(folder, *origin.lower)
    subprocess.run(["cp", "--archive", f"{origin.upper}/.", made.upper], check=True)
    return made


def _facts(path: Path) -> str:
    status = path.lstat()
    text = f"{status.st_mode:o} {status.st_uid} {status.st_gid}"
    if path.is_symlink():
        return f"{text} {path.readlink()}"
    return f"{text} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else text


def two_versions(folder: Path, key: PrivateKey) -> dict[str, Path]:
    """Bundles of two versions, each with a library, a model, a candidate and a language model of its own."""
    found = {}
    for version in ("1.0", "2.0"):
        wheel = folder / f"lib-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("shelved/__init__.py", f"version = {version!r}\n")
            archive.writestr(f"lib-{version}.data/purelib/more.py", "")
            archive.writestr(f"lib-{version}.data/scripts/tool", "")
        files = {f"wheels/{wheel.name}": wheel}
        for place in (
            "models/press/1/model.onnx",
            "models/press/1/labels.txt",
            "models/press/model.toml",
            "built/press/1/sm80/engine/model.engine",
            "built/press/1/sm80/engine/proof.json",
            "language/small/language.toml",
            "language/small/small.gguf",
        ):
            path = folder / version / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{place} of {version}\n" * 200)
            files[f"data/{place}"] = path
        found[version] = bundle(folder / f"{version}.bundle", key, version, files)
    return found


def install(node: Root, path: Path, public: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return node.run("sh", INSTALL, path, "--key", public, "--yes", *options)


def resealed(data: bytes) -> bytes:
    """The same with a last line that fits: what someone without the plant's key can make."""
    body = data[:-TRAILER_BYTES]
    return body + trailer(hashlib.sha256(body).hexdigest())


def assert_is(node: Root, *versions: str) -> None:
    """Every part is of one of these versions, whole, and what was recorded is there."""
    assert (node.upper / RECORDED).read_bytes() == b"what was recorded"
    data = node.upper / "var/lib/millhand"
    for place in ("models/press/1", "models/press", "built/press/1/sm80/engine", "language/small"):
        texts = {path.read_text().splitlines()[0].split()[-1] for path in (data / place).iterdir() if path.is_file()}
        assert len(texts) == 1 and texts <= set(versions), place
    library = (node.upper / "usr/local/lib/millhand/site-packages/shelved/__init__.py").read_text()
    assert library in {f"version = {version!r}\n" for version in versions}
