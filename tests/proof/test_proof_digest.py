"""What an artifact's digest covers, and when a file is read again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from millhand.errors import ModelError
from millhand.proof import digest as module
from millhand.proof.digest import artifact_files, digest
from millhand.proof.verification import Subject


def test_of_one_file_it_is_what_sha256sum_says(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a" * 700_000)
    assert digest({"model.onnx": path}) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_of_several_files_a_shell_finds_it_too(subject: Subject) -> None:
    command = "sha256sum model.onnx weights/first.bin | sha256sum"
    found = subprocess.run(["sh", "-c", command], cwd=subject.folder, capture_output=True, text=True, check=True)
    assert subject.digest() == found.stdout.split()[0]


def test_bytes_that_move_from_one_file_to_the_next_are_noticed(tmp_path: Path) -> None:
    found = set()
    for first, second in ((b"ab", b"c"), (b"a", b"bc"), (b"abc", b"")):
        (tmp_path / "a").write_bytes(first)
        (tmp_path / "b").write_bytes(second)
        found.add(digest(artifact_files(tmp_path)))
    assert len(found) == 3


def test_what_speaks_of_the_artifact_is_no_part_of_it(subject: Subject) -> None:
    before = subject.digest()
    for name in ("proof.json", "proof.html", "made.json", ".proof.json-x1", ".proof.html-x1", ".made.json-x1"):
        (subject.folder / name).write_text("about it")
    assert subject.digest() == before
    (subject.folder / "weights" / "proof.json").write_text("a data file that is called so")
    assert subject.digest() != before


def test_data_behind_links_counts(subject: Subject, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "second.bin").write_bytes(b"1")
    (subject.folder / "more").symlink_to(elsewhere)
    (subject.folder / "weights" / "up").symlink_to(subject.folder)  # a circle
    before = subject.digest()
    assert sorted(subject.files()) == ["model.onnx", "more/second.bin", "weights/first.bin"]
    (elsewhere / "second.bin").write_bytes(b"2")
    assert subject.digest() != before


@pytest.mark.parametrize("name", ["pipe", "dangling", "line\nbreak", "back\\slash"])
def test_what_can_be_no_part_of_an_artifact_is_named(subject: Subject, name: str) -> None:
    path = subject.folder / name
    if name == "pipe":
        os.mkfifo(path)
    elif name == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_text("")
    with pytest.raises(ModelError, match=f"'{name.encode('unicode_escape').decode()}'".replace("\\", "\\\\")):
        subject.digest()


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine"
    path.write_bytes(b"1" * 100)
    times = [time.time_ns()]
    monkeypatch.setattr(module.time, "time_ns", lambda: times[0])
    reads = []
    original = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda file: reads.append(1) or original(file))
    first = digest({"engine": path})
    assert digest({"engine": path}) == first and len(reads) == 2, "it was changed a moment ago"
    times[0] += 3_000_000_000
    assert digest({"engine": path}) == digest({"engine": path}) == first and len(reads) == 3

    # Same size, same time of change, same inode: the inode's own time tells.
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert digest({"engine": path}) != first


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine"
    path.write_bytes(b"1" * 100)

    def read(file: object) -> str:
        with path.open("ab") as more:
            more.write(b"2")
        return "00"

    monkeypatch.setattr(module, "_sha256", read)
    with pytest.raises(ModelError, match="engine' changes while it is read"):
        digest({"engine": path})


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_CAP", 3)
    monkeypatch.setattr(module, "SETTLED_NS", -1)
    monkeypatch.setattr(module, "_cache", {})
    for number in range(10):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
        digest({"x": tmp_path / str(number)})
    assert len(module._cache) == 3
