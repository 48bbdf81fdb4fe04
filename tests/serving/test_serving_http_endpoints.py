"""The HTTP process from outside: binary tensors, caches, time, load, clients that leave, bad input by the thousand."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import os
import random
import signal
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from http_kit import Client, chunked, request
from onnx import TensorProto, helper
from serving_kit import identity, save_onnx, scale, until, value, write_faulty, write_model

from millhand.errors import ConfigError
from millhand.serving.manifest import read_manifest
from millhand.serving.tensors import DATATYPES

SIZE = "Inference-Header-Content-Length"
KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip
SLOW, FINE = [[5.0, 0.0]], [[0.0, 1.0]]
"""Inputs of the faulty backend: 200 ms, and the identity."""


def tensor(data=None, shape=(1, 2), datatype="FP32", name="x", **parameters):
    entry = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        entry["data"] = data
    return entry | ({"parameters": parameters} if parameters else {})


def asking(data, **extra):
    return {"inputs": [tensor(data)], **extra}


def packed(inputs, data, **extra):
    """(body, headers) of a request with binary data."""
    head = json.dumps({"inputs": inputs, **extra}).encode()
    return head + data, {SIZE: str(len(head))}


def outputs_of(answer):
    """Name -> array of an answer, from JSON or binary data."""
    assert answer.status_code == 200, answer.text
    size = answer.headers.get(SIZE)
    head, data = (answer.content, b"") if size is None else (answer.content[: int(size)], answer.content[int(size) :])
    arrays, position = {}, 0
    for output in json.loads(head)["outputs"]:
        if "data" in output:
            array = np.array(output["data"], dtype=DATATYPES[output["datatype"]])
        else:
            part = data[position : position + output["parameters"]["binary_data_size"]]
            position += len(part)
            array = (
                strings(part) if output["datatype"] == "BYTES" else np.frombuffer(part, DATATYPES[output["datatype"]])
            )
        arrays[output["name"]] = array.reshape(output["shape"])
    assert position == len(data)
    return arrays


def strings(data):
    found, position = [], 0
    while position < len(data):
        (size,) = struct.unpack_from("<I", data, position)
        found.append(data[position + 4 : position + 4 + size])
        position += 4 + size
    array = np.empty(len(found), dtype=object)
    array[:] = found
    return array


async def infer(client, model, array, name="x", **extra):
    """Binary in, binary out."""
    datatype = next(key for key, dtype in DATATYPES.items() if dtype == array.dtype.name)
    entry = tensor(None, array.shape, datatype, name, binary_data_size=array.nbytes)
    content, headers = packed([entry], array.tobytes(), parameters={"binary_data_output": True}, **extra)
    return await client.post(f"/v2/models/{model}/infer", content=content, headers=headers)


def wire(model, body, headers=()):
    """The same request as bytes, for a raw connection."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(f"/v2/models/{model}/infer", body, headers=[f"{k}: {v}" for k, v in dict(headers).items()])


async def stats(client, model):
    answer = await client.get(f"/v2/models/{model}/stats")
    return answer.json()["model_stats"][0]


async def worker_counts(pool, model):
    return next(entry for entry in (await pool.stats())["models"] if entry["model"] == model)


# ---- binary tensors -------------------------------------------------------------------------------------------------


def data_of(datatype, rows=2):
    """(array, its binary data): small, or with many rows so large that it travels in shared memory."""
    if datatype == "BYTES":
        array = np.empty((rows, 2), dtype=object)
        array[:] = [[f"größer {row}".encode(), b"" if row else b"x" * 300] for row in range(rows)]
        return array, b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())
    dtype = np.dtype(DATATYPES[datatype])
    if dtype.kind == "f":
        array = np.linspace(-1000, 1000, 2 * rows).astype(dtype)
        array[:2] = [math.nan, -math.inf]
    elif dtype.kind == "b":
        array = np.arange(2 * rows) % 3 == 0
    else:
        array = np.resize(np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, 7], dtype), 2 * rows)
    return array.reshape(rows, 2), array.tobytes()


async def test_every_datatype_travels_as_binary(root, served):
    for datatype, kind in KINDS.items():
        folder = write_model(root, datatype.lower(), datatype=datatype, extra="max_batch = 4096")
        identity(folder / "1/model.onnx", kind=kind)
    _, client, _ = await served()
    for datatype in KINDS:
        for rows in (2, 2, 3000, 3000):  # each twice: the second goes by what was kept of the first
            array, data = data_of(datatype, rows)
            entry = tensor(None, (rows, 2), datatype, binary_data_size=len(data))
            content, headers = packed([entry], data, parameters={"binary_data_output": True})
            answer = await client.post(f"/v2/models/{datatype.lower()}/infer", content=content, headers=headers)
            assert answer.headers["content-type"] == "application/octet-stream"
            found = outputs_of(answer)["y"]
            assert found.dtype == array.dtype and found.shape == (rows, 2)
            assert found.tolist() == array.tolist() if datatype == "BYTES" else found.tobytes() == data


async def test_json_and_binary_mixed(root, served):
    folder = root / "sum"
    folder.mkdir()
    specs = "".join(f'[[inputs]]\nname = "{name}"\nshape = [-1, 2]\n' for name in "ab")
    specs += "".join(f'[[outputs]]\nname = "{name}"\nshape = [-1, 2]\n' for name in ("sum", "difference"))
    (folder / "model.toml").write_text(f'name = "sum"\ndescription = "a test"\nlicence = "MIT"\n{specs}')
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    both = [value("a", ["n", 2]), value("b", ["n", 2])]
    save_onnx(folder / "1/model.onnx", nodes, both, [value("sum", ["n", 2]), value("difference", ["n", 2])])
    _, client, _ = await served()
    b = np.array([[10, 20]], np.float32).tobytes()
    asked = [{"name": "difference", "parameters": {"binary_data": True}}, {"name": "sum"}]
    inputs = [tensor([[1, 2]], name="a"), tensor(name="b", binary_data_size=8)]
    for _ in range(2):
        content, headers = packed(inputs, b, outputs=asked, id="7")
        answer = await client.post("/v2/models/sum/infer", content=content, headers=headers)
        found = outputs_of(answer)
        assert list(found) == ["difference", "sum"]
        assert found["sum"].tolist() == [[11, 22]] and found["difference"].tolist() == [[-9, -18]]
        assert json.loads(answer.content[: int(answer.headers[SIZE])])["id"] == "7"
    for extra, binary in [
        ({}, []),
        ({"parameters": {"binary_data_output": True}}, ["sum", "difference"]),
        ({"parameters": {"binary_data_output": True}, "outputs": [{"name": "sum"}]}, ["sum"]),
        ({"parameters": {"binary_data_output": True},
          "outputs": [{"name": "sum", "parameters": {"binary_data": False}}]}, []),
    ]:  # fmt: skip
        content, headers = packed(inputs, b, **extra)
        answer = await client.post("/v2/models/sum/infer", content=content, headers=headers)
        head = json.loads(answer.content[: int(answer.headers.get(SIZE, len(answer.content)))])
        assert [output["name"] for output in head["outputs"] if "data" not in output] == binary
        assert outputs_of(answer)["sum"].tolist() == [[11, 22]]
    # What was kept of a request must not let JSON data count as binary data of the same size.
    content, headers = packed(inputs, b)
    for more in (b, b * 2):
        answer = await client.post("/v2/models/sum/infer", content=content + more, headers=headers)
        assert answer.status_code == 400 and "binary_data_size add up to 8" in answer.json()["error"]


async def test_a_raw_body_is_the_only_input(root, served):
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    identity(write_model(root, "text", datatype="BYTES", columns=1) / "1/model.onnx", 1, TensorProto.STRING)
    _, client, _ = await served()
    body = np.array([[1, 2], [3, 4]], np.float32).tobytes()
    for _ in range(2):
        answer = await client.post("/v2/models/scale/infer", content=body, headers={SIZE: "0"})
        assert outputs_of(answer)["y"].tolist() == [[2, 4], [6, 8]]
    answer = await client.post("/v2/models/text/infer", content=b"any text", headers={SIZE: "0"})
    assert outputs_of(answer)["y"].tolist() == [[b"any text"]]
    answer = await client.post("/v2/models/scale/infer", content=body[:-1], headers={SIZE: "0"})
    assert answer.status_code == 400 and "15 bytes" in answer.json()["error"]


async def test_lying_sizes(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    good = np.array([[1, 2]], np.float32)
    for _ in range(2):  # with nothing kept, and with what a good request left
        for size in ("-1", "x", "1.5", "", "9" * 13, "99999", "1", "3"):
            content, _ = packed([tensor(binary_data_size=8)], good.tobytes())
            answer = await client.post("/v2/models/same/infer", content=content, headers={SIZE: size})
            assert answer.status_code == 400, (size, answer.text)
        for data in (b"", bytes(7), bytes(9), bytes(16)):
            content, headers = packed([tensor(binary_data_size=8)], data, parameters={"binary_data_output": True})
            answer = await client.post("/v2/models/same/infer", content=content, headers=headers)
            assert answer.status_code == 400, answer.text
        assert outputs_of(await infer(client, "same", good))["y"].tolist() == [[1, 2]]


async def test_compressed_requests_and_answers(root, served):
    identity(write_model(root, "same", extra="max_batch = 9999") / "1/model.onnx")
    _, client, _ = await served({"body_bytes_cap": 100_000})
    array = np.zeros((5000, 2), np.float32)
    content, headers = packed([tensor(None, (5000, 2), binary_data_size=array.nbytes)], array.tobytes())
    packed_headers = {**headers, "Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    answer = await client.post("/v2/models/same/infer", content=gzip.compress(content), headers=packed_headers)
    assert answer.headers["content-encoding"] == "gzip" and outputs_of(answer)["y"].shape == (5000, 2)
    bomb = gzip.compress(bytes(10 << 20))
    answer = await client.post("/v2/models/same/infer", content=bomb, headers=packed_headers)
    assert answer.status_code == 413


# ---- what is kept between requests ----------------------------------------------------------------------------------


async def test_the_same_bytes_mean_the_same_for_other_data_models_and_versions(root, served):
    for name, factor in (("two", 2), ("three", 3)):
        folder = write_model(root, name, extra='policy = "all"')
        scale(folder / "1/model.onnx", factor)
        scale(folder / "2/model.onnx", -factor)
    _, client, _ = await served()
    for number in range(30):
        array = np.array([[number, number + 1]], np.float32)
        for name, factor in (("two", 2), ("three", 3)):
            for version, sign in (("1", 1), ("2", -1)):
                answer = await infer(client, f"{name}/versions/{version}", array)
                assert outputs_of(answer)["y"].tolist() == (array * factor * sign).tolist()
                head = json.loads(answer.content[: int(answer.headers[SIZE])])
                assert (head["model_name"], head["model_version"]) == (name, version)


async def test_the_same_head_after_a_reload(root, served):
    """A model that changes its shapes, its outputs and its version under a client that sends the same bytes."""
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    pool, client, _ = await served()
    array = np.ones((1, 2), np.float32)
    assert outputs_of(await infer(client, "scale", array))["y"].tolist() == [[2, 2]]
    scale(folder / "2/model.onnx", 3)
    await pool.load("scale")
    await until(lambda: _gives(client, "scale", array, [[3, 3]]))
    # The same version once more, with another artifact of other outputs.
    write_model(root, "scale", outputs={"y": ("FP32", 2), "z": ("FP32", 2)})
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    save_onnx(folder / "2/model.onnx", nodes, [value("x", ["n", 2])], [value("y", ["n", 2]), value("z", ["n", 2])])
    await pool.load("scale")
    await until(lambda: _gives(client, "scale", array, [[-1, -1]]))
    assert list(outputs_of(await infer(client, "scale", array))) == ["y", "z"]
    # And with another width: what was right is refused now, and says so.
    write_model(root, "scale", columns=3)
    identity(folder / "2/model.onnx", 3)
    await pool.load("scale")
    await until(lambda: _refuses(client, "scale", array))
    answer = await infer(client, "scale", array)
    assert "has shape [1, 2], expected [-1, 3]" in answer.json()["error"]
    wide = np.ones((1, 3), np.float32)
    assert outputs_of(await infer(client, "scale", wide))["y"].tolist() == wide.tolist()


async def _gives(client, model, array, expected):
    return outputs_of(await infer(client, model, array))["y"].tolist() == expected


async def _refuses(client, model, array):
    return (await infer(client, model, array)).status_code == 400


async def test_many_heads_and_shapes_push_each_other_out(root, served):
    identity(write_model(root, "same", extra="max_batch = 9999") / "1/model.onnx")
    _, client, _ = await served()
    for rows in [*range(1, 600), *range(1, 600, 7)]:
        array = np.full((rows, 2), rows, np.float32)
        assert (outputs_of(await infer(client, "same", array))["y"] == array).all()


async def test_a_token_is_checked_each_time(root, served, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    _, client, _ = await served({"admin_token_file": token})
    ask = "/v2/repository/index", {"Authorization": "Bearer first"}
    assert (await client.post(ask[0], headers=ask[1])).status_code == 200
    token.write_text("second")
    assert (await client.post(ask[0], headers=ask[1])).status_code == 403


# ---- paths and methods ----------------------------------------------------------------------------------------------

PATHS = [
    ("GET", "/", 404),
    ("GET", "/v2/", 200),
    ("GET", "/v3", 404),
    ("GET", "/v2/models", 404),
    ("GET", "/v2/models/", 404),
    ("GET", "/v2/models/same", 200),
    ("GET", "/v2/models/%73ame", 200),
    ("GET", "/v2/models/same%20", 404),
    ("GET", "/v2/models/gr%C3%B6%C3%9Fer", 404),
    ("GET", "/v2/models/%FF", 400),
    ("GET", "/v2/models/same?query=%FF", 200),
    ("GET", "/v2/models/same/versions/1", 200),
    ("GET", "/v2/models/same/versions/01", 404),
    ("GET", "/v2/models/same/versions/2", 404),
    ("GET", "/v2/models/same/versions/x", 404),
    ("GET", "/v2/models/same/versions/%C2%B2", 404),
    ("GET", "/v2/models/same/versions", 404),
    ("GET", "/v2/models/same/nothing", 404),
    ("GET", "/v2/models/same/ready", 200),
    ("GET", "/v2/models/same/config", 200),
    ("GET", "/v2/models/same/stats", 200),
    ("GET", "/v2/models/same/versions/1/stats", 200),
    ("GET", "/v2/models/stats", 200),
    ("GET", "/v2/models/none/stats", 404),
    ("GET", "/v2/health/live", 200),
    ("HEAD", "/v2/health/ready", 200),
    ("POST", "/v2/health/ready", 405),
    ("GET", "/v2/models/same/infer", 405),
    ("PUT", "/v2/models/same/infer", 405),
    ("DELETE", "/v2/models/same", 405),
    ("OPTIONS", "/v2", 405),
    ("GET", "/v2/repository/index", 405),
    ("POST", "/v2/repository/index", 403),
    ("POST", "/v2/repository/models/same/load", 403),
    ("POST", "/v2/repository/models/same/drop", 404),
    ("POST", "/v2/repository/models//load", 404),
    ("GET", "/v2/systemsharedmemory/status", 404),
    ("GET", "/v2/openapi.json", 200),
    ("GET", "/metrics", 200),
    ("GET", "/metrics?names=triton", 200),
]


async def test_paths_and_methods(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    for method, path, status in PATHS:
        for _ in range(2):  # the second time the head is known
            answer = await client.request(method, path)
            assert answer.status_code == status, (method, path, answer.text)
            if status == 405:
                assert answer.headers["allow"] in ("GET", "POST") and "use " in answer.json()["error"]
            elif status >= 400:
                assert answer.json()["error"]
    text = (await client.get("/metrics")).text
    routes = {
        line.split('path="')[1].split('"')[0] for line in text.splitlines() if line.startswith("http_requests_total")
    }
    assert routes <= {
        "other", "/v2", "/v2/models/{model}", "/v2/models/{model}/versions/{version}", "/v2/models/{model}/ready",
        "/v2/models/{model}/config", "/v2/models/{model}/stats", "/v2/models/{model}/versions/{version}/stats",
        "/v2/models/stats", "/v2/health/live", "/v2/health/ready", "/v2/models/{model}/infer", "/v2/repository/index",
        "/v2/repository/models/{model}/load", "/v2/openapi.json", "/metrics",
    }  # fmt: skip


# ---- numbers that are none ------------------------------------------------------------------------------------------


async def test_finite_inputs_refuse_nan_and_infinity(root, served):
    for name in ("open", "strict"):
        folder = write_model(root, name)
        identity(folder / "1/model.onnx")
        if name == "strict":
            path = folder / "model.toml"
            path.write_text(path.read_text().replace('[[inputs]]\nname = "x"', '[[inputs]]\nname = "x"\nfinite = true'))
    _, client, _ = await served()
    for bad in (math.nan, math.inf, -math.inf):
        array = np.array([[1, 2], [3, bad]], np.float32)
        for _ in range(2):
            answer = await infer(client, "strict", array)
            assert answer.status_code == 400
            assert f"tensor 'x' of model 'strict' is {bad} at [1, 1]" in answer.json()["error"]
            assert "finite = true" in answer.json()["error"]
            assert outputs_of(await infer(client, "open", array))["y"].tobytes() == array.tobytes()
        # JSON has no such number: it goes out as null.
        content, headers = packed([tensor(None, (2, 2), binary_data_size=16)], array.tobytes())
        answer = await client.post("/v2/models/open/infer", content=content, headers=headers)
        assert answer.json()["outputs"][0]["data"] == [1.0, 2.0, 3.0, None]
    largest = np.full((64, 2), np.finfo(np.float32).max)
    assert outputs_of(await infer(client, "strict", largest.astype(np.float32)))["y"].shape == (64, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('datatype = "FP32"', 'datatype = "INT32"\nfinite = true'),
            "finite = true goes with FP16, FP32 and FP64 only",
        ),
        (('[[outputs]]\nname = "y"', '[[outputs]]\nname = "y"\nfinite = true'), "'finite' goes with inputs only"),
    ],
)
def test_finite_is_refused_where_it_means_nothing(root, change, message):
    path = write_model(root, "same") / "model.toml"
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ConfigError, match=message):
        read_manifest(path.parent)


# ---- time and load --------------------------------------------------------------------------------------------------


async def test_deadlines_and_priorities(root, served):
    write_faulty(root, "slow")
    _, client, _ = await served()
    for parameters in ({"deadline_ms": 20}, {"timeout": 20_000}, {"deadline_ms": 20, "timeout": 10**9}):
        answer = await client.post("/v2/models/slow/infer", json=asking(SLOW, parameters=parameters))
        assert answer.status_code == 504 and "before the deadline" in answer.json()["error"], answer.text
    for parameters in ({"deadline_ms": 1e300}, {"timeout": 2**64 - 1}, {"timeout": 0}, {"priority": -(2**31)}):
        answer = await client.post("/v2/models/slow/infer", json=asking(FINE, parameters=parameters))
        assert answer.status_code == (400 if parameters == {"deadline_ms": 1e300} else 200), answer.text


async def test_a_worker_that_says_nothing_holds_nobody_beyond_the_deadline(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    pool, client, _ = await served(heartbeat_ms=10_000)
    assert await _ok(client, "same")
    worker = (await pool.stats())["workers"][0]["pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        asked = [
            client.post("/v2/models/same/infer", json=asking(FINE, parameters={"deadline_ms": 200})) for _ in "123"
        ]
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [504] * 3
        assert time.monotonic() - began_s < 2
    finally:
        os.kill(worker, signal.SIGCONT)
    assert await _ok(client, "same")


async def test_an_overfull_queue_is_503(root, served):
    write_faulty(root, "slow")
    _, client, _ = await served(queue=2)
    tasks = [asyncio.create_task(client.post("/v2/models/slow/infer", json=asking(SLOW))) for _ in range(10)]
    answers = Counter()
    for answer in await asyncio.gather(*tasks):
        answers[answer.status_code] += 1
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1" and "requests wait already" in answer.json()["error"]
    assert set(answers) == {200, 503} and answers[503] >= 5


async def test_what_does_not_serve_is_503_and_what_is_unknown_404(root, served):
    write_faulty(root, "broken", versions={1: "raise"})
    write_faulty(root, "dies")
    _, client, _ = await served()
    answer = await client.post("/v2/models/broken/infer", json=asking(FINE))
    assert answer.status_code == 503 and "is failed" in answer.json()["error"]
    assert "retry-after" not in answer.headers, "it does not come by itself"
    for path in ("/v2/models/broken/ready", "/v2/health/ready"):
        answer = await client.get(path)
        assert answer.status_code == 503 and "retry-after" not in answer.headers
    for path in ("/v2/models/none/infer", "/v2/models/dies/versions/7/infer"):
        assert (await client.post(path, json=asking(FINE))).status_code == 404
    for content, headers in ((json.dumps(asking([[1.0, 0.0]])).encode(), {}), packed_action(1)):
        await until(lambda: _ok(client, "dies"))
        answer = await client.post("/v2/models/dies/infer", content=content, headers=headers)
        assert answer.status_code == 503 and "send the request again" in answer.json()["error"]
        assert answer.headers["retry-after"] == "1"


async def test_what_comes_by_itself_says_when_to_ask_again(root, served):
    """A model that is being loaded, or whose worker is restarted; an unloaded one does not come."""
    write_faulty(root, "dies")
    pool, client, _ = await served(restart_delay_ms=60_000)
    await until(lambda: _ok(client, "dies"))
    psutil.Process(pool._workers["shared"].process.pid).kill()
    paths = ("/v2/models/dies/ready", "/v2/health/ready")

    async def restarting():
        return (await client.get(paths[0])).status_code == 503

    await until(restarting)
    for path in paths:
        assert (await client.get(path)).headers["retry-after"] == "1"
    await pool.unload("dies")

    async def unloaded():
        answer = await client.post("/v2/models/dies/infer", json=asking(FINE))
        return "is unloaded" in answer.json()["error"] and "retry-after" not in answer.headers

    await until(unloaded)


def packed_action(number):
    array = np.array([[number, 0]], np.float32)
    return packed([tensor(binary_data_size=8)], array.tobytes(), parameters={"binary_data_output": True})


async def _ok(client, model):
    return (await client.post(f"/v2/models/{model}/infer", json=asking(FINE))).status_code == 200


# ---- clients that leave ---------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_cancels_its_request_in_the_worker(root, served):
    write_faulty(root, "slow")
    pool, client, process = await served()
    assert await _ok(client, "slow")
    running = [asyncio.create_task(client.post("/v2/models/slow/infer", json=asking(SLOW))) for _ in range(3)]

    async def waiting():
        return (await worker_counts(pool, "slow"))["waiting"]

    await until(waiting)
    with Client(process.port) as leaving:
        leaving.send(wire("slow", asking(SLOW)))

    async def cancelled():
        return (await worker_counts(pool, "slow"))["cancelled"] == 1

    await until(cancelled)
    assert all(answer.status_code == 200 for answer in await asyncio.gather(*running))

    async def counted():
        text = (await client.get("/metrics")).text
        return 'http_requests_total{method="POST",path="/v2/models/{model}/infer",status="499"} 1' in text

    await until(counted)
    assert (await stats(client, "slow"))["inference_stats"]["fail"]["count"] == 1


async def test_a_request_that_a_worker_would_not_take_hurts_no_other(root, served):
    """Names and shapes beyond a frame's bound would close the connection to the worker, under everybody's feet."""
    write_faulty(root, "slow")
    _, client, _ = await served({"body_bytes_cap": 16 << 20})
    assert await _ok(client, "slow")
    running = [asyncio.create_task(client.post("/v2/models/slow/infer", json=asking(SLOW))) for _ in range(3)]
    names = [{"name": f"{number:0100}"} for number in range(20_000)]
    answer = await client.post("/v2/models/slow/infer", json=asking(FINE, outputs=names))
    assert answer.status_code == 400 and "fewer tensors" in answer.json()["error"]
    inputs = [tensor([1, 2], name=f"{number:0100}") for number in range(20_000)]
    answer = await client.post("/v2/models/slow/infer", json={"inputs": inputs})
    assert answer.status_code == 400 and "fewer tensors" in answer.json()["error"]
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 3


# ---- the end of a process -------------------------------------------------------------------------------------------


async def test_sigterm_answers_what_is_under_way_and_refuses_the_rest(root, served):
    write_faulty(root, "slow", extra="max_batch = 1")
    pool, client, process = await served()
    assert await _ok(client, "slow")
    with Client(process.port) as idle, Client(process.port) as asking_client:
        assert idle.ask(request("/v2/health/live", method="GET")).status == 200
        others = [asyncio.create_task(client.post("/v2/models/slow/infer", json=asking(SLOW))) for _ in range(4)]

        async def waiting():
            return (await worker_counts(pool, "slow"))["waiting"] == 3

        await until(waiting)
        asking_client.send(wire("slow", asking(SLOW)))  # it is the last of five, 200 ms each
        port = process.port
        stopped = asyncio.create_task(process.stop())
        assert await asyncio.to_thread(idle.ended)
        with pytest.raises(ConnectionRefusedError):
            Client(port)
        answer = await asyncio.to_thread(asking_client.answer)
        assert answer.status == 200 and answer.headers["connection"] == "close"
        assert json.loads(answer.body)["outputs"][0]["data"] == SLOW[0]
        assert asking_client.ended()
        assert [answer.status_code for answer in await asyncio.gather(*others)] == [200] * 4
        await stopped


async def test_a_restarted_process_serves_on(root, served):
    """SIGTERM to one process alone is no end: it drains, and another takes its place on the same port."""
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, process = await served()
    assert await _ok(client, "same")
    (pid,) = process.pids
    with Client(process.port) as kept:
        assert kept.ask(wire("same", asking(FINE))).status == 200
        os.kill(pid, signal.SIGTERM)
        assert await asyncio.to_thread(kept.ended)
    with Client(process.port) as waiting:  # the daemon's socket takes it; the next process serves it
        waiting.send(wire("same", asking(FINE)))
        answer = await asyncio.to_thread(waiting.answer)
    assert answer.status == 200 and process.pids not in ([], [pid]) and process.restarts == 1


# ---- memory ---------------------------------------------------------------------------------------------------------


def rss(pid):
    return psutil.Process(pid).memory_info().rss


def peak(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def test_large_bodies_are_taken_or_refused_without_a_blow_up(root, served):
    identity(write_model(root, "same", extra="max_batch = 9000000") / "1/model.onnx")
    pool, client, process = await served(deadline_ms=20_000)
    (pid,) = process.pids
    worker = (await pool.stats())["workers"][0]["pid"]
    assert await _ok(client, "same")
    before, cap = rss(pid), 64 << 20
    with Client(process.port) as refused:  # refused by its head: not a byte of it is kept
        refused.send(b"POST /v2/models/same/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (cap + 1))
        assert refused.answer().status == 413
    with Client(process.port) as waiting:  # the size alone takes no memory
        waiting.send(b"POST /v2/models/same/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % cap)
        assert (await client.get("/v2/health/live")).status_code == 200
        assert rss(pid) < before + (8 << 20)
    array = np.zeros(((cap - 1000) // 8, 2), np.float32)
    answer = await infer(client, "same", array)
    assert outputs_of(answer)["y"].shape == array.shape
    assert peak(pid) < before + 5 * cap, "body, what is unsent of it, the answer, and its copy"

    async def given_back():
        return rss(pid) < before + (16 << 20) and rss(worker) < before + (64 << 20)

    await until(given_back)


# ---- bad input by the thousand --------------------------------------------------------------------------------------


def mutations(count, seed=7):
    """(bytes on the wire, whether the connection must end after it) of requests that are nearly right."""
    rng = random.Random(seed)
    array = np.array([[1, 2]], np.float32).tobytes()
    mixed, headers = packed([tensor(binary_data_size=8)], array)
    valid = [
        (json.dumps(asking([[1, 2]], id="7", parameters={"deadline_ms": 1000})).encode(), {}),
        (json.dumps({"inputs": [tensor([1.5] * 400, (200, 2))]}).encode(), {}),
        (mixed, headers),
        (array, {SIZE: "0"}),
        (gzip.compress(mixed), {**headers, "Content-Encoding": "gzip"}),
    ]
    for _ in range(count):
        body, head = rng.choice(valid)
        data = bytearray(body)
        for _ in range(rng.choice([1, 1, 2, 5])):
            place = rng.randrange(len(data) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                data[place : place + 1] = rng.randbytes(rng.choice([1, 1, 4]))
            elif kind == 1:
                del data[place : place + rng.choice([1, 3, 30])]
            elif kind == 2:
                data[place:place] = data[place : place + rng.choice([1, 8, 40])]
            else:
                data[place:place] = rng.choice([b"[", b"}", b'"', b"-", b"9" * 30, b"null", b"1e999", b"\xff", b","])
        head = dict(head)
        if SIZE in head and rng.random() < 0.3:
            head[SIZE] = str(rng.choice([-1, 0, 1, int(head[SIZE]) + 1, 10**6, 10**14, "x"]))
        target = rng.choice(["same", "same", "same", "none", "same/versions/9"])
        sent = wire(target, bytes(data), head)
        if rng.random() < 0.2:
            sent = chunked([bytes(data)], target="/v2/models/same/infer")
        if rng.random() < 0.1:
            place = rng.randrange(len(sent))
            sent = sent[:place] + rng.randbytes(1) + sent[place:]
        yield sent


async def test_bad_requests_leave_nothing_behind(root, served):
    """2,000 requests that are nearly right: no 5xx but 503 and 504, and no descriptor, slot or memory is lost."""
    identity(write_model(root, "same", extra="max_batch = 4096") / "1/model.onnx")
    pool, client, process = await served({"body_bytes_cap": 1 << 20, "request_timeout_s": 2}, ring_slots=4)
    (pid,) = process.pids
    worker = (await pool.stats())["workers"][0]["pid"]

    def ask_all(requests):
        found = Counter()
        for sent in requests:
            with Client(process.port) as bad:
                bad.send(sent)
                bad.socket.shutdown(socket.SHUT_WR) if found.total() % 7 == 0 else None
                try:
                    found[bad.answer().status] += 1
                except (EOFError, ConnectionError):
                    found[0] += 1
        return found

    async def load():
        """Requests in every slot of the ring at once."""
        big = np.ones((600, 2), np.float32)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=20, trust_env=False) as own:
            answers = await asyncio.gather(*[infer(own, "same", big) for _ in range(16)])
        return [answer.status_code for answer in answers]

    await asyncio.to_thread(ask_all, list(mutations(300, seed=1)))
    assert await load() == [200] * 16

    async def no_client():
        return not psutil.Process(pid).net_connections("tcp")[1:]

    await until(no_client)  # but the listening socket
    before = [(psutil.Process(one).num_fds(), rss(one)) for one in (pid, worker)]
    found = await asyncio.to_thread(ask_all, list(mutations(2000)))
    assert set(found) <= {0, 200, 400, 404, 405, 408, 413, 431, 503, 504}, found
    assert found[400] > 500 and found[200] > 50 and found[404] > 100, found
    assert await load() == [200] * 16
    assert process.pids == [pid] and (await pool.stats())["workers"][0]["pid"] == worker

    async def as_before():
        """A report to the daemon, or a connection that was just reset, may have been counted in at first."""
        return all(psutil.Process(one).num_fds() <= fds for one, (fds, _) in zip((pid, worker), before, strict=True))

    await until(as_before)
    for one, (_, rss_before) in zip((pid, worker), before, strict=True):
        assert rss(one) < rss_before + (4 << 20)
    counts = await worker_counts(pool, "same")
    assert counts["waiting"] == counts["running"] == 0


async def test_a_flood_of_connections_leaves_nothing_behind(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, process = await served({"connections_cap": 8, "request_timeout_s": 1})
    (pid,) = process.pids
    assert await _ok(client, "same")
    before = psutil.Process(pid).num_fds()

    def flood():
        for _ in range(30):
            clients = [Client(process.port) for _ in range(20)]
            for one in clients:
                one.send(b"GET / HTTP/1.1\r\n")
            for one in clients:
                one.socket.close()

    await asyncio.to_thread(flood)

    async def as_before():
        return psutil.Process(pid).num_fds() <= before

    await until(as_before)
    async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as other:
        assert await _ok(other, "same")
