"""The Debian package in a chroot of Debian 12: installed, run, upgraded, killed, removed. `make test-packages`.

Built and installed for real, so that each takes minutes: all but the way from the package to a prediction are `long`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chroot_kit import Chroot, made
from kills_kit import Install, moments

from millhand_images import deb
from millhand_images.target import ROOT, Target

CACHE = ROOT / "build" / "chroots"
BASE = CACHE / "bookworm-amd64-python3.11.tar"
INCLUDE = "python3.11,ca-certificates"
OLD, NEW = "0.1.0.dev1", "0.1.0.dev2"
KILLS, REMOVALS, SEED = 30, 6, 7

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap, for a chroot"
    ),
]


class Packages(dict[str, Path]):
    """The package of each version: of the folder that TEST_PACKAGES names, else built when it is first asked for."""

    def __missing__(self, version: str) -> Path:
        if ready := os.environ.get("TEST_PACKAGES"):
            self[version] = Path(ready) / f"millhand_{deb.debian_version(version)}_amd64.deb"
        else:
            self[version] = deb.build(Target("amd64", "3.11"), ROOT / "build" / "test-packages", version, quick=True)
        return self[version]


@pytest.fixture(scope="module")
def packages() -> Packages:
    return Packages()


@pytest.fixture(scope="module")
def base() -> Path:
    """A small Debian 12 with Python, as a tar file."""
    if not BASE.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        root = CACHE / "making"
        shutil.rmtree(root, ignore_errors=True)
        words = ["debootstrap", "--variant=minbase", f"--include={INCLUDE}", "bookworm", str(root)]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"Debian cannot be had: {made.stdout[-300:]}")
        subprocess.run(["tar", "-C", str(root), "--numeric-owner", "-cf", f"{BASE}.part", "."], check=True)
        Path(f"{BASE}.part").rename(BASE)
        shutil.rmtree(root)
    return BASE


@pytest.fixture
def node(base: Path, tmp_path: Path) -> Iterator[Chroot]:
    with made(base, tmp_path / "node") as node:
        yield node


@pytest.mark.long
@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not here")
def test_lintian_finds_no_error(packages: Packages) -> None:
    judged = subprocess.run(
        ["lintian", "--quiet", "--fail-on", "error", packages[NEW]], capture_output=True, text=True, check=False
    )
    assert judged.returncode == 0, judged.stdout


@pytest.mark.long
def test_built_twice_it_is_the_same(packages: Packages, tmp_path: Path) -> None:
    again = deb.build(Target("amd64", "3.11"), tmp_path, NEW, quick=True)
    assert again.read_bytes() == packages[NEW].read_bytes()


@pytest.mark.long
def test_from_install_to_purge(node: Chroot, packages: Packages) -> None:
    """One life of a package: each step begins where the one before ended."""
    said = node.install(packages[OLD])
    assert "Next: sudo millhand setup" in said.stdout
    assert node.version() == OLD
    assert json.loads(node.run("millhand", "hw", "show", "--json").stdout)["cpu"]
    node.set_up()
    with node.agent():
        node.wait(lambda: len(node.rows()) > 1)
    before = _kept(node)

    node.install(packages[NEW])
    assert (node.version(), _kept(node)) == (NEW, before)
    again = node.install(packages[NEW])
    assert "millhand" in again.stdout
    assert (node.version(), _kept(node)) == (NEW, before)
    node.install(packages[OLD])
    assert (node.version(), _kept(node)) == (OLD, before)
    with node.agent():
        node.wait(lambda: len(node.rows()) > 1)

    before = _kept(node)
    node.run("dpkg", "--remove", "millhand")
    assert _kept(node) == before
    assert not (node.root / "usr/lib/millhand").exists()
    assert not (node.root / "usr/bin/millhand").exists()
    node.install(packages[NEW])
    assert _kept(node) == before
    node.run("dpkg", "--purge", "millhand")
    for place in ("etc/millhand", "var/lib/millhand", "usr/lib/millhand", "run/millhand"):
        assert not (node.root / place).exists(), place
    for name in ("passwd", "group"):
        assert "millhand" not in (node.root / "etc" / name).read_text()
    left = [path for path in _files(node.root / "etc") + _files(node.root / "usr") if "millhand" in path]
    assert left == []


def test_a_prediction_needs_no_network(node: Chroot, packages: Packages) -> None:
    node.install(packages[NEW])
    node.set_up()
    with node.agent():
        assert node.predict().strip()


@pytest.mark.long
def test_a_full_disk_ends_the_install_and_it_can_be_taken_up_again(
    base: Path, tmp_path: Path, packages: Packages
) -> None:
    with made(base, tmp_path / "full", "420m") as node:
        failed = node.install(packages[NEW], check=False)
        assert failed.returncode != 0
        assert "No space left on device" in failed.stderr
        subprocess.run(["mount", "-o", "remount,size=1200m", node.root], check=True)
        node.install(packages[NEW])
        assert node.version() == NEW


@pytest.mark.long
def test_a_read_only_file_system_is_said_and_changes_nothing(node: Chroot, packages: Packages) -> None:
    node.install(packages[OLD])
    node.set_up()
    subprocess.run(["mount", "--bind", node.root / "usr", node.root / "usr"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", node.root / "usr"], check=True)
        failed = node.install(packages[NEW], check=False)
        assert failed.returncode != 0
        assert "Read-only file system" in failed.stderr
        assert node.version() == OLD
    finally:
        subprocess.run(["umount", "--lazy", node.root / "usr"], check=False)
    node.install(packages[NEW])
    assert node.version() == NEW


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_killed_anywhere_an_install_or_upgrade_can_be_taken_up_again(node: Chroot, packages: Packages) -> None:
    """KILLS times the power goes: dpkg and the agent die. The same install again ends well, and nothing is lost."""
    node.install(packages[OLD])
    node.set_up()
    with node.agent():
        node.wait(lambda: len(node.rows()) > 1)
        answer, rows = node.predict(), node.rows()
    configuration = node.kept("etc/millhand")
    upgrade_s = Install(node, packages[NEW]).durations_s()
    print("an upgrade:", ", ".join(f"{phase} {duration:.2f} s" for phase, duration in upgrade_s.items()))
    alive = 0
    for number, (phase, after_s) in enumerate(moments(KILLS, upgrade_s, SEED), 1):
        fresh = number % 3 == 0
        wanted = NEW if fresh or node.version() == OLD else OLD
        if fresh:
            node.run("dpkg", "--remove", "millhand")
        else:
            agent = node.start()
            rows = _more(node, rows)
        kill = Install(node, packages[wanted]).kill(phase, after_s)
        alive += kill.alive
        found = node.version()
        if not fresh:
            agent.wait()
            assert found or phase != "unpack", "the old command stays until all new files are there"
        ended = _taken_up(node, packages[wanted])
        assert node.kept("etc/millhand") == configuration
        with node.agent():
            assert node.predict() == answer
            rows = _more(node, rows)
        print(f"kill {number:2}, {'install' if fresh else 'upgrade'} to {wanted}: {kill}; command: {found or 'none'}")
        print(f"    ends with {ended}, which runs and predicts as before; {len(rows)} rows, none lost", flush=True)
    assert alive >= KILLS * 0.9, "nearly all must hit the install, not what comes after it"


@pytest.mark.long
def test_an_installation_that_lost_files_says_so_and_is_mended_by_the_same_package(
    node: Chroot, packages: Packages
) -> None:
    node.install(packages[NEW])
    site = node.root / "usr/lib/millhand/lib/python3.11/site-packages"
    for lost in ("click", "millhand/config.py"):
        _lose(site / lost)
        said = node.run("millhand", "check", check=False)
        assert said.returncode == 1
        assert "Error: this installation is damaged: No module named" in said.stderr
        assert "install the same package again" in said.stderr
        assert "Traceback" not in said.stderr
        assert lost in node.run("dpkg", "--verify", "millhand", check=False).stdout
        _mend(node, packages[NEW])
    (node.root / "usr/lib/millhand/bin/python3.11").unlink()
    assert node.version() == "", "the kernel finds no interpreter, and the shell says so"
    _mend(node, packages[NEW])


def _lose(path: Path) -> None:
    """Delete a folder, or a module with what was compiled of it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
        (path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc").unlink()


def _mend(node: Chroot, package: Path) -> None:
    node.install(package)
    assert node.run("dpkg", "--verify", "millhand").stdout == ""
    assert node.version() == NEW


@pytest.mark.long
def test_a_removal_that_is_killed_is_taken_up_again_or_undone(node: Chroot, packages: Packages) -> None:
    node.install(packages[NEW])
    node.set_up()
    with node.agent():
        node.wait(lambda: len(node.rows()) > 1)
    before = _kept(node)
    begin = time.monotonic()
    node.run("dpkg", "--remove", "millhand")
    whole_s = time.monotonic() - begin
    chance = random.Random(SEED)
    for number in range(REMOVALS):
        node.install(packages[NEW])
        removal = subprocess.Popen(node.command("dpkg", "--remove", "millhand"), stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            removal.wait(chance.uniform(0, whole_s))
        node.kill()
        removal.wait()
        print(f"removal {number + 1}: killed, {node.state() or 'not known'}, command: {node.version() or 'none'}")
        assert _kept(node) == before
        if number % 2:
            node.install(packages[NEW])
            assert node.version() == NEW
            assert node.run("dpkg", "--verify", "millhand").stdout == ""
        else:
            node.run("dpkg", "--remove", "millhand")
            assert not (node.root / "usr/lib/millhand").exists()
        assert _kept(node) == before


def _more(node: Chroot, rows: list[str]) -> list[str]:
    """Wait until the agent that runs has recorded more than `rows`, which must all be there; returns all."""
    node.wait(lambda: len(node.rows()) > len(rows))
    now = node.rows()
    assert now[: len(rows)] == rows
    return now


def _taken_up(node: Chroot, package: Path) -> str:
    """Go on as the page on packages says; returns the version that is installed then, whole."""
    node.run("dpkg", "--configure", "-a", check=False)  # refuses what must be installed anew
    if node.state() != "install ok installed":
        node.install(package)
    assert node.state() == "install ok installed"
    assert node.run("dpkg", "--verify", "millhand").stdout == ""
    assert not list((node.root / "usr").rglob("*.dpkg-new"))
    version = node.version()
    assert version in (OLD, NEW)
    return version


def _kept(node: Chroot) -> dict[str, tuple[int, bytes]]:
    """What must outlive everything but a purge: the configuration and the store."""
    return node.kept("etc/millhand", "var/lib/millhand")


def _files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*")]
