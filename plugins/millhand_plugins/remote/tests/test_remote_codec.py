"""Requests and answers as bytes: every datatype there and back, and whatever a lying upstream may write."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from millhand.serving.tensors import DATATYPE_OF
from millhand_plugins.remote.codec import (
    HEADER_LENGTH,
    SLACK_BYTES,
    CannotCarry,
    Expected,
    WrongAnswer,
    answer_bytes_cap,
    decode_answer,
    encode_request,
)

NUMERIC = sorted(set(DATATYPE_OF) - {"object"})


def expected(dtype: str = "float32", shape: tuple[int, ...] = (-1, 2), rows: int = 1, **changes: str) -> Expected:
    named = {"model": "m", "version": "", "id": "7", **changes}
    return Expected(named["model"], named["version"], named["id"], rows, {"y": (dtype, shape)})


def echo(fields: dict[str, str], body: list[Any], binary: bool) -> tuple[dict[str, str], bytearray]:
    """What an honest server answers that gives its input back as y."""
    joined = b"".join(bytes(memoryview(part).cast("B")) for part in body)
    size = int(fields.get(HEADER_LENGTH, len(joined)))
    request = json.loads(joined[:size])
    (tensor,) = request["inputs"]
    answer = {"model_name": "m", "model_version": "1", "id": request["id"], "outputs": [{**tensor, "name": "y"}]}
    head = json.dumps(answer).encode()
    if not binary:
        return {}, bytearray(head)
    assert tensor["parameters"]["binary_data_size"] == len(joined) - size
    assert request["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]
    return {HEADER_LENGTH.lower(): str(len(head))}, bytearray(head + joined[size:])


def there_and_back(array: NDArray[Any], binary: bool) -> NDArray[Any]:
    wanted = expected(array.dtype.name, (-1, *array.shape[1:]), len(array))
    headers, body = echo(*encode_request({"x": array}, wanted, {"deadline_ms": 5}, binary), binary)
    return decode_answer(headers, body, wanted)["y"]


@pytest.mark.parametrize("dtype", NUMERIC)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_datatype_comes_back_as_it_was(dtype: str, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    array = data.draw(hnp.arrays(dtype, shape))
    np.testing.assert_array_equal(there_and_back(array, binary=True), array)
    finite = np.nan_to_num(array, nan=0, posinf=1, neginf=-1) if array.dtype.kind == "f" else array
    back = there_and_back(finite, binary=False)
    np.testing.assert_array_equal(back, finite)
    assert back.dtype == array.dtype


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_bytes_come_back_as_they_were(items: list[bytes]) -> None:
    array = np.empty((len(items), 1), dtype=object)
    array[:, 0] = items
    assert there_and_back(array, binary=True).ravel().tolist() == items


def test_text_goes_through_json() -> None:
    array = np.array([["Öl", "leck"]], dtype=object)
    assert there_and_back(array, binary=False).tolist() == [["Öl".encode(), b"leck"]]


@pytest.mark.parametrize(
    "array", [np.array([[np.nan]], np.float32), np.array([[np.inf]]), np.array([[b"\xff\xfe"]], dtype=object)]
)
def test_what_json_cannot_say_is_not_sent(array: NDArray[Any]) -> None:
    with pytest.raises(CannotCarry, match="tensor 'x' holds"):
        encode_request({"x": array}, expected(), {}, binary=False)


def test_a_slice_and_a_foreign_byte_order_are_sent_as_the_values_they_are() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(there_and_back(array, binary=True), array)


# ---- what a remote may say ------------------------------------------------------------------------------------------

Y = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
BINARY_Y = {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}


def answer(*outputs: Any, **changes: Any) -> bytes:
    return json.dumps(
        {"model_name": "m", "model_version": "1", "id": "7", "outputs": list(outputs), **changes}
    ).encode()


LIES = [
    (answer({**Y, "name": "z"}), "'z', which was not asked for"),
    (answer(), "without output 'y'"),
    (answer(Y, Y), "'y' twice"),
    (answer(Y, {**Y, "name": "z"}), "'z', which was not asked"),
    (answer({**Y, "datatype": "FP64"}), "as FP64, model.toml says FP32"),
    (answer({**Y, "datatype": "INT32"}), "as INT32"),
    (answer({**Y, "shape": [2, 1]}), r"in shape \[2, 1\], expected is \[1, 2\]"),
    (answer({**Y, "shape": [2, 2], "data": [1, 2, 3, 4]}), "in shape"),
    (answer({**Y, "shape": [2]}), "in shape"),
    (answer({**Y, "shape": []}), "in shape"),
    (answer({**Y, "shape": [-1, -2]}), "in shape"),
    (answer({**Y, "data": [1]}), "1 elements, its shape needs 2"),
    (answer({**Y, "data": [1, 2, 3]}), "3 elements"),
    (answer({**Y, "data": [1, None]}), "not FP32"),
    (answer({**Y, "data": [1, "2"]}), "not FP32"),
    (answer({**Y, "data": [1, True]}), "not FP32"),
    (answer({**Y, "data": [1, 1e300]}), "too large for FP32"),
    (answer({**Y, "data": {"a": 1}}), "not FP32"),
    (answer({"name": "y", "datatype": "FP32", "shape": [1, 2]}), "not FP32"),
    (answer({**Y, "data": "[" * 100}), "not FP32"),
    (answer(Y, model_name="other"), "as model 'other', asked was 'm'"),
    (answer(Y, id="8"), "request '8', asked was '7'"),
    (answer({**BINARY_Y}), "binary_data_size = 8 for output 'y', with 0 bytes left"),
    (answer({**BINARY_Y, "parameters": {"binary_data_size": -1}}), "binary_data_size = -1"),
    (answer({**BINARY_Y, "parameters": {"binary_data_size": True}}), "binary_data_size = True"),
    (answer({**BINARY_Y, "parameters": {"binary_data_size": "8"}}), "binary_data_size = '8'"),
    (b"<html>busy</html>", "none of the Open Inference Protocol"),
    (b"", "none of the Open"),
    (b"[]", "none of the Open"),
    (b'{"outputs": []}', "none of the Open"),
    (b'{"model_name": "m"}', "none of the Open"),
    (b'{"error": "but with 200"}', "none of the Open"),
    (answer(Y)[:-5], "none of the Open"),
    (b"\xff" * 20, "none of the Open"),
    (b"[" * 100_000, "none of the Open"),
    (b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":' + b"[" * 100_000, "none of"),
    (answer({**Y, "data": json.loads("[" * 900 + "]" * 900)}), "0 elements"),
    (answer(Y, outputs=None), "none of the Open"),
]


@pytest.mark.parametrize(("body", "says"), LIES)
def test_a_lie_is_named(body: bytes, says: str) -> None:
    with pytest.raises(WrongAnswer, match=says):
        decode_answer({}, bytearray(body), expected())


def test_another_version_is_named() -> None:
    with pytest.raises(WrongAnswer, match="as version '1', asked was '3'"):
        decode_answer({}, bytearray(answer(Y)), expected(version="3"))
    with pytest.raises(WrongAnswer, match="as version 'None'"):
        decode_answer({}, bytearray(answer(Y, model_version=None)), expected(version="3"))


@pytest.mark.parametrize(
    ("length", "tail", "says"),
    [
        ("99999", b"\0" * 8, "Inference-Header-Content-Length: 99999"),
        ("-1", b"\0" * 8, "Length: -1"),
        ("9" * 30, b"\0" * 8, "Length: 9"),
        ("x", b"\0" * 8, "Length: x"),
        ("3", b"\0" * 8, "none of the Open"),
        (None, b"\0" * 8, "none of the Open"),
        ("right", b"\0" * 7, "8 for output 'y', with 7 bytes left"),
        ("right", b"\0" * 9, "1 bytes that belong to no output"),
    ],
)
def test_binary_sizes_that_do_not_fit_are_named(length: str | None, tail: bytes, says: str) -> None:
    head = answer(BINARY_Y)
    headers = {} if length is None else {HEADER_LENGTH.lower(): str(len(head)) if length == "right" else length}
    with pytest.raises(WrongAnswer, match=says):
        decode_answer(headers, bytearray(head + tail), expected())


def binary(dtype: str, shape: list[int], data: bytes, wanted: Expected) -> NDArray[Any]:
    output = {"name": "y", "datatype": DATATYPE_OF[dtype], "shape": shape}
    head = answer({**output, "parameters": {"binary_data_size": len(data)}})
    return decode_answer({HEADER_LENGTH.lower(): str(len(head))}, bytearray(head + data), wanted)["y"]


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "says"),
    [
        ("bool", [1, 2], b"\x01\x02", "no BOOL"),
        ("int32", [1, 2], b"\0" * 7, "7 bytes, its shape needs 8"),
        ("object", [1, 2], b"\x01\0\0\0a", "BYTES that do not end"),
        ("object", [1, 2], b"\x01\0\0\0a\xff\xff\xff\xffb", "BYTES that do not end"),
        ("object", [1, 2], b"\x01\0\0\0a\x01\0\0\0bc", "BYTES that do not end"),
        ("object", [1, 2], b"\0\0\0\0" * 3, "BYTES that do not end"),
    ],
)
def test_binary_data_that_is_none_of_its_type_is_named(dtype: str, shape: list[int], data: bytes, says: str) -> None:
    with pytest.raises(WrongAnswer, match=says):
        binary(dtype, shape, data, expected(dtype))


@pytest.mark.parametrize(("dtype", "value"), [("int8", 128), ("uint8", -1), ("int64", 2**63), ("uint64", 2**64)])
def test_an_integer_out_of_range_is_named(dtype: str, value: int) -> None:
    body = answer({"name": "y", "datatype": DATATYPE_OF[dtype], "shape": [1, 1], "data": [value]})
    with pytest.raises(WrongAnswer, match=r"is no U?INT|not U?INT"):
        decode_answer({}, bytearray(body), expected(dtype, (-1, 1)))


def test_a_free_dimension_takes_any_size_that_memory_has() -> None:
    wanted = expected("float32", (-1, -1, -1))
    assert binary("float32", [1, 0, 3], b"", wanted).shape == (1, 0, 3)
    with pytest.raises(WrongAnswer, match="in shape"):
        binary("float32", [1, 0, 2**62], b"", wanted)
    with pytest.raises(WrongAnswer, match="in 0 bytes, its shape needs"):
        binary("float32", [1, 2**62, 2**62], b"", wanted)


def test_an_odd_header_length_gives_an_aligned_array() -> None:
    for padding in range(8):
        head = answer(BINARY_Y) + b" " * padding
        body = bytearray(head + np.array([1, 2], "<f4").tobytes())
        array = decode_answer({HEADER_LENGTH.lower(): str(len(head))}, body, expected())["y"]
        assert array.flags.aligned
        assert array.tolist() == [[1, 2]]


@settings(max_examples=600, deadline=None)
@given(
    body=st.sampled_from([(answer(Y), b""), (answer(BINARY_Y), b"\x00\x00\x80?\x00\x00\x00@")]),
    cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=4),
    shift=st.integers(-3, 3),
)
def test_a_mutated_answer_is_refused_or_a_tensor_as_declared(
    body: tuple[bytes, bytes], cuts: list[tuple[int, int, bytes]], shift: int
) -> None:
    head, tail = body
    mutated = head + tail
    for start, size, patch in cuts:
        mutated = mutated[:start] + patch + mutated[start + size :]
    headers = {HEADER_LENGTH.lower(): str(len(head) + shift)} if tail else {}
    try:
        arrays = decode_answer(headers, bytearray(mutated), expected())
    except WrongAnswer:
        return
    assert list(arrays) == ["y"]
    assert arrays["y"].dtype == np.float32
    assert arrays["y"].shape == (1, 2)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "bool", "float16"])
def test_the_longest_truthful_answer_fits_its_cap(dtype: str) -> None:
    extreme = {"float64": -1.7976931348623157e308, "int64": -(2**63), "uint64": 2**64 - 1, "bool": False}.get(
        dtype, -0.1
    )
    outputs = {"y": (dtype, (-1, 1000))}
    data = np.full((4, 1000), extreme, dtype).ravel().tolist()
    pretty = json.dumps(json.loads(msgspec.json.encode({"data": data})), separators=(", ", ": "))
    assert len(pretty) <= answer_bytes_cap(outputs, 4, 1) <= 4000 * 32 + SLACK_BYTES
    assert answer_bytes_cap({"y": ("object", (-1, 1))}, 4, 12345) == 12345
    assert answer_bytes_cap({"y": ("float32", (-1, -1))}, 4, 12345) == 12345
