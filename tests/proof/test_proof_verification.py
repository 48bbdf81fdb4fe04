"""Proved, unproved, refused: each with its reason and remedy."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from proof_kit import proof_of, prove

from millhand.errors import ModelError
from millhand.proof.document import PROOF
from millhand.proof.file import encode, read_proof, write_proof
from millhand.proof.keys import new_pair, node_key, public_path
from millhand.proof.signature import Keyring, message, sign
from millhand.proof.verification import Subject, verify
from millhand.workshop.recipe import Made, Recipe
from millhand.workshop.shelf import Record, Shelf


def test_the_message_is_what_the_page_says(subject: Subject) -> None:
    proof = msgspec.structs.replace(
        proof_of(subject),
        score=None, latency=(), layers=(), node={"b": 1, "a": [0.1, 1e16, "µ"]}, bytes=1, source_bytes=2,
    )  # fmt: skip
    expected = (
        'millhand proof 1\nplant\n{"artifact":"model.onnx","backend":"onnxruntime","bytes":1,"candidate":"",'
        '"date":"2026-11-25T10:00:00Z","energy_mj":null,"executed":true,"format":1,"key":{},"latency":[],"layers":[],'
        '"memory_bytes":3145728,"model":"press","node":{"a":[0.1,1e16,"µ"],"b":1},"notes":[],"options":{},'
        '"original_memory_bytes":9437184,"passed":true,"precision":"fp32","reasons":[],"score":null,'
        f'"sha256":"{subject.digest()}","signatures":[],"source_bytes":2,"source_sha256":"","target":"cpu",'
        '"version":1,"versions":{"millhand":"0.1","onnxruntime":"1.32.0"}}\n'
    )
    assert message(proof, "plant") == expected.encode()


def test_an_artifact_is_proved_by_this_nodes_own_signature(subject: Subject, data_dir: Path, keyring: Keyring) -> None:
    assert verify(subject, keyring).state == "unproved"
    prove(subject, data_dir)
    found = verify(subject, keyring)
    assert (found.state, found.reason, found.signers) == ("proved", "", (node_key(data_dir).public.id,))
    assert found.proof == read_proof(subject.folder / PROOF)


def test_unproved_says_why(subject: Subject, data_dir: Path, keyring: Keyring, tmp_path: Path) -> None:
    found = verify(subject, keyring)
    assert (found.state, found.reason) == ("unproved", "there is no proof.json")
    assert "millhand model prove press" in found.hint
    prove(subject, None)
    assert verify(subject, keyring).reason == "its proof.json is not signed"
    prove(subject, tmp_path / "another node")
    other = node_key(tmp_path / "another node").public
    found = verify(subject, keyring)
    assert found.state == "unproved"
    assert f"signed only by keys that this node does not trust: {other.id} (node)" in found.reason
    assert "[models] trusted_keys" in found.hint
    assert verify(subject, Keyring(data_dir, [other.path])).state == "unproved", "that is its private key"
    trusting = Keyring(data_dir, [public_path(tmp_path / "another node" / "keys")])
    assert verify(subject, trusting).state == "proved"
    prove(subject, data_dir, backend="tensorrt")
    assert "is of backend 'tensorrt'; it is to be served by 'onnxruntime'" in verify(subject, keyring).reason


def test_a_trusted_key_that_cannot_be_read_is_told(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    plant = new_pair(tmp_path / "plant", "plant")
    write_proof(subject.folder, sign(proof_of(subject), plant, "plant"))
    found = verify(subject, Keyring(data_dir, [tmp_path / "gone.pem"]))
    assert found.state == "unproved" and "gone.pem' cannot be read" in found.reason
    both = Keyring(data_dir, [tmp_path / "gone.pem", public_path(tmp_path / "plant", "plant")])
    assert verify(subject, both).signers == (plant.public.id,)


def test_several_may_sign_and_each_must_fit(subject: Subject, data_dir: Path, tmp_path: Path) -> None:
    plant, node = new_pair(tmp_path / "plant", "plant"), node_key(data_dir)
    keyring = Keyring(data_dir, [public_path(tmp_path / "plant", "plant")])
    proof = sign(sign(proof_of(subject), node, "node"), plant, "plant")
    assert sign(proof, plant, "plant") == proof, "signing twice leaves one signature"
    write_proof(subject.folder, proof)
    assert verify(subject, keyring).signers == (node.public.id, plant.public.id)
    assert verify(subject, Keyring(data_dir)).signers == (node.public.id,), "the other one is not known here"
    swapped = tuple(
        msgspec.structs.replace(one, signature=other.signature)
        for one, other in zip(proof.signatures, proof.signatures[::-1], strict=True)
    )
    role = (proof.signatures[0], msgspec.structs.replace(proof.signatures[1], role="node"))
    for signatures in (swapped, role):
        write_proof(subject.folder, msgspec.structs.replace(proof, signatures=signatures))
        assert "does not fit; the proof was changed" in verify(subject, keyring).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, r"is of model 'other'; it lies with 'press'"),
        ({"version": 2}, r"is of version 2; it lies with 1"),
        ({"candidate": "int8"}, r"is of candidate 'int8'; it lies with ''"),
        ({"artifact": "weights/first.bin"}, r"is of artifact 'weights/first.bin'; it lies with 'model.onnx'"),
        ({"sha256": "0" * 64}, r"model.onnx' with 1 more files is not what was proved: its SHA-256 is .*says 00000000"),
        ({"passed": False, "reasons": ("accuracy fell by 3 %",)}, "the gate failed: accuracy fell by 3 %"),
        ({"executed": False, "reasons": ("built for sm80",)}, "it was never run: built for sm80"),
    ],
)
def test_refused_though_it_is_signed(
    subject: Subject, data_dir: Path, keyring: Keyring, changes: dict[str, Any], reason: str
) -> None:
    prove(subject, data_dir, **changes)
    found = verify(subject, keyring)
    assert found.state == "refused" and found.hint
    assert re.search(reason, found.reason)
    assert found.failed_gate == bool({"passed", "executed"} & set(changes))


@pytest.mark.parametrize("change", ["artifact", "data", "added", "removed", "renamed"])
def test_every_file_of_the_artifact_counts(subject: Subject, data_dir: Path, keyring: Keyring, change: str) -> None:
    prove(subject, data_dir)
    data = subject.folder / "weights" / "first.bin"
    if change == "artifact":
        (subject.folder / "model.onnx").write_bytes(b"a Graph")
    elif change == "data":
        data.write_bytes(bytes(64))
    elif change == "added":
        (subject.folder / "second.bin").write_bytes(b"")
    elif change == "removed":
        data.unlink()
    else:
        data.rename(data.with_name("third.bin"))
    found = verify(subject, keyring)
    assert found.state == "refused" and "is not what was proved" in found.reason
    assert "restore it" in found.hint and "remove proof.json" in found.hint


def test_an_artifact_outside_its_folder_is_refused(subject: Subject, data_dir: Path, keyring: Keyring) -> None:
    outside = dataclasses.replace(subject, artifact="../other.onnx")
    (subject.folder.parent / "other.onnx").write_bytes(b"another graph")
    prove(outside, data_dir)
    found = verify(outside, keyring)
    assert found.state == "refused" and "is not there, or not in its folder" in found.reason


def test_what_cannot_be_read_is_refused(subject: Subject, data_dir: Path, keyring: Keyring) -> None:
    prove(subject, data_dir)
    path = subject.folder / PROOF
    path.unlink()
    os.mkfifo(path)
    assert verify(subject, keyring).reason == f"'{path}' is no plain file"
    path.unlink()
    path.mkdir()
    assert verify(subject, keyring).state == "refused"
    path.rmdir()
    prove(subject, data_dir)
    os.mkfifo(subject.folder / "pipe")
    assert "'pipe' in" in verify(subject, keyring).reason


CANDIDATE = Record(
    recipe=Recipe(name="int8", precision="int8", description="eight bits"),
    maker="quantize",
    made=Made(artifact="int8.onnx", backend="onnxruntime", options={"threads": 1}, key={"library": "1.32"}),
    source_sha256="a" * 64,
    sha256="b" * 64,
    date="2026-11-25T10:00:00Z",
)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({}, ""),
        ({"artifact": "other.onnx"}, "is of artifact 'int8.onnx'; it lies with 'other.onnx'"),
        ({"backend": "tensorrt"}, "is of backend 'onnxruntime'; it lies with 'tensorrt'"),
        ({"options": {"threads": 2}}, "is of options {'threads': 1}; it lies with {'threads': 2}"),
        ({"key": {}}, "is of key {'library': '1.32'}; it lies with {}"),
    ],
)
def test_a_candidates_record_must_say_what_its_proof_says(
    tmp_path: Path, data_dir: Path, keyring: Keyring, made: dict[str, Any], reason: str
) -> None:
    shelf = Shelf(tmp_path / "built")
    with shelf.staged("press", 1, "cpu", "int8") as folder:
        (folder / "int8.onnx").write_bytes(b"small")
        (folder / "other.onnx").write_bytes(b"not what is to be loaded")
        (folder / "made.json").write_bytes(msgspec.json.encode(CANDIDATE))
    prove(shelf.subject("press", 1, "cpu", shelf.find("press", 1, "cpu", "int8")), data_dir)
    record = msgspec.structs.replace(CANDIDATE, made=msgspec.structs.replace(CANDIDATE.made, **made))
    (shelf.place("press", 1, "cpu") / "int8" / "made.json").write_bytes(msgspec.json.encode(record))
    subject = shelf.subject("press", 1, "cpu", shelf.find("press", 1, "cpu", "int8"))
    found = verify(subject, keyring)
    assert (found.state, reason in found.reason) == ("refused" if reason else "proved", True)
    assert not reason or "millhand model build press makes the candidate anew" in found.hint
    moved = shelf.subject("press", 1, "sm80", shelf.find("press", 1, "cpu", "int8"))
    assert verify(moved, keyring).state == "refused"


def test_what_cannot_be_written_is_told_before_it_is_signed(subject: Subject, data_dir: Path) -> None:
    key = node_key(data_dir)
    proof = proof_of(subject)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"energy_mj": float("nan")}, "'energy_mj' = nan"),
        ({"node": {"free": [1.0, float("inf")]}}, r"'node.free.1' = inf"),
        ({"score": msgspec.structs.replace(proof.score, drop_percent=float("-inf"))}, "'score.drop_percent' = -inf"),
        ({"versions": {"x": "\ud800"}}, "cannot be written"),
        ({"options": {"x": object()}}, "cannot be written"),
        ({"version": 0}, "cannot be written"),
        ({"sha256": "short"}, "cannot be written"),
    ]
    for changes, words in bad:
        with pytest.raises(ModelError, match=words):
            sign(msgspec.structs.replace(proof, **changes), key, "node")
    whole = msgspec.structs.replace(proof, energy_mj=4, options={"shape": (1, 2)})
    assert encode(sign(whole, key, "node")).count(b'"energy_mj": 4.0') == 1
