"""Requests and responses of the Open Inference Protocol as data: JSON, binary, both readers of JSON."""

from __future__ import annotations

import gc
import json
import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millhand.errors import InputError
from millhand.serving import inference, quick_json
from millhand.serving.answer import encode_response, write_response
from millhand.serving.inference import (
    DEADLINE_MS_CAP,
    InferRequest,
    OutputWish,
    read_body,
    read_raw,
    read_request,
)
from millhand.serving.tensors import DATATYPES

FLOATS = ("FP16", "FP32", "FP64")
NUMBERS = [name for name in DATATYPES if name not in ("BOOL", "BYTES")]


def tensor(data=None, shape=(1, 2), datatype="FP32", name="x", **parameters):
    entry = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        entry["data"] = data
    return entry | ({"parameters": parameters} if parameters else {})


def text(*tensors, **extra):
    return json.dumps({"inputs": list(tensors), **extra}).encode()


def binary(tensors, data, **extra):
    """(body, size of its JSON)."""
    head = text(*tensors, **extra)
    return head + data, len(head)


def same(left, right):
    """The same tensors, bit for bit."""
    assert list(left) == list(right)
    for name, array in left.items():
        other = right[name]
        assert array.dtype == other.dtype and array.shape == other.shape, name
        assert array.tolist() == other.tolist() if array.dtype == object else array.tobytes() == other.tobytes(), name


# ---- JSON in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]], [[1], [2, 3, 4]], [[[1]], [[2, 3], 4]]])
@pytest.mark.parametrize("size", ["short", "long"])
def test_data_are_flat_or_nested(data, size):
    body = text(tensor(data, (2, 2)), parameters={"filler": "x" * (0 if size == "short" else 500)})
    same(read_body(body).tensors, {"x": np.array([[1, 2], [3, 4]], np.float32)})


def test_every_datatype_from_json():
    for datatype, dtype in DATATYPES.items():
        data = {"BOOL": [True, False], "BYTES": ["Pumpe", "größer"]}.get(datatype, [0, 100])
        expected = [item.encode() for item in data] if datatype == "BYTES" else data
        array = read_body(text(tensor(data, (2,), datatype))).tensors["x"]
        assert array.dtype == np.dtype(dtype) and array.tolist() == expected


def test_id_parameters_and_outputs():
    request = read_body(text(
        tensor([1, 2]), id="42", outputs=[{"name": "y", "parameters": {"binary_data": True}}, {"name": "y"}],
        parameters={"deadline_ms": 5, "timeout": 9e9, "priority": -3, "binary_data_output": False, "mine": [1]},
    ))  # fmt: skip
    assert (request.id, request.deadline_ms, request.priority) == ("42", 5.0, -3)
    assert request.wanted == ("y",) and not request.all_binary
    assert read_body(text(tensor([1, 2]), parameters={"timeout": 1500})).deadline_ms == 1.5
    assert read_body(text(tensor([1, 2]), parameters={"timeout": 0})).deadline_ms is None
    assert read_body(text(tensor([1, 2]), parameters={"timeout": 2**64 - 1})).deadline_ms == DEADLINE_MS_CAP
    assert read_body(text(tensor([1, 2]), parameters={"binary_data_output": True})).all_binary
    assert read_request({"inputs": [tensor([1, 2])]}).tensors["x"].tolist() == [[1, 2]]


DEEP = 5000
BAD = {
    "no object": b"[1]",
    "no inputs": b"{}",
    "cut off": text(tensor([1, 2]))[:-3],
    "more follows": text(tensor([1, 2])) + b"x",
    "a byte order mark": b"\xef\xbb\xbf" + text(tensor([1, 2])),
    "NaN": text(tensor([float("nan"), 1])),
    "Infinity": text(tensor([float("inf"), 1])),
    "too large a number": text(tensor([1, 2])).replace(b"[1, 2]}", b"[1e999, 2]}"),
    "null": text(tensor([None, 1])),
    "a number as text": text(tensor(["1", 2])),
    "a fraction in INT32": text(tensor([1.5, 2], datatype="INT32")),
    "a float in INT32": text(tensor([1.0, 2], datatype="INT32")),
    "true in INT32": text(tensor([True, 2], datatype="INT32")),
    "true in FP32": text(tensor([True, 2])),
    "1 in BOOL": text(tensor([1, 0], datatype="BOOL")),
    "a number in BYTES": text(tensor([1, "a"], datatype="BYTES")),
    "256 in UINT8": text(tensor([256, 0], datatype="UINT8")),
    "-1 in UINT64": text(tensor([-1, 0], datatype="UINT64")),
    "2**63 in INT64": text(tensor([2**63, 0], datatype="INT64")),
    "1e39 in FP32": text(tensor([1e39, 0])),
    "70000 in FP16": text(tensor([70000, 0], datatype="FP16")),
    "data that are no list": text(tensor({"a": 1})),
    "null for data": text(tensor()).replace(b'"FP32"', b'"FP32", "data": null'),
    "text for data": text(tensor("12")),
    "objects in data": text(tensor([[1], {}])),
    "no data": text(tensor()),
    "too few elements": text(tensor([1])),
    "too many elements": text(tensor([1, 2, 3])),
    "a negative shape": text(tensor([1, 2], (-1, -2))),
    "a shape of floats": text(tensor([1, 2], (1.0, 2.0))),
    "a shape of text": text(tensor([1, 2], ("1", "2"))),
    "a huge shape of nothing": text(tensor([], (0, 2**70))),
    "a shape of nothing beyond memory": text(tensor([], (0, 2**40, 2**40))),
    "a huge shape": text(tensor([1, 2], (2**62, 2**62))),
    "too many dimensions": text(tensor([1], [1] * 33)),
    "an unknown datatype": text(tensor([1, 2], datatype="FLOAT")),
    "a datatype that is no text": text(tensor([1, 2], datatype=["FP32"])),
    "a name that is no text": text(tensor([1, 2], name=5)),
    "a name that is a list": text(tensor([1, 2], name=["x"])),
    "a tensor twice": text(tensor([1, 2]), tensor([1, 2])),
    "inputs that are no list": json.dumps({"inputs": 5}).encode(),
    "inputs that are text": json.dumps({"inputs": "tensor"}).encode(),
    "inputs that are lists": json.dumps({"inputs": [[5], ["name"]]}).encode(),
    "inputs that are null": json.dumps({"inputs": [None]}).encode(),
    "an id that is no text": text(tensor([1, 2]), id=5),
    "parameters that are a list": text(tensor([1, 2]), parameters=[1]),
    "outputs that are names": text(tensor([1, 2]), outputs=["y"]),
    "shared memory": text(tensor(shared_memory_region="r")),
    "shared memory for an output": text(
        tensor([1, 2]), outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]
    ),
    "binary_data that is text": text(tensor([1, 2]), outputs=[{"name": "y", "parameters": {"binary_data": "no"}}]),
    "a negative classification": text(tensor([1, 2]), outputs=[{"name": "y", "parameters": {"classification": -1}}]),
    "a classification true": text(tensor([1, 2]), outputs=[{"name": "y", "parameters": {"classification": True}}]),
    "a deadline of 0": text(tensor([1, 2]), parameters={"deadline_ms": 0}),
    "a deadline that is text": text(tensor([1, 2]), parameters={"deadline_ms": "5"}),
    "a deadline true": text(tensor([1, 2]), parameters={"deadline_ms": True}),
    "an endless deadline": text(tensor([1, 2]), parameters={"deadline_ms": 10**400}),
    "a negative timeout": text(tensor([1, 2]), parameters={"timeout": -1}),
    "half a priority": text(tensor([1, 2]), parameters={"priority": 0.5}),
    "a huge priority": text(tensor([1, 2]), parameters={"priority": 10**400}),
    "a large priority": text(tensor([1, 2]), parameters={"priority": 2**31}),
    "binary_data_output 1": text(tensor([1, 2]), parameters={"binary_data_output": 1}),
    "a name that is no UTF-8": text(tensor([1, 2])).replace(b'"x"', b'"\xff"'),
    "BYTES that are no UTF-8": text(tensor(["a", "b"], datatype="BYTES")).replace(b'"a"', b'"\xff"'),
    "half a character": text(tensor(["a", "b"], datatype="BYTES")).replace(b'"a"', b'"\\ud800"'),
    "nested too deep": text(tensor([1, 2])).replace(b"[1, 2]}", b"[" * DEEP + b"1, 2" + b"]" * DEEP + b"}"),
    "parameters too deep": text(tensor([1, 2]))[:-1]
    + b', "parameters": '
    + b'{"a":' * DEEP
    + b"1"
    + b"}" * DEEP
    + b"}",
    "binary data without a header": text(tensor(binary_data_size=8)),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("size", ["short", "long"])
def test_bad_requests_are_input_errors(name, size):
    """Of either size: short ones are read by the plain reader alone."""
    body = BAD[name] if size == "short" else BAD[name] + b" " * 300
    with pytest.raises(InputError) as caught:
        read_body(body)
    assert caught.value.message


def test_long_texts_are_cut_in_messages():
    with pytest.raises(InputError) as caught:
        read_body(text(tensor([1, 2]), parameters={"priority": 10**4000}))
    assert len(caught.value.message) < 300


# ---- the two readers of JSON ----------------------------------------------------------------------------------------


@pytest.fixture
def always_quick(monkeypatch):
    if quick_json.Parser is None:
        pytest.skip("pysimdjson is not installed")
    monkeypatch.setattr(quick_json, "_SMALLEST_BYTES", 0)


def outcome(body):
    try:
        return read_body(body)
    except InputError:
        return None


def agree(body):
    quick = outcome(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "read_quickly", lambda _: None)
        plain = outcome(body)
    assert (quick is None) == (plain is None), body
    if plain is not None:
        same(quick.tensors, plain.tensors)
        for field in ("id", "outputs", "deadline_ms", "priority", "binary"):
            assert getattr(quick, field) == getattr(plain, field), (field, body)
    return plain is not None


numbers = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-300, 300).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-65504, 65504, width=16).map(repr),
    st.decimals(allow_nan=False, allow_infinity=False, places=30, min_value=-1000, max_value=1000).map(str),
    st.sampled_from(["-0", "-0.0", "0e0", "1E5", "1e-400", "1e400", "4.9e-324", "1.7976931348623157e308", "65504",
                     "65519.99", "3.4028235e38", "3.4028236e38", "9007199254740993", "18446744073709551615",
                     "18446744073709551616", "-9223372036854775808", "-9223372036854775809", "0.1", "2e-324"]),
)  # fmt: skip
odd = st.sampled_from(["null", "true", '"1"', "{}", "01", "+1", "1.", ".5", "NaN", "Infinity", "", "[]", "1e", "--1"])
names = st.sampled_from(["x", "y", "größer", "a\\u0041", '\\"', "\\\\", "inputs", ""])
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def tensor_texts(draw):
    shape = draw(shapes)
    count = math.prod(shape)
    leaf = draw(st.sampled_from([numbers, st.integers(-100, 100).map(str), st.integers(0, 100).map(str)]))
    elements = draw(st.lists(leaf, min_size=count, max_size=count))
    if draw(st.integers(0, 9)) == 0:
        elements.insert(draw(st.integers(0, len(elements))), draw(odd))
    datatype = draw(st.sampled_from([*NUMBERS, *FLOATS, *FLOATS, "BOOL", "BYTES", "FP8"]))
    data = f"[{','.join(elements)}]"
    if draw(st.booleans()) and shape:  # nested, which need not follow the shape
        half = len(elements) // 2
        data = f"[[{','.join(elements[:half])}],[{','.join(elements[half:])}]]"
    keys = [f'"name":"{draw(names)}"', f'"shape":{shape}', f'"datatype":"{datatype}"', f'"data":{data}']
    if draw(st.booleans()):
        keys.append(draw(st.sampled_from(['"parameters":{}', '"parameters":{"a":[1,{"b":null}]}', '"more":1.5',
                                          '"data":[1]', '"name":"z"', '"parameters":{"binary_data_size":8}',
                                          '"parameters":null'])))  # fmt: skip
    return "{" + ",".join(draw(st.permutations(keys))) + "}"


@st.composite
def request_texts(draw):
    inputs = draw(st.lists(tensor_texts(), max_size=3))
    keys = [f'"inputs":[{",".join(inputs)}]']
    keys += draw(st.lists(st.sampled_from([
        '"id":"7"', '"id":7', '"parameters":{"deadline_ms":5}', '"parameters":{"priority":1}', '"inputs":[]',
        '"outputs":[{"name":"y","parameters":{"binary_data":true}}]', '"outputs":[]', '"unknown":[1,"a",null]',
        '"parameters":{"timeout":18446744073709551615}', '"parameters":{"a":1,"a":2}',
    ]), max_size=2))  # fmt: skip
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    return (space + "{" + f"{space},".join(draw(st.permutations(keys))) + "}" + space).encode()


@pytest.mark.usefixtures("always_quick")
@settings(max_examples=400, deadline=None)
@given(request_texts())
def test_the_quick_reader_agrees_with_the_plain_one(body):
    agree(body)


@pytest.mark.usefixtures("always_quick")
@settings(max_examples=400, deadline=None)
@given(request_texts(), st.data())
def test_the_readers_agree_on_damaged_requests(body, data):
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed)))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "repeat"]))
        if kind == "replace":
            changed[place : place + 1] = data.draw(st.binary(min_size=1, max_size=2))
        elif kind == "insert":
            changed[place:place] = data.draw(
                st.sampled_from([b",", b"[", b"]", b"{", b"}", b'"', b"0", b"-", b"\\", b" "])
            )
        elif kind == "delete":
            del changed[place : place + data.draw(st.integers(1, 8))]
        else:
            changed[place:place] = changed[place : place + 12]
    agree(bytes(changed))


@pytest.mark.usefixtures("always_quick")
@pytest.mark.parametrize("name", BAD)
def test_the_readers_agree_on_bad_requests(name):
    assert not agree(BAD[name])


@pytest.mark.usefixtures("always_quick")
def test_the_quick_reader_reads_what_most_clients_send(monkeypatch):
    """Numbers never become Python objects, and what was read does not keep the next request from being read."""
    monkeypatch.setattr(inference, "_decode", None)
    kept = []
    for datatype in NUMBERS:
        for number in range(3):
            request = read_body(text(tensor([[number], [2]], (2, 1), datatype), id="7"))
            assert request.tensors["x"].tolist() == [[number], [2]] and request.id == "7"
            kept.append(request)
    gc.collect()
    assert kept[0].tensors["x"].tolist() == [[0], [2]]


@pytest.mark.usefixtures("always_quick")
def test_the_parser_of_large_requests_is_not_kept():
    before = quick_json._parser
    read_body(text(tensor([0.5] * 300_000, (300_000,))))
    assert quick_json._parser is before


# ---- binary in ------------------------------------------------------------------------------------------------------


def sample(datatype):
    if datatype == "BYTES":
        array = np.empty((2, 2), dtype=object)
        array[:] = [[b"", b"\xff\0"], ["größer".encode(), b"x" * 300]]
        return array, b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())
    array = (np.arange(4) % 2 if datatype == "BOOL" else np.arange(4) * 25).astype(DATATYPES[datatype]).reshape(2, 2)
    return array, array.tobytes()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_from_binary(datatype):
    array, data = sample(datatype)
    body, size = binary([tensor(None, (2, 2), datatype, binary_data_size=len(data))], data)
    for given_body in (body, memoryview(body)):
        same(read_body(given_body, size).tensors, {"x": array})


def test_nan_and_infinity_come_in_as_binary():
    array = np.array([[math.nan, -math.inf]], np.float32)
    body, size = binary([tensor(binary_data_size=8)], array.tobytes())
    same(read_body(body, size).tensors, {"x": array})


def test_several_inputs_json_and_binary_mixed():
    inputs = [
        tensor(None, (3,), "UINT8", "a", binary_data_size=3),
        tensor([1, 2], (2,), "INT64", "b"),
        tensor(None, (1, 2), "FP64", "c", binary_data_size=16),
        tensor(None, (0, 4), "FP32", "d", binary_data_size=0),
        tensor(None, (1,), "BYTES", "e", binary_data_size=5),
    ]
    data = b"\1\2\3" + struct.pack("<2d", 0.5, -0.5) + struct.pack("<I", 1) + b"x"
    body, size = binary(inputs, data)
    tensors = read_body(body, size).tensors
    assert {name: array.tolist() for name, array in tensors.items()} == {
        "a": [1, 2, 3], "b": [1, 2], "c": [[0.5, -0.5]], "d": [], "e": [b"x"]
    }  # fmt: skip


EIGHT = bytes(8)
LIES = {
    "a size too small": ([tensor(binary_data_size=4)], EIGHT),
    "a size too large": ([tensor(binary_data_size=12)], bytes(12)),
    "a size beyond the body": ([tensor(binary_data_size=8)], bytes(7)),
    "a huge size": ([tensor(binary_data_size=2**63)], EIGHT),
    "a negative size": ([tensor(binary_data_size=-8)], EIGHT),
    "a size that is a float": ([tensor(binary_data_size=8.0)], EIGHT),
    "a size that is text": ([tensor(binary_data_size="8")], EIGHT),
    "a size true": ([tensor(None, (1,), "BOOL", binary_data_size=True)], b"\1"),
    "a size null and data": ([tensor([1, 2], binary_data_size=None)], EIGHT),
    "more than the sizes say": ([tensor(binary_data_size=8)], bytes(9)),
    "data that no tensor takes": ([tensor([1, 2])], EIGHT),
    "data and a size": ([tensor([1, 2], binary_data_size=8)], EIGHT),
    "the same bytes for two": ([tensor(binary_data_size=8), tensor(name="y", binary_data_size=8)], EIGHT),
    "a negative offset by a size": (
        [tensor(binary_data_size=8), tensor(None, (0,), name="y", binary_data_size=-4)], bytes(4)
    ),
    "a shape too large": ([tensor(None, (2**61, 2**61), binary_data_size=8)], EIGHT),
    "a shape of nothing too large": ([tensor(None, (0, 2**70), binary_data_size=0)], b""),
    "a truth of 2": ([tensor(None, (2,), "BOOL", binary_data_size=2)], b"\1\2"),
    "a string beyond the data": ([tensor(None, (1,), "BYTES", binary_data_size=6)], struct.pack("<I", 3) + b"xx"),
    "a string of 4 GiB": ([tensor(None, (1,), "BYTES", binary_data_size=6)], struct.pack("<I", 2**32 - 1) + b"xx"),
    "half a length": ([tensor(None, (1,), "BYTES", binary_data_size=3)], b"\0\0\0"),
    "too few strings": ([tensor(None, (2,), "BYTES", binary_data_size=4)], bytes(4)),
    "too many strings": ([tensor(None, (1,), "BYTES", binary_data_size=8)], bytes(8)),
    "many empty strings": ([tensor(None, (2**40,), "BYTES", binary_data_size=80)], bytes(80)),
    "an unknown datatype": ([tensor(None, (1, 2), "BF16", binary_data_size=4)], bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lying_sizes_are_input_errors(name):
    body, size = binary(*LIES[name])
    with pytest.raises(InputError) as caught:
        read_body(body, size)
    assert caught.value.hint


@pytest.mark.parametrize("size", [1, 20, 10_000, 10**11, -1])
def test_lying_header_lengths_are_input_errors(size):
    body, _ = binary([tensor(binary_data_size=8)], EIGHT)
    with pytest.raises(InputError):
        read_body(body, size)
    with pytest.raises(InputError):
        read_body(b"", 1)


@settings(max_examples=300, deadline=None)
@example(b"\t\t\x00\x00", 2, 2, "UINT16", [])
@given(st.binary(max_size=40), st.integers(-5, 50), st.integers(-3, 3), st.sampled_from(list(DATATYPES)), shapes)
def test_any_binary_request_is_read_or_refused(data, size, shift, datatype, shape):
    body, header = binary([tensor(None, shape, datatype, binary_data_size=size)], data)
    try:
        array = read_body(body, header + shift).tensors["x"]
    except InputError:
        return
    assert shift >= 0, "a header that is cut off is none"
    assert array.shape == tuple(shape)
    assert array.dtype == object or array.tobytes() == data[shift:], "white space behind the header belongs to it"


FLOATS_FP32 = f"{np.finfo(np.float32).min.item()} to {np.finfo(np.float32).max.item()}"


@pytest.mark.parametrize(
    ("datatype", "data", "value", "limits"),
    [
        ("UINT8", [[1, -1], [2, 3]], "-1 at [0, 1]", "0 to 255"),
        ("INT8", [1, 2, 3, 128], "128 at [1, 1]", "-128 to 127"),
        ("UINT64", [0, 1, -7, 2], "-7 at [1, 0]", "0 to 18446744073709551615"),
        ("INT64", [0, 1, 2, 2**63], f"{2**63} at [1, 1]", f"{-(2**63)} to {2**63 - 1}"),
        ("FP32", [1, 2, 1e39, 3], "1e+39 at [1, 0]", FLOATS_FP32),
        ("FP16", [65504.4, -70000, 1, 1], "-70000.0 at [0, 1]", "-65504.0 to 65504.0"),
    ],
)
def test_a_number_beyond_its_datatype_is_named(datatype, data, value, limits):
    """With its place and the limits, by every way of reading JSON."""
    plain = {"inputs": [{"name": "x", "shape": [2, 2], "datatype": datatype, "data": data}]}
    for read in (read_request, lambda request: read_body(json.dumps(request).encode())):
        with pytest.raises(InputError) as caught:
            read(plain)
        assert caught.value.message == f"tensor 'x': {value} does not fit {datatype}, {limits}"
        assert caught.value.hint == "send values within these limits"


def test_plain_data_may_hold_what_json_cannot():
    """Of the control socket; over HTTP it is binary data alone."""
    data = [[1.5, float("nan")], [float("-inf"), 2]]
    tensors = read_request({"inputs": [tensor(data, (2, 2)), tensor(["a", "b"], (2,), "BYTES", "t")]}).tensors
    np.testing.assert_array_equal(tensors["x"], np.array(data, np.float32))
    assert tensors["t"].tolist() == [b"a", b"b"]
    for wrong, says in (
        ([tensor([1, float("nan")], (1, 2), "INT32")], "data is not INT32"),
        ([tensor([1, None], (1, 2))], "data is not FP32"),
        ([tensor([1], (1, 2))], "has 1 elements, its shape"),
        ([tensor()], "has no data"),
        ([tensor([1, 2]), tensor([1, 2])], "is given twice"),
        ([tensor([1, 2], datatype="FP23")], "did you mean"),
        ("x", "no inference request"),
        ([1], "no inference request"),
    ):
        with pytest.raises(InputError, match=says):
            read_request({"inputs": wrong})


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("deadline_ms", 0, "give milliseconds, a number above 0"),
        ("timeout", "soon", "give microseconds, a number from 0 on; 0 is none"),
        ("priority", "high", "give a small whole number; 0 is the default, a higher one goes first"),
        ("priority", 1.5, "give a small whole number; 0 is the default, a higher one goes first"),
    ],
)
def test_a_wrong_parameter_is_told_what_it_takes(key, value, hint):
    with pytest.raises(InputError, match=f"parameter '{key}' = ") as caught:
        read_body(text(tensor([1, 2]), parameters={key: value}))
    assert caught.value.hint == hint


# ---- raw ------------------------------------------------------------------------------------------------------------


def spec(shape, datatype="FP32"):
    return {"name": "x", "datatype": datatype, "shape": shape}


def test_a_raw_body_is_the_only_input():
    request = read_raw(np.arange(6, dtype=np.float32).tobytes(), [spec([-1, 2])])
    assert request.tensors["x"].tolist() == [[0, 1], [2, 3], [4, 5]] and request.all_binary
    assert read_raw(b"any\xff", [spec([-1, 1], "BYTES")]).tensors["x"].tolist() == [[b"any\xff"]]
    assert read_raw(memoryview(b"any"), [spec([-1], "BYTES")]).tensors["x"].tolist() == [b"any"]
    assert read_raw(b"", [spec([-1, 2])]).tensors["x"].shape == (0, 2)


@pytest.mark.parametrize("size", [479, 481, 1, 961])
def test_a_raw_body_that_is_no_whole_rows_is_told_their_size(size):
    with pytest.raises(InputError) as caught:
        read_raw(bytes(size), [spec([-1, 2, 60])])
    assert caught.value.message == (
        f"the body of {size} bytes is no multiple of 480, the bytes of a row of input 'x' (FP32, [2, 60])"
    )
    assert caught.value.hint == "send whole rows"


@pytest.mark.parametrize(
    ("body", "specs"),
    [
        (bytes(7), [spec([-1, 2])]),
        (bytes(4), [spec([-1, 2])]),
        (bytes(8), [spec([-1, -1])]),
        (bytes(8), []),
        (bytes(8), [spec([-1, 2]), spec([-1, 2])]),
        (b"ab", [spec([-1, 2], "BYTES")]),
        (b"\2", [spec([-1, 1], "BOOL")]),
        (bytes(8), [spec([-1, 0])]),
    ],
)
def test_a_raw_body_that_does_not_fit_is_an_input_error(body, specs):
    with pytest.raises(InputError):
        read_raw(body, specs)


# ---- out ------------------------------------------------------------------------------------------------------------


def test_an_answer_as_json_and_as_binary():
    outputs = {"y": np.array([[0.5, 1]], np.float32), "z": np.array([[b"a", "größer"]], dtype=object)}
    request = InferRequest({}, id="7", outputs=[OutputWish("z", {"binary_data": True}), OutputWish("y")])
    response, buffers = write_response("m", 3, request, outputs)
    data = struct.pack("<I", 1) + b"a" + struct.pack("<I", 8) + "größer".encode()
    assert json.loads(json.dumps(response)) == {
        "model_name": "m", "model_version": "3", "id": "7",
        "outputs": [
            {"name": "z", "datatype": "BYTES", "shape": [1, 2], "parameters": {"binary_data_size": len(data)}},
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1.0]},
        ],
    }  # fmt: skip
    assert buffers == [data]
    assert write_response("m", 3, InferRequest({}, binary=True), outputs)[1] == [outputs["y"].tobytes(), data]
    assert encode_response("m", 3, request, outputs)["outputs"][0]["data"] == ["a", "größer"]
    with pytest.raises(InputError, match="no output 'q'; "):
        write_response("m", 3, InferRequest({}, outputs=[OutputWish("q")]), {"qq": outputs["y"]})


def test_numbers_that_json_has_not_go_out_as_null():
    outputs = {"y": np.array([math.nan, math.inf, 1], np.float16)}
    response, _ = write_response("m", 1, InferRequest({}), outputs)
    assert response["outputs"][0]["data"] == [None, None, 1.0]
    assert write_response("m", 1, InferRequest({}, binary=True), outputs)[1] == [outputs["y"].tobytes()]


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_goes_out_as_it_came_in(datatype):
    array, data = sample(datatype)
    response, buffers = write_response("m", 1, InferRequest({}, binary=True), {"x": array})
    entry = response["outputs"][0]
    body, size = binary([{**entry, "shape": list(entry["shape"])}], b"".join(buffers))
    assert buffers == [data]
    same(read_body(body, size).tensors, {"x": array})


def classes(array, count, labels=()):
    wish = OutputWish("y", {"classification": count})
    response, _ = write_response("m", 1, InferRequest({}, outputs=[wish]), {"y": array}, {"y": labels})
    return response["outputs"][0]["data"], response["outputs"][0]["shape"]


def test_classification():
    scores = np.array([[0.25, 0.5, 0.25], [-1, -2, 3]], np.float32)
    assert classes(scores, 2) == (["0.500000:1", "0.250000:0", "3.000000:2", "-1.000000:0"], (2, 2))
    assert classes(scores, 1, ["a", "b", "c"]) == (["0.500000:1:b", "3.000000:2:c"], (2, 1))
    assert classes(scores[:, :2], 9, ["a"])[0][:2] == ["0.500000:1", "0.250000:0:a"]
    assert classes(scores[:, 0], 5) == (["0.250000:0", "-1.000000:0"], (2, 1))
    for dtype, row, order in [
        (np.uint8, [0, 255, 7], [1, 2, 0]),
        (np.int8, [-128, 127, 0], [1, 2, 0]),
        (np.uint64, [0, 2**64 - 1, 2**63], [1, 2, 0]),
        (np.float16, [math.nan, 1, 2], [2, 1, 0]),
        (np.float64, [1, 1, 1], [0, 1, 2]),
    ]:
        found, _ = classes(np.array([row], dtype), 3)
        assert [int(item.split(":")[1]) for item in found] == order, dtype
    for array in (np.array([[True]]), np.array([["a"]], dtype=object)):
        with pytest.raises(InputError, match="has no classes"):
            classes(array, 1)
