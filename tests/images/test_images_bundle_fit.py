"""Which of its packages a bundle installs: on a real apt and dpkg, on nodes that have other software."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from bundle_kit import INSTALL, Root, bundle, deb, install, packed

from millhand.proof.keys import PrivateKey

OLD, NEW = "1.0-1", "1.0-2"
"""What a library gets within a release of Debian."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A library in two versions, the package of its headers, which fits one version alone, and one that never fits."""
    folder = tmp_path_factory.mktemp("packages")
    needs = {"libpress": "", "libpress-dev": f"libpress (= {OLD})"}
    vendor = packed(folder / "vendor", folder / "vendor.deb", "vendor", "1.0", "what-nobody-has")
    return {"vendor": vendor} | {
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
def developed(node: Root, packages: dict[str, Path]) -> Root:
    """A node on which someone compiles: it has the old library with its headers."""
    paths = [packages[f"{name} {OLD}"] for name in ("libpress", "libpress-dev")]
    done = node.run("dpkg", "--install", *paths)
    assert done.returncode == 0, done.stderr
    return node


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


def status(node: Root, package: str, said: str) -> None:
    """What dpkg last knew of a package, in its journal: a kill leaves its newest words there, and nowhere else."""
    node.run(
        "sh",
        "-c",
        f"dpkg-query --status {package} | sed 's/^Status: .*/Status: install {said}/' >/var/lib/dpkg/updates/0000",
    )


def assert_whole(node: Root, *versions: str) -> None:
    """millhand, the library and what hangs on it, and nothing that dpkg is not done with."""
    names = ("millhand", "libpress", "libpress-dev")[: len(versions)]
    assert tuple(version(node, name) for name in names) == versions
    audited = node.run("dpkg", "--audit").stdout
    assert not audited, audited
    checked = node.run("apt-get", "check", "-o", "Debug::NoLocking=1")
    assert checked.returncode == 0, checked.stderr


def test_an_interrupted_install_is_finished_with_what_belongs_to_it(
    developed: Root, bundles: dict[str, Path], public: Path
) -> None:
    """millhand unpacked and not configured: the library stays as it is all the same."""
    assert developed.run("dpkg", "--unpack", bundles["any"].parent / "millhand-1.0.deb").returncode == 0
    done = install(developed, bundles["any"], public)
    assert done.returncode == 0, done.stderr
    assert_whole(developed, "1.0", OLD, OLD)


@pytest.mark.parametrize(
    "said",
    ["ok unpacked", "ok half-configured", "ok half-installed", "reinstreq unpacked", "reinstreq half-installed"],
)
@pytest.mark.parametrize("package", ["libpress", "millhand"])
def test_what_a_killed_dpkg_had_not_written_back_is_seen_and_finished(
    node: Root, bundles: dict[str, Path], public: Path, package: str, said: str
) -> None:
    assert install(node, bundles["any"], public).returncode == 0
    status(node, package, said)
    done = install(node, bundles["any"], public)
    assert done.returncode == 0 and "Nothing had to be changed" not in done.stdout, done.stderr
    assert_whole(node, "1.0", NEW)


@pytest.mark.parametrize("field", ["Triggers-Awaited: libpress", "Triggers-Pending: press"])
def test_triggers_that_a_killed_dpkg_left_are_run(
    node: Root, bundles: dict[str, Path], public: Path, field: str
) -> None:
    assert install(node, bundles["any"], public).returncode == 0
    said = field.partition(":")[0].lower()
    change = f"/^Package: millhand$/,/^$/s/^Status: .*/Status: install ok {said}\\n{field}/"
    node.run("sed", "-i", change, "/var/lib/dpkg/status")
    assert node.run("dpkg", "--audit").stdout
    done = install(node, bundles["any"], public)
    assert done.returncode == 0 and "Nothing had to be changed" not in done.stdout, done.stderr
    assert_whole(node, "1.0", NEW)


def test_a_broken_package_of_somebody_elses_does_not_turn_a_refusal_into_an_install(
    developed: Root, bundles: dict[str, Path], packages: dict[str, Path], public: Path
) -> None:
    developed.run("dpkg", "--install", packages["vendor"])
    assert "vendor" in developed.run("dpkg", "--audit").stdout
    done = install(developed, bundles["new"], public)
    assert done.returncode == 1 and "do not fit those that are installed" in done.stderr
    assert [version(developed, name) for name in ("libpress", "libpress-dev", "millhand")] == [OLD, OLD, ""]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("apt.conf.d/99release", 'APT::Default-Release "bookworm";\n'),
        ("preferences.d/own", "Package: *\nPin: release *\nPin-Priority: -1\n"),
    ],
)
def test_what_the_node_has_settled_about_archives_does_not_matter(
    node: Root, bundles: dict[str, Path], public: Path, place: str, text: str
) -> None:
    path = node.upper / "etc/apt" / place
    path.parent.mkdir(parents=True)
    path.write_text(text)
    done = install(node, bundles["any"], public)
    assert done.returncode == 0, done.stderr
    assert (version(node, "libpress"), version(node, "millhand")) == (NEW, "1.0")


def test_the_index_is_of_the_packages(bundles: dict[str, Path], tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", bundles["new"], "-C", tmp_path], check=True)
    stanzas = (tmp_path / "debs/Packages").read_text().split("\n\n")
    assert [line for line in stanzas[1].splitlines() if line.startswith("Depends:")] == [
        f"Depends: libpress (>= {NEW})"
    ]
    for stanza in stanzas:
        fields = dict(line.split(": ", 1) for line in stanza.strip().splitlines())
        assert (tmp_path / fields["Filename"]).stat().st_size == int(fields["Size"])
