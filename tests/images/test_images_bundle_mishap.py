"""What goes wrong around an install: a stick that changes, a full disk, a wrong clock, libraries of the owner's."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_kit import INSTALL, PROJECT, Root, above, assert_is, bundle, copied, install, resealed
from gguf_kit import write_gguf

from millhand.bundle import openpgp
from millhand.bundle.archive import TRAILER_BYTES, verify
from millhand.bundle.libraries import LOCAL, link_names
from millhand.bundle.manifest import KEY
from millhand.errors import BundleError
from millhand.proof.keys import PrivateKey, new_pair
from millhand_images.bundle_content import language_files

STAGED = "var/cache/millhand-bundle"


def test_cut_short_at_any_member_it_is_refused_with_nothing_changed(
    node: Root, made: dict[str, Path], public: Path, key: PrivateKey, tmp_path: Path
) -> None:
    data = made["1.0"].read_bytes()
    with tarfile.open(made["1.0"], "r:") as archive:
        members = archive.getmembers()
    before = node.files()
    for number, member in enumerate(members):
        begin, middle = member.offset, member.offset_data + member.size // 2
        for cut in (begin, begin + 100, member.offset_data, middle):
            for written in (data[:cut], resealed(data[:cut] + bytes(TRAILER_BYTES))):
                path = tmp_path / f"{number}.bundle"  # the last one stays for install.sh
                path.write_bytes(written)
                with pytest.raises(BundleError, match=r"damaged or was changed|not signed"):
                    verify(path, [key.public])
    for cut in (len(data) - TRAILER_BYTES, len(data) - 1):
        path = tmp_path / f"{cut}.bundle"
        path.write_bytes(data[:cut])
        with pytest.raises(BundleError, match="damaged or was changed"):
            verify(path, [key.public])
    script = f'for file in {tmp_path}/*; do sh {INSTALL} "$file" --key {public} --yes && echo "$file"; done; true'
    done = node.run("sh", "-c", script)
    assert done.stdout == "", done.stderr
    assert done.stderr.count("Error: ") == len(members) + 2
    assert node.files() == before


@pytest.mark.parametrize("ring", ["their own", "the plant's", "the plant's first"])
def test_another_signature_is_refused_whatever_keys_travel_along(
    ring: str, node: Root, key: PrivateKey, public: Path, tmp_path: Path
) -> None:
    other = new_pair(tmp_path, "other")
    path = bundle(tmp_path / "other.bundle", other, "1.0", {})
    if ring != "their own":
        keys = openpgp.certificate(key) + (openpgp.certificate(other) if ring == "the plant's first" else b"")
        path.write_bytes(_with(path, KEY, keys))
    before = node.files()
    done = install(node, path, public)
    assert done.returncode == 1 and "is not signed by the key" in done.stderr, done.stdout
    with pytest.raises(BundleError, match="not signed by a key that this node trusts"):
        verify(path, [key.public])
    assert node.files() == before


def _with(path: Path, name: str, data: bytes) -> bytes:
    """A bundle with another content of a member, and a last line that fits."""
    written = io.BytesIO()
    with tarfile.open(path, "r:") as old, tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            source = old.extractfile(member)
            content = data if member.name == name else source.read() if source else b""
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return resealed(written.getvalue() + bytes(TRAILER_BYTES))


def _before(node: Root, program: str, script: str) -> None:
    """Have a script run in the node right before a program that install.sh calls."""
    place = node.upper / "usr/local/sbin" / program
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f'#!/bin/sh\n{script}\nPATH=/usr/sbin:/usr/bin:/sbin:/bin exec {program} "$@"\n')
    place.chmod(0o755)


@pytest.mark.parametrize("what", ["a file", "one more file", "another bundle", "nothing left"])
def test_a_stick_that_changes_after_it_was_verified_installs_nothing(
    what: str, old: Root, roots: Path, made: dict[str, Path], public: Path, tmp_path: Path
) -> None:
    stick, other = tmp_path / "stick.bundle", tmp_path / "other.bundle"
    whole = made["2.0"].read_bytes()
    stick.write_bytes(whole)
    if what == "a file":
        other.write_bytes(resealed(whole.replace(b"labels.txt of 2.0", b"labels.txt of 6.6")))
    elif what == "one more file":
        other.write_bytes(_and_one_more(stick))
    elif what == "another bundle":
        other.write_bytes(made["1.0"].read_bytes())
    else:
        other.write_bytes(b"")
    node = copied(old, roots / what.replace(" ", "-"))
    _before(node, "flock", f"cp {other} {stick}")  # called between the verification and the unpacking
    before = node.files()
    done = install(node, stick, public)
    shutil.rmtree(node.upper / "tmp")  # the stick itself
    said = "has changed while it was read" if what in ("a file", "one more file") else "cannot be unpacked"
    assert done.returncode == 1 and said in done.stderr, done.stdout + done.stderr
    assert {path: facts for path, facts in before.items() if path != "tmp"} == node.files()


def _and_one_more(path: Path) -> bytes:
    """A bundle with a file behind the others, and a last line that fits."""
    written = io.BytesIO(path.read_bytes()[:-TRAILER_BYTES])
    with tarfile.open(fileobj=written, mode="a", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("debs/99-more.deb")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"more"))
    return resealed(written.getvalue() + bytes(TRAILER_BYTES))


@pytest.fixture
def small(roots: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 160 MB."""
    place = roots / "small"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


FILL = "cat /dev/zero >/fill 2>/dev/null; truncate --size=-{kept} /fill"


@pytest.mark.parametrize(
    ("program", "kept_bytes", "said", "is_old"),
    [
        ("apt-get", 4096, "cannot be unpacked", True),
        ("dpkg", 0, "dpkg could not install the packages", False),
        ("millhand", 8192, "the bundle cannot be laid: No space left on device", False),
    ],
    ids=["unpacking", "packages", "laying"],
)
def test_a_disk_that_fills_in_the_middle_is_told_and_the_same_again_ends_it(
    small: Path,
    old: Root,
    made: dict[str, Path],
    public: Path,
    program: str,
    kept_bytes: int,
    said: str,
    is_old: bool,
) -> None:
    node = copied(old, small / "node")
    fill = FILL.format(kept=kept_bytes)
    _before(node, program, f'case "$*" in *--install*|"bundle lay"*|-s*) {fill} ;; esac')
    done = install(node, made["2.0"], public)
    assert done.returncode == 1 and said in done.stderr, done.stdout + done.stderr
    assert not (node.upper / STAGED).exists()
    assert_is(node, *(["1.0"] if is_old else ["1.0", "2.0"]))
    (node.upper / "fill").unlink()
    (node.upper / "usr/local/sbin" / program).unlink()
    done = install(node, made["2.0"], public)
    assert done.returncode == 0, done.stderr
    assert_is(node, "2.0")


def test_usr_alone_that_cannot_be_written_is_refused_with_nothing_changed(
    node: Root, made: dict[str, Path], public: Path
) -> None:
    before = node.files()
    script = (
        f"mount --bind /usr /usr && mount -o remount,bind,ro /usr && sh {INSTALL} {made['1.0']} --key {public} --yes"
    )
    done = node.run("sh", "-c", script)
    assert done.returncode == 1 and "'/usr' cannot be written" in done.stderr, done.stdout
    assert node.files() == before


def test_a_second_install_at_the_same_time_is_refused(
    old: Root, roots: Path, made: dict[str, Path], public: Path
) -> None:
    node = copied(old, roots / "second")
    before = node.files()
    script = f"exec 8</var/lib/dpkg; flock 8; sh {INSTALL} {made['2.0']} --key {public} --yes"
    done = node.run("sh", "-c", script)
    assert done.returncode == 1 and "another install is under way" in done.stderr, done.stdout
    assert node.files() == before


@pytest.mark.parametrize("clock", ["1970-01-02 00:00:00", "2105-12-31 23:59:59"])
def test_no_clock_is_too_wrong(clock: str, old: Root, roots: Path, made: dict[str, Path], public: Path) -> None:
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not here")
    node = copied(old, roots / clock[:4])
    done = node.run("faketime", clock, "sh", INSTALL, made["2.0"], "--key", public, "--yes")
    assert done.returncode == 0, done.stderr
    assert_is(node, "2.0")


def test_on_an_overlay_whose_lower_layer_holds_the_old_one_it_is_updated(
    old: Root, roots: Path, made: dict[str, Path], public: Path, key: PrivateKey, tmp_path: Path
) -> None:
    node = above(old, roots / "layered")
    done = install(node, made["2.0"], public)
    assert done.returncode == 0, done.stderr
    library = "/usr/local/lib/millhand/site-packages/shelved/__init__.py"
    assert node.run("cat", library).stdout == "version = '2.0'\n"
    assert node.run("head", "-n", "1", "/var/lib/millhand/models/press/1/labels.txt").stdout.endswith("of 2.0\n")
    assert node.run("ls", "-A", "/usr/local/lib/millhand", "/var/lib/millhand").stdout.count(".laying") == 0
    without = bundle(tmp_path / "3.0.bundle", key, "3.0", {})
    node = above(node, roots / "more-layers")
    done = install(node, without, public)
    assert done.returncode == 0, done.stderr
    assert node.run("test", "-e", LOCAL / "site-packages").returncode == 1


# --- Libraries ------------------------------------------------------------------------------------------------------


def test_libraries_of_the_owner_stay_where_the_bundle_has_none_and_are_not_overwritten(
    node: Root, made: dict[str, Path], public: Path, key: PrivateKey, tmp_path: Path
) -> None:
    own = node.upper / "usr/local/lib/millhand/site-packages/own.py"
    own.parent.mkdir(parents=True)
    own.write_text("mine = True\n")
    before = node.files()
    done = install(node, made["1.0"], public)
    assert done.returncode == 1 and "was not laid by a bundle" in done.stderr
    assert node.files() == before
    done = install(node, bundle(tmp_path / "plain.bundle", key, "1.0", {}), public)
    assert done.returncode == 0, done.stderr
    assert own.read_text() == "mine = True\n"


def test_the_agents_python_takes_the_laid_libraries_before_its_own(old: Root, roots: Path) -> None:
    """As the package has it: a .pth file of its site-packages imports _millhand_local."""
    node = copied(old, roots / "libraries")
    site = node.upper / "opt/site-packages"
    (site / "shelved").mkdir(parents=True)
    (site / "shelved/__init__.py").write_text("version = 'the own'\n")
    (site / "only_own.py").write_text("")
    shutil.copy(PROJECT / "edge_images/debian/millhand_local.py", site / "_millhand_local.py")
    (site / "_millhand_local.pth").write_text("import _millhand_local\n")
    script = "import site; site.addsitedir('/opt/site-packages'); import shelved, only_own; print(shelved.version)"
    for words in ((), ("-Es",)):  # as the command is started, and as a worker is
        done = node.run(sys.executable, *words, "-c", script)
        assert done.stdout == "1.0\n", done.stderr
    shutil.rmtree(node.upper / "usr/local/lib/millhand/site-packages")
    assert node.run(sys.executable, "-c", script).stdout == "the own\n"


def test_shared_libraries_are_found_by_their_shorter_names(tmp_path: Path) -> None:
    for name in ("libx.so.1.2.3", "liby.so.4.0", "liby.so.4", "libz.so", "libx.so.txt"):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / name).write_text(name)
    link_names(tmp_path)
    found = {path.name: path.readlink().name for path in (tmp_path / "lib").iterdir() if path.is_symlink()}
    assert found == {"libx.so.1": "libx.so.1.2.3", "libx.so": "libx.so.1.2.3", "liby.so": "liby.so.4.0"}


# --- Content --------------------------------------------------------------------------------------------------------


def test_a_language_model_of_a_file_says_nothing_of_the_folder_that_it_lay_in(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "secret-folder/Small-Model.gguf")
    files = language_files(str(source), tmp_path / "language")
    text = files["data/language/small-model/language.toml"].read_text()
    assert 'source = "Small-Model.gguf"' in text and "secret" not in text
    assert "data/language/small-model/Small-Model.gguf" in files


@pytest.mark.parametrize("name", ["data/models/a/1/my model.onnx", "data/models/a/../x", "data/models/a/-x", "etc/x"])
def test_a_file_that_no_bundle_can_hold_is_named_when_it_is_built(name: str, key: PrivateKey, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=f"'{name}'"):
        bundle(tmp_path / "a.bundle", key, "1.0", {name: tmp_path / "file"})
    assert not list(tmp_path.glob("a.bundle*"))
