"""Bundles: their form and signature, what refuses them, and installs on a real dpkg that are killed."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from bundle_kit import INSTALL, Root, assert_is, bundle, copied, install, resealed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millhand.bundle import openpgp
from millhand.bundle.archive import TRAILER_BYTES, verify
from millhand.bundle.laying import lay_data, lay_libraries
from millhand.bundle.libraries import unpack
from millhand.bundle.manifest import decode
from millhand.cli import main
from millhand.errors import BundleError
from millhand.proof.keys import PrivateKey, new_pair, public_path

# --- The form -------------------------------------------------------------------------------------------------------


def test_a_bundle_is_the_same_bytes_each_time(tmp_path: Path, key: PrivateKey) -> None:
    (tmp_path / "model.onnx").write_bytes(b"a model")
    first = bundle(tmp_path / "a.bundle", key, "1.0", {"data/models/a/1/model.onnx": tmp_path / "model.onnx"})
    second = bundle(tmp_path / "b.bundle", key, "1.0", {"data/models/a/1/model.onnx": tmp_path / "model.onnx"})
    assert first.read_bytes() == second.read_bytes()


def test_a_whole_bundle_is_verified(made: dict[str, Path], key: PrivateKey) -> None:
    found = verify(made["1.0"], [key.public])
    assert found.key.id == key.public.id
    assert found.read("install.sh") == INSTALL.read_bytes()


def test_tar_reads_a_bundle_and_sha256sum_checks_it_by_hand(made: dict[str, Path], tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", made["1.0"], "-C", tmp_path], check=True)
    manifest = decode((tmp_path / "MANIFEST").read_bytes())
    sums = "".join(f"{file.sha256}  {file.path}\n" for file in manifest.files)
    subprocess.run(["sha256sum", "-c", "--strict"], cwd=tmp_path, input=sums.encode(), check=True, capture_output=True)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(place=0.9999999, bit=3)
@settings(max_examples=60)
def test_no_bit_can_change_unseen(made: dict[str, Path], key: PrivateKey, place: float, bit: int) -> None:
    data = bytearray(made["1.0"].read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        with pytest.raises(BundleError):
            verify(Path(file.name), [key.public])


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=60)
def test_whoever_changes_a_byte_and_the_sum_is_refused_or_changed_nothing_that_counts(
    made: dict[str, Path], key: PrivateKey, place: float, value: int
) -> None:
    whole = verify(made["1.0"], [key.public]).manifest
    data = bytearray(made["1.0"].read_bytes())
    data[int(place * (len(data) - TRAILER_BYTES))] = value
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(resealed(bytes(data)))
        try:
            found = verify(Path(file.name), [key.public]).manifest
        except BundleError:
            return
        assert found == whole  # the changed byte was a header's time or padding


@given(st.binary(max_size=4000))
@settings(max_examples=60)
def test_what_is_no_bundle_is_refused(key: PrivateKey, data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        for content in (data, resealed(data + bytes(TRAILER_BYTES))):
            Path(file.name).write_bytes(content)
            with pytest.raises(BundleError):
                verify(Path(file.name), [key.public])


# --- Signatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["gpgv", "sqv"])
def test_the_systems_own_program_believes_signatures_and_refuses_changed_text(
    program: str, key: PrivateKey, tmp_path: Path
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not here")
    keyring = tmp_path / "KEY.pgp"
    keyring.write_bytes(openpgp.certificate(key))
    texts = [f"text {number}".encode() for number in range(12)]
    texts.append(_text_with_leading_zero(key))  # of which OpenPGP leaves out the zero
    for text in texts:
        (tmp_path / "text").write_bytes(text)
        (tmp_path / "sig").write_bytes(openpgp.signature(key, text))
        words = [program, "--keyring", str(keyring)]
        words += ["--signature-file"] if program == "sqv" else ["--status-fd", "1"]
        words += [str(tmp_path / "sig"), str(tmp_path / "text")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert openpgp.fingerprint(key.public) in done.stdout
        (tmp_path / "text").write_bytes(text + b".")
        assert subprocess.run(words, capture_output=True, check=False).returncode != 0


def _text_with_leading_zero(key: PrivateKey) -> bytes:
    """A text whose signature has a half that begins with a zero byte: its packet is shorter than most."""
    texts = [f"long {number}".encode() for number in range(2000)]
    return min(texts, key=lambda text: len(openpgp.signature(key, text)))


def test_every_signature_is_read_back_and_no_byte_of_it_may_change(key: PrivateKey) -> None:
    for number in range(300):
        text = f"text {number}".encode()
        written = openpgp.signature(key, text)
        assert openpgp.verifies(key.public, text, written)
        assert not openpgp.verifies(key.public, text + b"\n", written)
        at = number % len(written)
        assert not openpgp.verifies(key.public, text, written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
        assert not openpgp.verifies(key.public, text, written + b"\0")
        assert not openpgp.verifies(key.public, text, written[:at])


def test_a_bundle_of_another_key_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not signed by a key that this node trusts"):
        verify(made["1.0"], [new_pair(tmp_path, "other").public])


# --- Laying ---------------------------------------------------------------------------------------------------------


def _unpacked(path: Path, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(["tar", "-xf", path, "-C", folder], check=True)
    return folder


def test_laying_puts_everything_in_its_place_once(made: dict[str, Path], tmp_path: Path) -> None:
    data, local = tmp_path / "data", tmp_path / "local"
    data.mkdir()
    own = data / "models/press/9/model.onnx"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"a version of the owner's")
    for version in ("1.0", "2.0", "1.0"):
        staged = _unpacked(made[version], tmp_path / f"staged-{len(list(tmp_path.iterdir()))}")
        assert lay_libraries(staged, local) and len(lay_data(staged, data)) == 4
        assert lay_libraries(staged, local) == lay_data(staged, data) == []
        assert (local / "site-packages/shelved/__init__.py").read_text() == f"version = {version!r}\n"
        assert (local / "site-packages/more.py").exists() and not (local / "site-packages/tool").exists()
        for name in ("models/press/1/labels.txt", "models/press/model.toml", "language/small/small.gguf"):
            assert (data / name).read_text().startswith(f"{name} of {version}\n")
    assert own.read_bytes() == b"a version of the owner's"
    assert sorted(path.name for path in data.iterdir()) == ["built", "language", "models"]


def test_libraries_of_the_owner_are_left_alone(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "local/site-packages").mkdir(parents=True)
    with pytest.raises(BundleError, match="not laid by a bundle"):
        lay_libraries(_unpacked(made["1.0"], tmp_path / "staged"), tmp_path / "local")


def test_a_wheel_that_leads_out_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("../outside.py", "")
    with pytest.raises(BundleError, match="leads out"):
        unpack(tmp_path / "bad.whl", tmp_path / "in")
    assert not (tmp_path / "outside.py").exists()


# --- The command line -----------------------------------------------------------------------------------------------


def test_the_command_line_verifies(
    made: dict[str, Path], public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bundle", "verify", str(made["1.0"]), "--key", str(public)])
    assert ended.value.code == 0
    assert "millhand 1.0 for cpu" in capsys.readouterr().out
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(made["1.0"].read_bytes()[:-1])
    with pytest.raises(SystemExit) as ended:
        main(["bundle", "verify", str(damaged), "--key", str(public)])
    assert ended.value.code == 1
    assert "damaged" in capsys.readouterr().err


# --- Installs -------------------------------------------------------------------------------------------------------


def test_without_yes_it_tells_and_changes_nothing(node: Root, made: dict[str, Path], public: Path) -> None:
    before = node.files()
    done = node.run("sh", INSTALL, made["1.0"], "--key", public)
    assert done.returncode == 0, done.stderr
    assert "Package   millhand 1.0\n" in done.stdout and "Nothing has been changed" in done.stdout
    assert "Data      models/press/1/model.onnx\n" in done.stdout
    assert node.files() == before


def test_an_install_brings_everything_and_the_same_again_changes_nothing(
    old: Root, made: dict[str, Path], public: Path
) -> None:
    version = old.run("millhand", "--version")
    assert version.returncode == 0, version.stderr
    assert (old.upper / "var/lib/millhand/models/press/model.toml").exists()
    assert (old.upper / "usr/local/lib/millhand/site-packages/shelved/__init__.py").exists()
    before = old.files()
    again = install(old, made["1.0"], public)
    assert again.returncode == 0 and "Nothing had to be changed" in again.stdout, again.stderr
    assert old.files() == before


def test_a_node_that_has_millhand_installs_with_its_command(
    old: Root, roots: Path, made: dict[str, Path], public: Path
) -> None:
    newer = copied(old, roots / "by-command")
    done = newer.run("millhand", "bundle", "install", made["2.0"], "--key", public, "--yes")
    assert done.returncode == 0, done.stderr
    assert_is(newer, "2.0")


def test_an_older_bundle_needs_to_be_meant(old: Root, roots: Path, made: dict[str, Path], public: Path) -> None:
    node = copied(old, roots / "newer")
    assert install(node, made["2.0"], public).returncode == 0
    before = node.files()
    refused = install(node, made["1.0"], public)
    assert refused.returncode == 1 and "--downgrade" in refused.stderr
    assert node.files() == before
    done = install(node, made["1.0"], public, "--downgrade")
    assert done.returncode == 0, done.stderr
    assert_is(node, "1.0")


def _damaged(path: Path, kind: str) -> bytes:
    data = path.read_bytes()
    if kind == "cut short":
        return data[: len(data) // 2]
    if kind == "one byte":
        at = random.Random(5).randrange(len(data))
        return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]
    if kind == "last byte":
        return data[:-1] + b"\0"
    if kind == "longer":
        return data + b"\n"
    if kind == "resealed manifest":
        return resealed(data.replace(b"Target: cpu", b"Target: gpu"))
    if kind == "resealed file":
        return resealed(data.replace(b"labels.txt of 1.0", b"labels.txt of 9.9"))
    if kind == "resealed more":
        return resealed(data.replace(b"models/press/1/labels.txt", b"models/press/1/../../../x"))
    return b""


@pytest.mark.parametrize(
    "kind",
    [
        "cut short",
        "one byte",
        "last byte",
        "longer",
        "resealed manifest",
        "resealed file",
        "resealed more",
        "empty",
    ],
)
def test_what_is_not_as_it_was_signed_is_refused_with_nothing_changed(
    node: Root, made: dict[str, Path], public: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "damaged.bundle"
    path.write_bytes(_damaged(made["1.0"], kind))
    before = node.files()
    done = install(node, path, public)
    assert done.returncode == 1 and done.stderr.startswith("Error: "), done.stdout
    assert node.files() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "riscv64"}, "the bundle is for riscv64, this is"),
        ({"system": "plan 9"}, "the bundle is for plan 9, this is"),
        ({"system_bytes": 1 << 60}, "MB left, the bundle needs"),
    ],
    ids=["architecture", "system", "disk"],
)
def test_a_bundle_for_another_node_is_refused_with_nothing_changed(
    node: Root, key: PrivateKey, public: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = bundle(tmp_path / "other.bundle", key, "1.0", {}, **changes)
    before = node.files()
    done = install(node, path, public)
    assert done.returncode == 1 and message in done.stderr
    assert node.files() == before


def test_a_wrong_key_and_a_root_that_cannot_be_written_are_refused(
    node: Root, made: dict[str, Path], public: Path, tmp_path: Path
) -> None:
    new_pair(tmp_path, "other")
    before = node.files()
    done = install(node, made["1.0"], public_path(tmp_path, "other"))
    assert done.returncode == 1 and "is not signed by the key" in done.stderr
    done = install(node, made["1.0"], tmp_path / "none.pem")
    assert done.returncode == 1 and "none.pem' is no public key of a plant" in done.stderr
    script = f"mount -o remount,ro / && exec sh {INSTALL} {made['1.0']} --key {public} --yes"
    done = node.run("sh", "-c", script)
    assert done.returncode == 1 and "cannot be written" in done.stderr, done.stderr + done.stdout
    assert node.files() == before


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_killed_at_any_moment_it_can_be_run_again(
    old: Root, roots: Path, made: dict[str, Path], public: Path, kills: int
) -> None:
    chance = random.Random(7)
    words = ("sh", INSTALL, made["2.0"], "--key", public, "--yes")
    whole_s = _seconds(copied(old, roots / f"timed-{kills}"), *words)
    killed = 0
    for number in range(kills):
        node = copied(old, roots / f"killed-{kills}-{number}")
        killed += node.killed(chance.uniform(0.05, 1.0) * whole_s, *words)
        assert_is(node, "1.0", "2.0")
        runs = node.run("millhand", "--version")
        assert runs.returncode == 0, runs.stderr
        done = node.run(*words)
        assert done.returncode == 0, done.stderr
        assert_is(node, "2.0")
        assert not (node.upper / "var/cache/millhand-bundle").exists()
        shutil.rmtree(node.folder)
    assert killed


def _seconds(node: Root, *words: str | Path) -> float:
    began_s = time.monotonic()
    assert node.run(*words).returncode == 0
    return time.monotonic() - began_s
