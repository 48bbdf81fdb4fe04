"""Whatever changes in an artifact or a proof is noticed; whatever stands in a proof gives a clear error."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proof_kit import proof_of

from millhand.errors import ModelError
from millhand.proof.document import Latency, Layer, Proof, Score, Signature
from millhand.proof.file import BYTES_CAP, decode, encode, normal, read_proof, write_proof
from millhand.proof.keys import PrivateKey, new_pair, node_key, public_path
from millhand.proof.signature import Keyring, sign
from millhand.proof.verification import Subject, verify

MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Signed:
    """An artifact with a data file, a proof by node and plant, and what is on disk."""

    def __init__(self, folder: Path) -> None:
        place = folder / "1"
        place.mkdir()
        (place / "model.onnx").write_bytes(bytes(range(200)))
        (place / "weights.bin").write_bytes(b"w" * 100)
        self.subject = Subject(model="press", version=1, folder=place, artifact="model.onnx", backend="onnxruntime")
        self.plant: PrivateKey = new_pair(folder / "plant", "plant")
        self.keyring = Keyring(folder / "data", [public_path(folder / "plant", "plant")])
        proof = sign(sign(proof_of(self.subject), node_key(folder / "data"), "node"), self.plant, "plant")
        write_proof(place, proof)
        self.path = place / "proof.json"
        self.data = self.path.read_bytes()
        assert verify(self.subject, self.keyring).state == "proved"

    def with_proof(self, data: bytes) -> str:
        self.path.write_bytes(data)
        return verify(self.subject, self.keyring).state


@pytest.fixture(scope="module")
def signed() -> Iterator[Signed]:
    with tempfile.TemporaryDirectory() as folder:
        yield Signed(Path(folder))


def changed(data: bytes, place: int, value: int) -> bytes:
    """One byte made another."""
    place %= len(data)
    byte = value if value != data[place] else (value + 1) % 256
    return data[:place] + bytes([byte]) + data[place + 1 :]


@MANY
@given(file=st.sampled_from(["model.onnx", "weights.bin"]), place=st.integers(0, 1 << 16), value=st.integers(0, 255))
def test_any_byte_of_the_artifact(signed: Signed, file: str, place: int, value: int) -> None:
    path = signed.subject.folder / file
    before = path.read_bytes()
    try:
        path.write_bytes(changed(before, place, value))
        found = verify(signed.subject, signed.keyring)
        assert found.state == "refused" and "is not what was proved" in found.reason
    finally:
        path.write_bytes(before)
    assert signed.with_proof(signed.data) == "proved"


@settings(MANY, max_examples=1500)
@given(place=st.integers(0, 1 << 16), value=st.integers(0, 255))
def test_any_byte_of_the_proof(signed: Signed, place: int, value: int) -> None:
    data = changed(signed.data, place, value)
    inside = place % len(signed.data) >= signed.data.index(b'"signatures"') and b'"key"' in _line(signed.data, place)
    state = signed.with_proof(data)
    if state != "refused":
        # Another key's name makes a signature one that cannot be checked; the other one still holds.
        assert inside and _names(data) != _names(signed.data)
        assert len(verify(signed.subject, signed.keyring).signers) == 1


def _line(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[data.rfind(b"\n", 0, place) + 1 : data.find(b"\n", place)]


def _names(data: bytes) -> list[str]:
    return [one["key"] for one in json.loads(data)["signatures"]]


def test_every_single_byte_of_a_proof_that_one_has_signed(signed: Signed) -> None:
    """Not a sample: each byte once, with its lowest bit turned. Nothing but `proved` is left of it by none."""
    only = msgspec.structs.replace(decode(signed.data, signed.path), signatures=())
    data = encode(sign(only, signed.plant, "plant"))
    assert signed.with_proof(data) == "proved"
    for place in range(len(data)):
        assert signed.with_proof(changed(data, place, data[place] ^ 1)) != "proved", _line(data, place)


@MANY
@given(cut=st.integers(0, 1 << 16), tail=st.binary(max_size=20))
def test_what_is_cut_off_or_added(signed: Signed, cut: int, tail: bytes) -> None:
    data = signed.data[: cut % len(signed.data)] + tail
    assert data == signed.data or signed.with_proof(data) == "refused"
    assert not tail or signed.with_proof(signed.data + tail) == "refused"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
COUNT = st.integers(0, 1 << 62)
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)


def parts(kind: type, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **fields)


PROOFS = parts(
    Proof,
    model=TEXT, version=st.integers(1, 1 << 62), candidate=TEXT, target=TEXT, precision=TEXT, artifact=TEXT,
    sha256=HASH, source_sha256=st.just("") | HASH, bytes=COUNT, source_bytes=COUNT, backend=TEXT,
    options=st.dictionaries(TEXT, PLAIN, max_size=3), key=st.dictionaries(TEXT, TEXT, max_size=3),
    executed=st.booleans(), passed=st.booleans(), reasons=st.lists(TEXT, max_size=3).map(tuple),
    score=st.none() | parts(
        Score, metric=TEXT, higher_is_better=st.booleans(), original=NUMBER, candidate=NUMBER, drop_percent=NUMBER,
        limit_percent=NUMBER, rows=COUNT, data=TEXT,
    ),
    latency=st.lists(parts(
        Latency, batch=st.integers(1, 1 << 20), p50_ms=NUMBER, p99_ms=NUMBER, original_p50_ms=NUMBER,
        original_p99_ms=NUMBER,
    ), max_size=2).map(tuple),
    memory_bytes=st.none() | COUNT, original_memory_bytes=st.none() | COUNT, energy_mj=st.none() | NUMBER,
    layers=st.lists(
        parts(Layer, name=TEXT, operator=TEXT, precision=TEXT, error=st.none() | NUMBER), max_size=3
    ).map(tuple),
    notes=st.lists(TEXT, max_size=3).map(tuple), node=st.dictionaries(TEXT, PLAIN, max_size=3),
    versions=st.dictionaries(TEXT, TEXT, max_size=3), date=TEXT,
    signatures=st.lists(parts(
        Signature, key=st.text("0123456789abcdef", min_size=16, max_size=16), role=st.sampled_from(["node", "plant"]),
        signature=st.text("0123456789abcdef", min_size=128, max_size=128),
    ), max_size=2).map(tuple),
)  # fmt: skip


@settings(MANY, max_examples=100)
@given(proof=PROOFS)
def test_what_is_written_is_read_back(proof: Proof) -> None:
    found = decode(encode(normal(proof)), Path("proof.json"))
    assert found == normal(proof) and encode(found) == encode(normal(proof))


@settings(MANY, max_examples=100)
@given(first=PROOFS, other=PROOFS, key=st.sampled_from(Proof.__struct_fields__[1:]))
def test_proofs_that_differ_are_written_otherwise(first: Proof, other: Proof, key: str) -> None:
    second = msgspec.structs.replace(first, **{key: getattr(other, key)})
    if normal(first) != normal(second):
        assert encode(normal(first)) != encode(normal(second))


@settings(MANY, max_examples=500)
@given(key=st.integers(0, 1 << 16), value=PLAIN)
def test_any_value_under_any_key(signed: Signed, key: int, value: Any) -> None:
    """Wrong types and wrong values alike: refused, with a reason, or the very same proof."""
    document = json.loads(signed.data)
    name = sorted(document)[key % len(document)]
    document[name] = value
    try:
        data = encode(normal(msgspec.convert(document, Proof)))
    except (msgspec.ValidationError, ModelError):
        data = msgspec.json.format(msgspec.json.encode(document, order="sorted"), indent=2) + b"\n"
    state = signed.with_proof(data)
    assert data == signed.data or state != "proved"
    if state == "refused":
        reason = verify(signed.subject, signed.keyring).reason
        assert str(signed.path) in reason and len(reason) < 2000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read as a proof"),
        (b"[]", "Expected `object`"),
        (b"\xff\xfe", "cannot be read as a proof"),
        (b'{"format": 1}', "missing required field"),
        (b'{"format": 2, "unheard": "of"}', "key 'format' = 2, this millhand reads 1"),
        (b'{"format": "1"}', "Expected `int`, got `str`"),
        (b'{"format": NaN}', "malformed"),
        (b'{"format": 1e999}', "out of range"),
        (b'{"format": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"node": ' + b"[" * 200_000 + b"]" * 200_000 + b', "format": 1}', "recursion"),
        (b'{"format": 1, "node": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}", "recursion"),
        (b" " * (BYTES_CAP + 1), "longer than 8 MiB"),
    ],
)
def test_adversarial_documents_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "proof.json"
    path.write_bytes(data)
    with pytest.raises(ModelError) as raised:
        read_proof(path)
    assert words in raised.value.message and str(path) in raised.value.message and raised.value.hint
    assert len(raised.value.message) < 1000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"passed": true', b'"passed": false,\n  "passed": true'),
        (b'"passed": true', b'"passed": true,\n  "quality": "best"'),
        (b'"energy_mj": null', b'"energy_mj": NaN'),
        (b'"energy_mj": null', b'"energy_mj": 1e999'),
        (b'"original": 0.987', b'"original": 0.9870'),
        (b'"original": 0.987', b'"original": 9.87e-1'),
        (b'"onnxruntime"', b'"onnx\\u0072untime"'),
        (b'"version": 1', b'"version": 1.0'),
        (b'"version": 1', b'"version": true'),
        (b'"version": 1', b'"version": 0'),
        (b'"bytes": 300', b'"bytes": -300'),
        (b'"role": "node"', b'"role": "owner"'),
        (b"\n", b"\r\n"),
        (b"  ", b"\t"),
        (b'"backend"', b'"Backend"'),
    ],
)
def test_the_same_said_otherwise_is_refused(signed: Signed, before: bytes, after: bytes) -> None:
    assert before in signed.data
    data = signed.data.replace(before, after)
    assert signed.with_proof(data) == "refused"
    assert str(signed.path) in verify(signed.subject, signed.keyring).reason
    assert signed.with_proof(signed.data) == "proved"
