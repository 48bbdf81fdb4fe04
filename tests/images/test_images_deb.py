"""The Debian package in a chroot of Debian 12: installed, run, upgraded, killed, removed. `make test-packages`.

Built and installed for real, so that each takes minutes: all but the way from the package to a prediction are `long`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millhand_images import deb
from millhand_images.target import ROOT, Target

CACHE = ROOT / "build" / "chroots"
BASE = CACHE / "bookworm-amd64-python3.11.tar"
INCLUDE = "python3.11,ca-certificates"
OLD, NEW = "0.1.0.dev1", "0.1.0.dev2"
KILLS = 30
DEADLINE_S = 300.0

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap, for a chroot"
    ),
]


class Node:
    """A chroot that stands for a node."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root, to its end."""
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        done = subprocess.run(
            ["chroot", str(self.root), *words], capture_output=True, text=True, env=environment, check=False, **options
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def install(self, package: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`dpkg -i` of a package that lies outside."""
        shutil.copy(package, self.root / "root")
        return self.run("dpkg", "-i", f"/root/{package.name}", check=check)

    def state(self) -> str:
        """dpkg's word of the package; empty where it does not know it."""
        return self.run("dpkg-query", "-W", "-f", "${Status}", "millhand", check=False).stdout

    def version(self) -> str:
        """What the installed command says of itself."""
        return self.run("millhand", "--version").stdout.split()[-1]

    def set_up(self) -> None:
        """A node that watches itself, with all listeners on free ports."""
        answers = self.root / "root/answers.toml"
        answers.write_text('node = "press-7"\ngroup = "plant-a"\n')
        self.run("millhand", "setup", "--answers", "/root/answers.toml", "--no-check")
        with (self.root / "etc/millhand/millhand.toml").open("a") as file:
            file.write("\n[assets.options]\nevery_ms = 500\n\n[http]\nport = 0\n")

    @contextlib.contextmanager
    def agent(self) -> Iterator[None]:
        """The agent as its unit starts it: the user millhand, with a /run/millhand of its own."""
        self.run("install", "-d", "-o", "millhand", "-g", "millhand", "-m", "0750", "/run/millhand")
        log = (self.root / "root/agent.log").open("w")
        words = ("setpriv", "--reuid=millhand", "--regid=millhand", "--init-groups", "millhand", "run")
        agent = subprocess.Popen(["chroot", str(self.root), *words], stdout=log, stderr=log)
        try:
            self.wait(lambda: self.run("millhand", "--json", check=False).stdout.find('"uptime_s"') >= 0)
            yield
        finally:
            agent.terminate()
            assert agent.wait(60) == 0, (self.root / "root/agent.log").read_text()
            log.close()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; with the agent's log where it never does."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, (self.root / "root/agent.log").read_text()
            time.sleep(0.2)

    def rows(self) -> int:
        """Readings in the store of the agent that runs."""
        return len(self.run("millhand", "readings", "node", check=False).stdout.splitlines())


class Packages(dict[str, Path]):
    """The package of each version, built when it is first asked for."""

    def __missing__(self, version: str) -> Path:
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


@contextlib.contextmanager
def mounted(root: Path) -> Iterator[Node]:
    """proc and a few devices, as a chroot needs them; unmounted whatever happens."""
    done = subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield Node(root)
    finally:
        subprocess.run(["umount", "--lazy", root / "proc"], check=False)


@pytest.fixture
def node(base: Path, tmp_path: Path) -> Iterator[Node]:
    root = tmp_path / "node"
    root.mkdir()
    subprocess.run(["tar", "-C", str(root), "-xf", str(base)], check=True)
    with mounted(root) as made:
        yield made
    shutil.rmtree(root, ignore_errors=True)


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
def test_from_install_to_purge(node: Node, packages: Packages) -> None:
    """One life of a package: each step begins where the one before ended."""
    said = node.install(packages[OLD])
    assert "Next: sudo millhand setup" in said.stdout
    assert node.version() == OLD
    assert json.loads(node.run("millhand", "hw", "show", "--json").stdout)["cpu"]
    node.set_up()
    with node.agent():
        node.wait(lambda: node.rows() > 1)
    before = _kept(node)

    node.install(packages[NEW])
    assert (node.version(), _kept(node)) == (NEW, before)
    again = node.install(packages[NEW])
    assert "millhand" in again.stdout
    assert (node.version(), _kept(node)) == (NEW, before)
    node.install(packages[OLD])
    assert (node.version(), _kept(node)) == (OLD, before)
    with node.agent():
        node.wait(lambda: node.rows() > 1)

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


def test_a_prediction_needs_no_network(node: Node, packages: Packages) -> None:
    node.install(packages[NEW])
    node.set_up()
    with (node.root / "etc/millhand/millhand.toml").open("a") as file:
        file.write("\n[plugins.rig]\n")
    row = ",".join(map(str, range(1, 45)))
    with node.agent():
        node.run("millhand", "model", "load", "rig-fault")
        done = node.run("millhand", "predict", "rig-fault", "--format", "csv", input=f"{row}\n")
    assert done.stdout.strip(), done.stderr


@pytest.mark.long
def test_a_full_disk_ends_the_install_and_it_can_be_taken_up_again(
    base: Path, tmp_path: Path, packages: Packages
) -> None:
    root = tmp_path / "full"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=420m", "tmpfs", root], check=True)
    try:
        subprocess.run(["tar", "-C", str(root), "-xf", str(base)], check=True)
        with mounted(root) as node:
            shutil.copy(packages[NEW], root / "root")
            failed = node.run("dpkg", "-i", f"/root/{packages[NEW].name}", check=False)
            assert failed.returncode != 0
            assert "No space left on device" in failed.stderr
            subprocess.run(["mount", "-o", "remount,size=1200m", root], check=True)
            node.install(packages[NEW])
            assert node.version() == NEW
    finally:
        subprocess.run(["umount", "--lazy", root], check=False)


@pytest.mark.long
def test_a_read_only_file_system_is_said_and_changes_nothing(node: Node, packages: Packages) -> None:
    node.install(packages[OLD])
    node.set_up()
    shutil.copy(packages[NEW], node.root / "root")
    subprocess.run(["mount", "--bind", node.root / "usr", node.root / "usr"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", node.root / "usr"], check=True)
        failed = node.run("dpkg", "-i", f"/root/{packages[NEW].name}", check=False)
        assert failed.returncode != 0
        assert "Read-only file system" in failed.stderr
        assert node.version() == OLD
    finally:
        subprocess.run(["umount", "--lazy", node.root / "usr"], check=False)
    node.install(packages[NEW])
    assert node.version() == NEW


@pytest.mark.long
def test_killed_anywhere_an_install_or_upgrade_can_be_taken_up_again(node: Node, packages: Packages) -> None:
    """KILLS times: dpkg and all below it die at a random moment; the same install again ends well and data is whole."""
    chance = random.Random(7)
    node.install(packages[OLD])
    node.set_up()
    with node.agent():
        node.wait(lambda: node.rows() > 1)
    before = _kept(node)
    begin = time.monotonic()
    node.install(packages[NEW])
    whole_s = time.monotonic() - begin
    installed, killed = NEW, 0
    for number in range(KILLS):
        if number % 5 == 4:  # a fresh install instead of an upgrade
            node.run("dpkg", "--remove", "millhand")
        wanted = OLD if installed == NEW else NEW
        killed += _install_killed(node, packages[wanted], chance.uniform(0, 1.1 * whole_s))
        assert _kept(node) == before, number
        node.run("dpkg", "--configure", "-a", check=False)  # refuses what must be installed anew
        if node.state() != "install ok installed":
            node.install(packages[wanted])
        installed = node.version()
        assert installed in (OLD, NEW)
        assert node.run("dpkg", "--verify", "millhand").stdout == "", number
    assert killed >= KILLS // 2, "most must hit the install, not what comes after it"
    node.install(packages[NEW])
    with node.agent():
        rows = node.rows()
        node.wait(lambda: node.rows() > rows)


def _install_killed(node: Node, package: Path, after_s: float) -> bool:
    """Install, and kill -9 everything that does after `after_s`; returns whether it was still at it."""
    shutil.copy(package, node.root / "root")
    words = ["chroot", str(node.root), "dpkg", "-i", f"/root/{package.name}"]
    doing = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        doing.wait(after_s)
    running = doing.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(doing.pid, signal.SIGKILL)
    doing.wait()
    return running


def _kept(node: Node) -> dict[str, tuple[int, bytes]]:
    """What must outlive everything but a purge: the configuration and the store, by owner and content."""
    places = [*(node.root / "etc/millhand").rglob("*"), *(node.root / "var/lib/millhand").rglob("*")]
    return {
        str(path.relative_to(node.root)): (path.stat().st_uid, path.read_bytes()) for path in places if path.is_file()
    }


def _files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*")]
