"""Which of its packages a bundle installs: on a real apt and dpkg, on nodes that have other software."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_kit import INSTALL, Root, bundle, copied, deb, install, packed

from millhand.proof.keys import PrivateKey

OLD, NEW = "1.0-1", "1.0-2"
"""What a library gets within a release of Debian."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A library in two versions, and the package of its headers, which fits one version alone."""
    folder = tmp_path_factory.mktemp("packages")
    needs = {"libpress": "", "libpress-dev": f"libpress (= {OLD})"}
    return {
        f"{name} {version}": packed(folder / f"{name}-{version}", folder / f"{name}-{version}.deb", name, version, need)
        for name, need in needs.items()
        for version in (OLD, NEW)
    }


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, key: PrivateKey, packages: dict[str, Path]) -> dict[str, Path]:
    """By what they ask of the library, whose new version they hold."""
    found = {}
    for name, needs in {"any": "libpress", "new": f"libpress (>= {NEW})"}.items():
        folder = tmp_path_factory.mktemp(name)
        deb(folder, "1.0", needs)
        found[name] = bundle(folder / "node.bundle", key, "1.0", {}, [packages[f"libpress {NEW}"]])
    return found


@pytest.fixture
def developed(node: Root, roots: Path, packages: dict[str, Path]) -> Iterator[Root]:
    """A node on which someone compiles: it has the old library with its headers."""
    paths = [packages[f"{name} {OLD}"] for name in ("libpress", "libpress-dev")]
    done = node.run("dpkg", "--install", *paths)
    assert done.returncode == 0, done.stderr
    yield node


def version(node: Root, package: str) -> str:
    return node.run("dpkg-query", "-W", "-f", "${Version}", package).stdout


def test_what_a_node_lacks_is_installed(node: Root, bundles: dict[str, Path], public: Path) -> None:
    told = node.run("sh", INSTALL, bundles["any"], "--key", public).stdout
    assert f"Package   libpress {NEW}\nPackage   millhand 1.0\n" in told
    done = install(node, bundles["any"], public)
    assert done.returncode == 0, done.stderr
    assert (version(node, "libpress"), version(node, "millhand")) == (NEW, "1.0")


def test_what_a_node_has_and_does_stays_with_all_that_hangs_on_it(
    developed: Root, bundles: dict[str, Path], public: Path
) -> None:
    told = developed.run("sh", INSTALL, bundles["any"], "--key", public).stdout
    assert "libpress" not in told and "Package   millhand 1.0\n" in told
    done = install(developed, bundles["any"], public)
    assert done.returncode == 0, done.stderr
    assert [version(developed, name) for name in ("libpress", "libpress-dev", "millhand")] == [OLD, OLD, "1.0"]


def test_what_is_too_old_is_replaced(
    node: Root, bundles: dict[str, Path], packages: dict[str, Path], public: Path
) -> None:
    assert node.run("dpkg", "--install", packages[f"libpress {OLD}"]).returncode == 0
    done = install(node, bundles["new"], public)
    assert done.returncode == 0, done.stderr
    assert f"Package   libpress {NEW}, in place of {OLD}\n" in done.stdout
    assert (version(node, "libpress"), version(node, "millhand")) == (NEW, "1.0")


@pytest.mark.parametrize("options", [[], ["--yes"]], ids=["asked", "told"])
def test_what_would_take_other_software_away_is_refused_with_its_names(
    developed: Root, bundles: dict[str, Path], public: Path, options: list[str]
) -> None:
    before = developed.files()
    done = developed.run("sh", INSTALL, bundles["new"], "--key", public, *options)
    assert done.returncode == 1 and "do not fit those that are installed" in done.stderr
    assert "libpress-dev" in done.stderr
    assert developed.files() == before


def test_an_interrupted_install_is_finished_with_what_belongs_to_it(
    developed: Root, roots: Path, bundles: dict[str, Path], packages: dict[str, Path], public: Path
) -> None:
    """millhand unpacked and not configured, as a kill leaves it: the library stays as it is all the same."""
    other = copied(developed, roots / "interrupted")
    assert other.run("dpkg", "--unpack", bundles["any"].parent / "millhand-1.0.deb").returncode == 0
    done = install(other, bundles["any"], public)
    assert done.returncode == 0, done.stderr
    assert [version(other, name) for name in ("libpress", "millhand")] == [OLD, "1.0"]
    audited = other.run("dpkg", "--audit")
    assert not audited.stdout, audited.stdout


def test_the_index_is_of_the_packages(bundles: dict[str, Path], tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", bundles["new"], "-C", tmp_path], check=True)
    stanzas = (tmp_path / "debs/Packages").read_text().split("\n\n")
    assert [line for line in stanzas[1].splitlines() if line.startswith("Depends:")] == [
        f"Depends: libpress (>= {NEW})"
    ]
    for stanza in stanzas:
        fields = dict(line.split(": ", 1) for line in stanza.strip().splitlines())
        assert (tmp_path / fields["Filename"]).stat().st_size == int(fields["Size"])
