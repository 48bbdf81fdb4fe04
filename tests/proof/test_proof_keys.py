"""Keys: made once, private, and every bad one named with a remedy."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from millhand.errors import ModelError
from millhand.proof.keys import new_pair, node_key, private_path, public_path, read_private, read_public
from millhand.proof.signature import Keyring

# RFC 8032, 7.1, test 2: secret key, public key, message, signature.
SECRET = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def openssl(*words: str) -> bytes:
    return subprocess.run(["openssl", *words], capture_output=True, check=True).stdout


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def pem(der: str, kind: str) -> bytes:
    text = base64.b64encode(bytes.fromhex(der)).decode()
    return f"-----BEGIN {kind} KEY-----\n{text}\n-----END {kind} KEY-----\n".encode()


def test_keys_sign_as_the_rfc_says(tmp_path: Path) -> None:
    private = read_private(write(tmp_path / "a", pem("302e020100300506032b657004220420" + SECRET, "PRIVATE")))
    public = read_public(write(tmp_path / "b", pem("302a300506032b6570032100" + PUBLIC, "PUBLIC")))
    assert private.sign(b"\x72").hex() == SIGNATURE
    assert public.verifies(b"\x72", bytes.fromhex(SIGNATURE)) and not public.verifies(b"\x73", bytes.fromhex(SIGNATURE))
    assert private.public.id == public.id == hashlib.sha256(bytes.fromhex(PUBLIC)).hexdigest()[:16]


def test_openssl_reads_ours_and_we_read_openssls(tmp_path: Path) -> None:
    pair = new_pair(tmp_path, "plant")
    derived = openssl("pkey", "-in", str(private_path(tmp_path, "plant")), "-pubout")
    assert derived == public_path(tmp_path, "plant").read_bytes() == pair.public.pem()
    made = write(tmp_path / "theirs.pem", openssl("genpkey", "-algorithm", "ed25519"))
    assert read_private(made).public.pem() == openssl("pkey", "-in", str(made), "-pubout")


def test_the_nodes_key_is_made_once_and_is_its_own(data_dir: Path) -> None:
    key = node_key(data_dir)
    path = private_path(data_dir / "keys")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(public_path(data_dir / "keys").stat().st_mode) == 0o644
    assert node_key(data_dir).public.id == key.public.id
    assert sorted(path.name for path in (data_dir / "keys").iterdir()) == ["node.pem", "node.public.pem"]
    public_path(data_dir / "keys").unlink()
    assert Keyring(data_dir).read() == ({key.public.id: key.public}, []), "the private one will do"
    assert node_key(data_dir).public.id == key.public.id and public_path(data_dir / "keys").exists()


def test_root_makes_it_for_the_owner_of_the_folder(data_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes files for others")
    data_dir.mkdir()
    os.chown(data_dir, 12345, 23456)
    node_key(data_dir)
    status = private_path(data_dir / "keys").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


def test_processes_that_race_for_the_first_key_agree(data_dir: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from millhand.proof.keys import node_key;"
        "import cryptography.hazmat.primitives.asymmetric.ed25519; print('ready', flush=True); sys.stdin.readline();"
        f"print(node_key(Path({str(data_dir)!r})).public.id)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([sys.executable, "-c", program], **pipes) for _ in range(6)]
    try:
        assert all(racer.stdout.readline() == "ready\n" for racer in racers)
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()
        found = {racer.communicate(timeout=30)[0].strip() for racer in racers}
    finally:
        for racer in racers:
            racer.kill()
    assert found == {node_key(data_dir).public.id}
    assert sorted(path.name for path in (data_dir / "keys").iterdir()) == ["node.pem", "node.public.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_private_key_that_others_can_use_is_not_used(data_dir: Path, mode: int) -> None:
    node_key(data_dir)
    path = private_path(data_dir / "keys")
    path.chmod(mode)
    with pytest.raises(ModelError, match=rf"node.pem' can be used by others \(mode {mode:04o}\)") as raised:
        node_key(data_dir)
    assert f"chmod 600 '{path}'" in raised.value.hint


def test_bad_keys_are_named_with_a_remedy(tmp_path: Path) -> None:
    good = new_pair(tmp_path, "good")
    pem_bytes = good.path.read_bytes()
    algorithms = {
        "RSA": ["-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:2048"],
        "EC": ["-algorithm", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
        "Ed448": ["-algorithm", "ed448"],
        "X25519": ["-algorithm", "x25519"],
    }
    path = tmp_path / "key.pem"
    for name, words in algorithms.items():
        write(path, openssl("genpkey", *words))
        public = write(tmp_path / "public.pem", openssl("pkey", "-in", str(path), "-pubout"))
        for read, where in ((read_private, path), (read_public, public)):
            with pytest.raises(ModelError, match=f"'{where}' is a key for {name}; .* Ed25519") as raised:
                read(where)
            assert "genpkey -algorithm ed25519" in raised.value.hint
    for damaged in (b"", b"\xff" * 100, pem_bytes[:-30], pem_bytes.replace(b"M", b"?"), b"x" * (1 << 20)):
        for read in (read_private, read_public):
            with pytest.raises(ModelError, match=r"key.pem' (holds no readable|is a private key)"):
                read(write(path, damaged))
    with pytest.raises(ModelError, match=r"public.pem' holds no readable private key"):
        read_private(write(tmp_path / "good.public.pem", good.public.pem()))
    with pytest.raises(ModelError, match=r"good.pem' is a private key; a public one belongs here"):
        read_public(good.path)
    locked = openssl("pkey", "-in", str(good.path), "-aes256", "-passout", "pass:secret")
    with pytest.raises(ModelError, match="protected by a password"):
        read_private(write(path, locked))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match=r"pipe' holds no readable public key"):
        read_public(tmp_path / "pipe")
    with pytest.raises(ModelError, match=r"nowhere' cannot be read: No such file"):
        read_private(tmp_path / "nowhere")


def test_a_pair_never_takes_the_place_of_another(tmp_path: Path) -> None:
    before = new_pair(tmp_path, "plant").path.read_bytes()
    with pytest.raises(ModelError, match=r"plant.pem' is there already"):
        new_pair(tmp_path, "plant")
    assert private_path(tmp_path, "plant").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="no key can be made in"):
        new_pair(tmp_path / "file", "plant")
    (tmp_path / "keys").write_text("")
    nowhere = tmp_path / ("x" * 300)
    for place in (tmp_path, nowhere):
        with pytest.raises(ModelError, match="the node's key cannot be made in") as raised:
            node_key(place)
        assert "as the user that runs the agent" in raised.value.hint
    assert "cannot be read: File name too long" in Keyring(nowhere).read()[1][0].message


def test_a_private_key_that_is_gone_is_not_made_anew_unasked(data_dir: Path) -> None:
    before = node_key(data_dir).public.id
    private_path(data_dir / "keys").unlink()
    with pytest.raises(ModelError, match=r"private key '.*/node.pem' is gone") as raised:
        node_key(data_dir)
    assert "node.public.pem' too" in raised.value.hint
    public_path(data_dir / "keys").unlink()
    assert node_key(data_dir).public.id != before


def test_the_command_line_and_workers_do_without_cryptography() -> None:
    program = (
        "import sys; from millhand.cli import main, COMMANDS\nimport importlib\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(f'millhand.cli.{module}')\n"
        "import millhand.serving.worker, millhand.serving.pool, millhand.serving.repository, millhand.daemon\n"
        "print([name for name in sys.modules if re.match('cryptography|jinja2', name)])"
    )
    found = subprocess.run([sys.executable, "-c", f"import re; {program}"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\]\n", found.stdout), found.stdout
