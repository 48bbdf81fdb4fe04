"""Where the kits for packages, nodes and the pages' commands lie; what tests of bundles share."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "docs/kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "language" / "kit"))

from bundle_kit import INSTALL, RECORDED, Root, install, root, two_versions

from millhand.proof.keys import PrivateKey, new_pair, public_path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    return new_pair(tmp_path_factory.mktemp("keys"), "plant")


@pytest.fixture(scope="module")
def public(key: PrivateKey) -> Path:
    return public_path(key.path.parent, "plant")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, key: PrivateKey) -> dict[str, Path]:
    return two_versions(tmp_path_factory.mktemp("bundles"), key)


@pytest.fixture(scope="module")
def roots() -> Iterator[Path]:
    """Where roots can be made; skips where this machine lets no one mount."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="millhand-roots-", dir=where) as folder:
        if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("dpkg") is None:
            pytest.skip("installs need root, unshare and dpkg")
        tried = root(Path(folder) / "tried").run("sh", "-c", f"test -f {INSTALL} && dpkg-query -W dpkg")
        if tried.returncode:
            pytest.skip(f"no overlay on / can be mounted here: {tried.stderr.strip()}")
        yield Path(folder)


@pytest.fixture
def node(roots: Path) -> Iterator[Root]:
    """A node with one recorded file, and nothing of millhand."""
    with tempfile.TemporaryDirectory(dir=roots) as folder:
        yield _with_record(root(Path(folder) / "node"))


@pytest.fixture(scope="module")
def old(roots: Path, made: dict[str, Path], public: Path) -> Root:
    """A node that has version 1.0."""
    made_root = _with_record(root(roots / "old"))
    done = install(made_root, made["1.0"], public)
    assert done.returncode == 0, done.stderr
    return made_root


def _with_record(made_root: Root) -> Root:
    path = made_root.upper / RECORDED
    path.parent.mkdir(parents=True)
    path.write_bytes(b"what was recorded")
    return made_root
