"""Releases: notes, a clean tree, the same bytes twice, and what is said of a difference."""

from __future__ import annotations

import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from millhand.bundle import openpgp
from millhand.proof.keys import new_pair
from millhand_images.bundle_debs import Found
from millhand_images.bundle_parts import bill
from millhand_images.lock import read
from millhand_images.process import BuildError
from millhand_images.release import differences, notes, python_files, require_clean, sign
from millhand_images.target import ROOT, Target

CHANGELOG = "# Changelog\n\n## Unreleased\n\nmore\n\n## 1.2.0 (2026-01-02)\n\n### Added\n- A thing.\n\n## 1.1.0\n\n"


def test_notes_are_the_section_of_the_version() -> None:
    assert notes("1.2.0", CHANGELOG) == "# millhand 1.2.0\n\n### Added\n- A thing.\n"


@pytest.mark.parametrize("version", ["1.1.0", "1.2", "2.0.0"], ids=["empty", "part of one", "none"])
def test_a_version_without_notes_is_no_release(version: str) -> None:
    with pytest.raises(BuildError, match="has no section"):
        notes(version, CHANGELOG)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "file").write_text("a")
    for words in (
        ["init", "-q"],
        ["add", "file"],
        ["-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-q", "-m", "one"],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def test_a_dirty_tree_is_refused(repository: Path) -> None:
    require_clean(repository)
    (repository / "more").write_text("b")
    with pytest.raises(BuildError, match="differs from its last commit"):
        require_clean(repository)


def test_the_bill_of_a_bundle_names_every_part_once_and_twice_the_same() -> None:
    deb = Found(Path("libc6.deb"), "libc6", "2.36-9", 1)
    own = Found(Path("millhand.deb"), "millhand", "1.2.0", 1)
    library = Path("xllamacpp-1.0-cp311-cp311-manylinux_2_28_x86_64.whl")
    texts = [bill(Target("amd64", "3.11"), "debian 12", [deb, own], [library]) for _ in range(2)]
    assert texts[0] == texts[1]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(texts[0]) is None
    urls = [part["purl"] for part in json.loads(texts[0])["components"]]
    assert {"pkg:deb/debian/libc6@2.36-9?arch=amd64", "pkg:pypi/xllamacpp@1.0"} <= set(urls)
    assert len(urls) == len(set(urls)) == len(read(Target("amd64", "3.11"))) + 2


def test_wheel_and_sdist_are_the_same_bytes_twice(tmp_path: Path) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("this is no checkout of git")
    one, other = tmp_path / "one", tmp_path / "somewhere/else"
    assert len(python_files(one)) == len(python_files(other)) == 2
    assert list(differences(one, other)) == []
    with zipfile.ZipFile(next(one.glob("*.whl"))) as wheel:
        assert "millhand/bundle/install.sh" in wheel.namelist()
        assert not any(name.startswith("millhand_images") for name in wheel.namelist())


def test_a_difference_is_named_with_its_member(tmp_path: Path) -> None:
    for number, folder in enumerate((tmp_path / "one", tmp_path / "other")):
        folder.mkdir()
        (folder / "text").write_text(str(number))
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr("same", "s")
            wheel.writestr("module.py", str(number))
        (folder / "inner").write_text(str(number))
        with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
            archive.add(folder / "inner", "package/inner")
        (folder / "inner").unlink()
    (tmp_path / "one/alone").touch()
    assert list(differences(tmp_path / "one", tmp_path / "other")) == [
        "a.tar.gz: package/inner",
        "a.whl: module.py",
        f"alone: only in '{tmp_path / 'one'}'",
        "text: its own bytes",
    ]


def test_sums_are_signed(tmp_path: Path) -> None:
    key = new_pair(tmp_path / "keys", "plant")
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("a")
    sign(out, key)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, check=True, capture_output=True)
    text = (out / "SHA256SUMS").read_bytes()
    assert openpgp.verifies(key.public, text, (out / "SHA256SUMS.sig").read_bytes())
