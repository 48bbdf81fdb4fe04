"""Passes over every endpoint of a node with Triton's clients: tritonclient.http, tritonclient.grpc, and asyncio's.

Run by a Python that has tritonclient, against the node of kit/conformance_kit.py:

    python tritonclient_conformance.py --http 127.0.0.1:8080 --grpc 127.0.0.1:8001 --token TOKEN

Prints a table of checks and clients, then the same as JSON in the last line. Exits with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import http.client
import inspect
import json
import queue
import sys
import traceback
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.metadata import version
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

WAIT_S = 20.0
WRONG, UNKNOWN, LATE = ("400", "INVALID_ARGUMENT"), ("404", "NOT_FOUND"), ("504", "DEADLINE_EXCEEDED")
"""What a refusal is called over HTTP, and over gRPC."""
NOT_LOADED = ("503", "UNAVAILABLE")
NOT_SERVED = ("404", "UNIMPLEMENTED")
NO_TOKEN, BAD_TOKEN = ("401", "UNAUTHENTICATED"), ("403", "PERMISSION_DENIED")

ROWS = 16
"""Most rows of a request to `scale`."""
X = np.array([[1, 2]], dtype=np.float32)
DATA = {
    "BOOL": np.array([True, False, False, True]),
    "UINT8": np.array([0, 1, 127, 255], np.uint8),
    "UINT16": np.array([0, 1, 256, 65535], np.uint16),
    "UINT32": np.array([0, 1, 65536, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 1, 2**53 + 1, 2**64 - 1], np.uint64),
    "INT8": np.array([-128, -1, 0, 127], np.int8),
    "INT16": np.array([-(2**15), -1, 0, 2**15 - 1], np.int16),
    "INT32": np.array([-(2**31), -1, 0, 2**31 - 1], np.int32),
    "INT64": np.array([-(2**63), -1, 2**53 + 1, 2**63 - 1], np.int64),
    "FP16": np.array([0.5, -2.0, 65504, 6e-8], np.float16),
    "FP32": np.array([0.1, -3e38, 1e-45, 16777217], np.float32),
    "FP64": np.array([0.1, -1e308, 5e-324, 2**53 - 1], np.float64),
    "BYTES": np.array([b"Pumpe 7", "größer".encode(), b"", b"\r\n\0 " * 99], dtype=object),
}
NOT_JSON = np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)
"""What only binary data can carry."""


class Client:
    """One of Triton's clients, sync or not, HTTP or gRPC, behind one way to call it."""

    def __init__(self, module: Any, url: str, token: str) -> None:
        self.name = module.__name__
        self.is_http = ".http" in self.name
        self.is_aio = self.name.endswith(".aio")
        self.url, self.module = url, module
        self.inner = module.InferenceServerClient(url)
        self.admin = {"authorization": f"Bearer {token}"}

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        found = getattr(self.inner, method)(*arguments, **options)
        return await found if inspect.isawaitable(found) else found

    async def told(self, method: str, *arguments: Any, **options: Any) -> Any:
        """An answer as plain data."""
        if not self.is_http:
            options["as_json"] = True
        return await self(method, *arguments, **options)

    def tensor(self, name: str, array: np.ndarray, datatype: str = "", binary: bool = True) -> Any:
        tensor = self.module.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
        return tensor.set_data_from_numpy(array, **({"binary_data": binary} if self.is_http else {}))

    def wish(self, name: str, classes: int = 0, binary: bool = True) -> Any:
        options = {"binary_data": binary} if self.is_http else {}
        return self.module.InferRequestedOutput(name, class_count=classes, **options)

    async def infer(self, model: str, tensors: dict[str, np.ndarray], **options: Any) -> Any:
        return await self("infer", model, [self.tensor(name, array) for name, array in tensors.items()], **options)

    async def refused(self, codes: tuple[str, str], says: str, method: str, *arguments: Any, **options: Any) -> str:
        """The message of a refusal, which must have the code and say so."""
        try:
            found = await self(method, *arguments, **options)
        except InferenceServerException as error:
            code, status = codes[0 if self.is_http else 1], str(error.status()).removeprefix("StatusCode.")
            assert status == code, f"status {status}, expected {code}: {error.message()}"
            assert says in error.message(), f"'{says}' is not in: {error.message()}"
            return str(error.message())
        raise AssertionError(f"{method}{arguments} was not refused but gave {found}")

    async def infer_refused(self, codes: tuple[str, str], says: str, model: str, tensors: Any, **options: Any) -> None:
        inputs = [self.tensor(name, array) for name, array in tensors.items()]
        await self.refused(codes, says, "infer", model, inputs, **options)


Check = Callable[[Client], Awaitable[None]]
CHECKS: dict[str, tuple[Check, Callable[[Client], bool]]] = {}


def check(name: str, where: Callable[[Client], bool] = lambda client: True) -> Callable[[Check], Check]:
    """Name a check, and say to which clients it applies."""

    def add(function: Check) -> Check:
        CHECKS[name] = (function, where)
        return function

    return add


def same(found: Any, expected: np.ndarray) -> None:
    assert found is not None, "the output is missing"
    assert found.dtype == expected.dtype, f"{found.dtype}, expected {expected.dtype}"
    np.testing.assert_array_equal(found, expected)


def is_http(client: Client) -> bool:
    return client.is_http


def is_grpc(client: Client) -> bool:
    return not client.is_http


# ---- server and models ----------------------------------------------------------------------------------------------


@check("server live, ready")
async def _(client: Client) -> None:
    assert await client("is_server_live") is True
    assert await client("is_server_ready") is True


@check("server metadata")
async def _(client: Client) -> None:
    found = await client.told("get_server_metadata")
    assert found["name"] == "millhand" and found["version"]
    assert {"binary_tensor_data", "statistics", "model_repository"} <= {*found["extensions"], "binary_tensor_data"}


@check("model ready")
async def _(client: Client) -> None:
    assert await client("is_model_ready", "scale") is True
    assert await client("is_model_ready", "scale", "2") is True
    assert await client("is_model_ready", "scale", "9") is False
    assert await client("is_model_ready", "nothing") is False


@check("model metadata")
async def _(client: Client) -> None:
    found = await client.told("get_model_metadata", "scale")
    assert found["name"] == "scale" and found["versions"] == ["1", "2"] and found["platform"] == "onnxruntime"
    (x,), (y,) = found["inputs"], found["outputs"]
    assert (x["name"], x["datatype"], [int(size) for size in x["shape"]]) == ("x", "FP32", [-1, 2])
    assert (y["name"], y["datatype"], [int(size) for size in y["shape"]]) == ("y", "FP32", [-1, 2])
    assert (await client.told("get_model_metadata", "scale", "1"))["name"] == "scale"
    await client.refused(UNKNOWN, "did you mean 'scale'", "get_model_metadata", "scael")
    await client.refused(UNKNOWN, "no version '9'", "get_model_metadata", "scale", "9")


@check("model config")
async def _(client: Client) -> None:
    found = await client.told("get_model_config", "scale")
    config = found if client.is_http else found["config"]
    assert config["name"] == "scale" and config["backend"] == "onnxruntime"
    assert int(config["max_batch_size"]) == ROWS
    (x,) = config["input"]
    assert (x["name"], x["data_type"], [int(size) for size in x["dims"]]) == ("x", "TYPE_FP32", [2])
    assert "dynamic_batching" in config
    if client.is_http:
        for datatype in DATA:
            config = await client.told("get_model_config", f"same-{datatype.lower()}", "1")
            assert config["input"][0]["data_type"] in dict(model_config_pb2.DataType.items())
    await client.refused(UNKNOWN, "'nothing'", "get_model_config", "nothing")


@check("model statistics")
async def _(client: Client) -> None:
    async def count() -> int:
        (entry,) = (await client.told("get_inference_statistics", "scale", "2"))["model_stats"]
        assert (entry["name"], entry["version"]) == ("scale", "2")
        return int(entry.get("inference_stats", {}).get("success", {}).get("count", 0))

    before = await count()
    await client.infer("scale", {"x": X})
    for _ in range(200):  # the workers report now and then
        if await count() > before:
            break
        await asyncio.sleep(0.05)
    assert await count() > before
    every = (await client.told("get_inference_statistics"))["model_stats"]
    assert {entry["name"] for entry in every} >= {"scale", "pair", "same-bytes"}
    await client.refused(UNKNOWN, "'nothing'", "get_inference_statistics", "nothing")


# ---- inference ------------------------------------------------------------------------------------------------------


@check("infer: 13 datatypes, binary in and out")
async def _(client: Client) -> None:
    same((await client.infer("same-fp32", {"x": NOT_JSON})).as_numpy("y"), NOT_JSON)
    for datatype, row in DATA.items():
        for rows in (1, 3):
            x = np.stack([row] * rows)
            result = await client.infer(f"same-{datatype.lower()}", {"x": x}, outputs=[client.wish("y")])
            same(result.as_numpy("y"), x)
            result = await client.infer(f"same-{datatype.lower()}", {"x": x})
            same(result.as_numpy("y"), x)


@check("infer: 13 datatypes, JSON in and out", is_http)
async def _(client: Client) -> None:
    for datatype, row in DATA.items():
        x = np.stack([row] * 3)
        for binary_in, binary_out in ((False, False), (True, False), (False, True)):
            inputs = [client.tensor("x", x, binary=binary_in)]
            outputs = [client.wish("y", binary=binary_out)]
            found = (await client("infer", f"same-{datatype.lower()}", inputs, outputs=outputs)).as_numpy("y")
            if datatype == "BYTES" and not binary_out:  # the client gives JSON's strings as they are
                found = np.array([[item.encode() for item in line] for line in found.tolist()], dtype=object)
            same(found, x)


@check("infer: typed contents through Triton's own stubs", is_grpc)
async def _(client: Client) -> None:
    fields = {"BOOL": "bool", "UINT64": "uint64", "INT64": "int64", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes"}
    async with grpc.aio.insecure_channel(client.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for datatype in DATA.keys() - {"FP16"}:
            x = np.stack([DATA[datatype]] * 2)
            field = fields.get(datatype, "int" if datatype.startswith("INT") else "uint")
            request = service_pb2.ModelInferRequest(model_name=f"same-{datatype.lower()}")
            tensor = request.inputs.add(name="x", datatype=datatype, shape=x.shape)
            getattr(tensor.contents, f"{field}_contents").extend(x.ravel().tolist())
            result = client.module.InferResult(await stub.ModelInfer(request, timeout=WAIT_S))
            same(result.as_numpy("y"), x)


@check("infer: BF16 is refused")
async def _(client: Client) -> None:
    x = np.zeros((1, 4), dtype=ml_dtypes.bfloat16)
    await client.refused(WRONG, "BF16", "infer", "same-fp32", [client.tensor("x", x, "BF16")])


@check("infer: versions")
async def _(client: Client) -> None:
    for number, factor, told in (("1", 2, "1"), ("2", 3, "2"), ("", 3, "2")):
        result = await client.infer("scale", {"x": X}, model_version=number)
        same(result.as_numpy("y"), factor * X)
        response = result.get_response()
        assert (response["model_version"] if client.is_http else response.model_version) == told


@check("infer: requested outputs, their order")
async def _(client: Client) -> None:
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[b"x"], [b"yz"]], object)
    result = await client.infer("pair", {"a": a, "b": b}, outputs=[client.wish("b_out"), client.wish("a_out")])
    same(result.as_numpy("a_out"), a)
    same(result.as_numpy("b_out"), b)
    outputs = result.get_response()["outputs"] if client.is_http else result.get_response().outputs
    assert [out["name"] if client.is_http else out.name for out in outputs] == ["b_out", "a_out"]
    result = await client.infer("pair", {"b": b, "a": a}, outputs=[client.wish("b_out")])
    same(result.as_numpy("b_out"), b)
    assert result.as_numpy("a_out") is None


@check("infer: JSON and binary in one request", is_http)
async def _(client: Client) -> None:
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[b"x"], [b"yz"]], object)
    for binary in ((True, False), (False, True)):
        inputs = [client.tensor("a", a, binary=binary[0]), client.tensor("b", b, binary=binary[1])]
        outputs = [client.wish("a_out", binary=binary[1]), client.wish("b_out", binary=binary[1])]
        result = await client("infer", "pair", inputs, outputs=outputs)
        same(result.as_numpy("a_out"), a)
        assert [str(item).strip("b'") for item in result.as_numpy("b_out").ravel()] == ["x", "yz"]


@check("infer: class_count")
async def _(client: Client) -> None:
    x = np.array([[0.1, 0.7, 0.2], [5, -1, 4]], np.float32)
    for binary in (True, False):
        result = await client.infer("classes", {"x": x}, outputs=[client.wish("y", classes=2, binary=binary)])
        found = [[str(item).removeprefix("b'").rstrip("'") for item in row] for row in result.as_numpy("y")]
        assert found == [["0.700000:1:leak", "0.200000:2:worn_pump"], ["5.000000:0:healthy", "4.000000:2:worn_pump"]]
    result = await client.infer("scale", {"x": X}, outputs=[client.wish("y", classes=1)])  # without labels
    assert [bytes(item) for item in result.as_numpy("y").ravel()] == [b"6.000000:1"]


@check("infer: request_id")
async def _(client: Client) -> None:
    for wanted in ("42", "größer ✓", "x" * 300):
        response = (await client.infer("scale", {"x": X}, request_id=wanted)).get_response()
        assert (response["id"] if client.is_http else response.id) == wanted


@check("infer: priority, timeout, parameters")
async def _(client: Client) -> None:
    options = {"priority": 3, "timeout": 5_000_000, "parameters": {"line": "press-7", "shift": 2, "checked": True}}
    same((await client.infer("scale", {"x": X}, **options)).as_numpy("y"), 3 * X)
    same((await client.infer("scale", {"x": X}, parameters={"deadline_ms": 5000})).as_numpy("y"), 3 * X)
    await client.infer_refused(LATE, "deadline", "scale", {"x": X}, timeout=1)
    await client.infer_refused(WRONG, "deadline_ms", "scale", {"x": X}, parameters={"deadline_ms": -1})


@check("infer: sequences are passed over")
async def _(client: Client) -> None:
    result = await client.infer("scale", {"x": X}, sequence_id=7, sequence_start=True, sequence_end=True)
    same(result.as_numpy("y"), 3 * X)


@check("infer: client_timeout", is_grpc)
async def _(client: Client) -> None:
    same((await client.infer("scale", {"x": X}, client_timeout=WAIT_S)).as_numpy("y"), 3 * X)


@check("infer: compressed requests and answers")
async def _(client: Client) -> None:
    x = np.arange(ROWS * 4, dtype=np.float32).reshape(ROWS, 4)
    for algorithm in ("gzip", "deflate"):
        if not client.is_http:
            same((await client.infer("same-fp32", {"x": x}, compression_algorithm=algorithm)).as_numpy("y"), x)
            continue
        for request, response in ((algorithm, None), (None, algorithm), (algorithm, algorithm)):
            options = {"request_compression_algorithm": request, "response_compression_algorithm": response}
            same((await client.infer("same-fp32", {"x": x}, **options)).as_numpy("y"), x)
            result = await client.infer("same-fp32", {"x": x}, outputs=[client.wish("y", binary=False)], **options)
            same(result.as_numpy("y"), x)


@check("infer: large answers come compressed as asked", is_http)
async def _(client: Client) -> None:
    text = np.full((ROWS, 4), b"pressure " * 100, dtype=object)
    for binary in (False, True):
        body, size = client.module.InferenceServerClient.generate_request_body(
            [client.tensor("x", text)], outputs=[client.wish("y", binary=binary)]
        )
        for algorithm, unpack in (("gzip", gzip.decompress), ("deflate", zlib.decompress), ("identity", bytes)):
            headers = {"Inference-Header-Content-Length": str(size), "Accept-Encoding": algorithm}
            answer, data = post(client.url, "/v2/models/same-bytes/infer", body, headers)
            assert answer.status == 200
            assert answer.getheader("content-encoding", "identity") == algorithm
            json_bytes = int(answer.getheader("inference-header-content-length") or len(unpack(data)))
            assert json.loads(unpack(data)[:json_bytes])["outputs"][0]["shape"] == [ROWS, 4]
            result = client.module.InferenceServerClient.parse_response_body(
                data,
                header_length=json_bytes if binary else None,
                content_encoding=None if algorithm == "identity" else algorithm,
            )
            assert {len(bytes(item) if binary else item) for item in result.as_numpy("y").ravel()} == {900}


@check("infer: generate_request_body, parse_response_body", is_http)
async def _(client: Client) -> None:
    body, size = client.module.InferenceServerClient.generate_request_body([client.tensor("x", X)])
    headers = {"Inference-Header-Content-Length": str(size)}
    answer, data = post(client.url, "/v2/models/scale/infer", body, headers)
    result = client.module.InferenceServerClient.parse_response_body(
        data, header_length=int(answer.getheader("inference-header-content-length"))
    )
    same(result.as_numpy("y"), 3 * X)


@check("infer: headers and query parameters", is_http)
async def _(client: Client) -> None:
    options = {"headers": {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}, "query_params": {"from": "line 7"}}
    same((await client.infer("scale", {"x": X}, **options)).as_numpy("y"), 3 * X)
    assert await client("is_server_live", **options) is True


@check("infer: several at once")
async def _(client: Client) -> None:
    xs = [np.full((1, 2), number, np.float32) for number in range(20)]
    if client.is_aio:
        results = await asyncio.gather(*(client.infer("scale", {"x": x}) for x in xs))
    elif client.is_http:
        with contextlib.closing(client.module.InferenceServerClient(client.url, concurrency=5)) as inner:
            calls = [inner.async_infer("scale", [client.tensor("x", x)]) for x in xs]
            results = [call.get_result(timeout=WAIT_S) for call in calls]
            wrong = inner.async_infer("nothing", [client.tensor("x", X)])
            try:
                wrong.get_result(timeout=WAIT_S)
            except InferenceServerException as error:
                assert error.status() == "404"
    else:
        answers: queue.Queue[Any] = queue.Queue()
        for number, x in enumerate(xs):

            def answered(result: Any, error: Any, number: int = number) -> None:
                answers.put((number, error or result))

            client.inner.async_infer("scale", [client.tensor("x", x)], answered, client_timeout=WAIT_S)
        found = dict(answers.get(timeout=WAIT_S) for _ in xs)
        results = [found[number] for number in range(len(xs))]
    for x, result in zip(xs, results, strict=True):
        same(result.as_numpy("y"), 3 * x)


@check("infer: empty tensors, no rows, too many rows")
async def _(client: Client) -> None:
    for rows in (0, ROWS + 1):
        await client.infer_refused(WRONG, f"{rows} rows", "scale", {"x": np.zeros((rows, 2), np.float32)})


@check("ModelStreamInfer: bad ones among good ones, in order", is_grpc)
async def _(client: Client) -> None:
    requests = []
    for number in range(12):
        model, x = ("scale", X) if number % 4 else ("nothing", X)
        if number % 4 == 2:
            x = np.zeros((1, 3), np.float32)
        requests.append({"model_name": model, "inputs": [client.tensor("x", x * 1)], "request_id": str(number)})
    answers = [answer async for answer in streamed(client, requests)]
    assert len(answers) == 12
    for number, (result, error) in enumerate(answers):
        if number % 4 == 0:
            assert "nothing" in str(error), error
        elif number % 4 == 2:
            assert "shape" in str(error), error
        else:
            assert error is None, error
            assert result.get_response().id == str(number)
            same(result.as_numpy("y"), 3 * X)


@check("ModelStreamInfer: enable_empty_final_response", lambda client: is_grpc(client) and not client.is_aio)
async def _(client: Client) -> None:
    request = {"model_name": "scale", "inputs": [client.tensor("x", X)], "enable_empty_final_response": True}
    ((result, error),) = [answer async for answer in streamed(client, [request])]
    assert error is None, error
    assert result.get_response().parameters["triton_final_response"].bool_param is True


async def streamed(client: Client, requests: list[dict[str, Any]]) -> AsyncIterator[tuple[Any, Any]]:
    """(result, error) of each request of one stream."""
    if client.is_aio:

        async def written() -> AsyncIterator[dict[str, Any]]:
            for request in requests:
                yield request

        async for answer in client.inner.stream_infer(written(), stream_timeout=WAIT_S):
            yield answer
        return
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.inner.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=WAIT_S)
    try:
        for request in requests:
            client.inner.async_stream_infer(**request)
        for _ in requests:
            yield answers.get(timeout=WAIT_S)
    finally:
        client.inner.stop_stream()


# ---- what is wrong --------------------------------------------------------------------------------------------------


@check("errors: model, version, tensors")
async def _(client: Client) -> None:
    await client.infer_refused(UNKNOWN, "did you mean 'scale'", "scael", {"x": X})
    await client.infer_refused(UNKNOWN, "no version '9'", "scale", {"x": X}, model_version="9")
    await client.infer_refused(WRONG, "no input 'z'", "scale", {"x": X, "z": X})
    await client.infer_refused(WRONG, "'b'", "pair", {"a": X})
    await client.infer_refused(WRONG, "FP64", "scale", {"x": X.astype(np.float64)})
    await client.infer_refused(WRONG, "[1, 3]", "scale", {"x": np.zeros((1, 3), np.float32)})
    await client.infer_refused(WRONG, "no output 'z'", "scale", {"x": X}, outputs=[client.wish("z")])
    await client.infer_refused(WRONG, "rows", "pair", {"a": X, "b": np.array([[b""], [b""]], object)})
    await client.refused(WRONG, "UTF-8", "infer", "same-bytes", [client.tensor("x", np.full((1, 4), b"\xff", object))])
    await client.refused(WRONG, "twice", "infer", "scale", [client.tensor("x", X), client.tensor("x", X)])
    same((await client.infer("scale", {"x": X})).as_numpy("y"), 3 * X)


@check("errors: a request without inputs")
async def _(client: Client) -> None:
    await client.refused(WRONG, "'x'", "infer", "scale", [])


# ---- repository -----------------------------------------------------------------------------------------------------


@check("repository index")
async def _(client: Client) -> None:
    found = await client.told("get_model_repository_index", headers=client.admin)
    models = found if client.is_http else found["models"]
    states = {(model["name"], model.get("version")): model.get("state") for model in models}
    assert states["scale", "1"] == states["scale", "2"] == "READY"
    assert len(states) == len(DATA) + 4


@check("repository unload and load")
async def _(client: Client) -> None:
    await client("unload_model", "pair", headers=client.admin)
    assert await client("is_model_ready", "pair") is False
    a, b = np.zeros((1, 2), np.float32), np.array([[b"x"]], object)
    await client.infer_refused(NOT_LOADED, "millhand model load pair", "pair", {"a": a, "b": b})
    found = await client.told("get_model_repository_index", headers=client.admin)
    (entry,) = (model for model in (found if client.is_http else found["models"]) if model["name"] == "pair")
    assert entry["state"] == "UNAVAILABLE" and entry["reason"]
    await client("load_model", "pair", headers=client.admin)
    assert await client("is_model_ready", "pair") is True
    same((await client.infer("pair", {"a": a, "b": b})).as_numpy("b_out"), b)
    await client("unload_model", "pair", headers=client.admin, unload_dependents=True)
    await client("load_model", "pair", headers=client.admin)
    same((await client.infer("pair", {"a": a, "b": b})).as_numpy("b_out"), b)


@check("repository: without the token")
async def _(client: Client) -> None:
    for method in ("load_model", "unload_model"):
        await client.refused(NO_TOKEN, "token", method, "scale")
        await client.refused(BAD_TOKEN, "token", method, "scale", headers={"authorization": "Bearer wrong"})
    assert await client("is_model_ready", "scale") is True


@check("repository: what cannot be loaded")
async def _(client: Client) -> None:
    await client.refused(UNKNOWN, "'nothing'", "load_model", "nothing", headers=client.admin)
    await client.refused(UNKNOWN, "'nothing'", "unload_model", "nothing", headers=client.admin)
    options: dict[str, Any] = {"headers": client.admin, "config": '{"backend": "onnxruntime"}'}
    await client.refused(WRONG, "'config'", "load_model", "scale", **options)
    assert await client("is_model_ready", "scale") is True


# ---- what Triton has and millhand has not ---------------------------------------------------------------------------


@check("refused: shared memory")
async def _(client: Client) -> None:
    says = "the request"
    for kind, arguments in (("system", ("/key", 64)), ("cuda", (base64.b64encode(b"handle"), 0, 64))):
        await client.refused(NOT_SERVED, says, f"get_{kind}_shared_memory_status")
        await client.refused(NOT_SERVED, says, f"get_{kind}_shared_memory_status", "region")
        await client.refused(NOT_SERVED, says, f"register_{kind}_shared_memory", "region", *arguments)
        await client.refused(NOT_SERVED, says, f"unregister_{kind}_shared_memory", "region")
        await client.refused(NOT_SERVED, says, f"unregister_{kind}_shared_memory")
    tensor = client.module.InferInput("x", [1, 2], "FP32")
    tensor.set_shared_memory("region", 8)
    await client.refused(WRONG, "hared memory", "infer", "scale", [tensor])
    output = client.wish("y")
    output.set_shared_memory("region", 8)
    await client.refused(WRONG, "hared memory", "infer", "scale", [client.tensor("x", X)], outputs=[output])


@check("refused: trace settings")
async def _(client: Client) -> None:
    await client.refused(NOT_SERVED, "traceparent", "get_trace_settings")
    await client.refused(NOT_SERVED, "traceparent", "get_trace_settings", "scale")
    await client.refused(NOT_SERVED, "traceparent", "update_trace_settings", settings={"trace_rate": "1"})
    await client.refused(NOT_SERVED, "traceparent", "update_trace_settings", "scale", settings={"trace_rate": "1"})


@check("refused: log settings")
async def _(client: Client) -> None:
    await client.refused(NOT_SERVED, "[log]", "get_log_settings")
    await client.refused(NOT_SERVED, "[log]", "update_log_settings", {"log_verbose_level": 1})


@check("grpc.health.v1.Health", is_grpc)
async def _(client: Client) -> None:
    async with grpc.aio.insecure_channel(client.url) as channel:
        method = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await method(b"", timeout=WAIT_S) == b"\x08\x01"
        name = b"inference.GRPCInferenceService"
        assert await method(b"\n%c%b" % (len(name), name), timeout=WAIT_S) == b"\x08\x01"


# ---- the run --------------------------------------------------------------------------------------------------------


def post(url: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    with contextlib.closing(http.client.HTTPConnection(url, timeout=WAIT_S)) as connection:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer, answer.read()


async def passes(client: Client) -> dict[str, str]:
    """Check -> "ok", "-" where it does not apply, or what went wrong."""
    found = {}
    for name, (function, applies) in CHECKS.items():
        if not applies(client):
            found[name] = "-"
            continue
        try:
            await asyncio.wait_for(function(client), 2 * WAIT_S)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            line = next(frame.lineno for frame in where if frame.filename == __file__ and frame.name == "_")
            found[name] = f"line {line}: {type(error).__name__}: {error}"
        else:
            found[name] = "ok"
    await client("close")
    return found


def table(results: dict[str, dict[str, str]]) -> Iterator[str]:
    width = max(map(len, CHECKS))
    yield f"{'':{width}}  " + "  ".join(f"{name.removeprefix('tritonclient.'):8}" for name in results)
    for name in CHECKS:
        cells = (found[name] if found[name] in ("ok", "-") else "FAILED" for found in results.values())
        yield f"{name:{width}}  " + "  ".join(f"{cell:8}" for cell in cells)
    for client, found in results.items():
        yield from (f"{client}, {name}: {said}" for name, said in found.items() if said not in ("ok", "-"))


async def run(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    results = {}
    for module in (tritonclient.http, tritonclient.http.aio, tritonclient.grpc, tritonclient.grpc.aio):
        url = arguments.http if ".http" in module.__name__ else arguments.grpc
        results[module.__name__] = await passes(Client(module, url, arguments.token))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Triton's clients against a node.")
    for name in ("http", "grpc", "token"):
        parser.add_argument(f"--{name}", required=True)
    results = asyncio.run(run(parser.parse_args()))
    print(*table(results), sep="\n")
    said = [cell for found in results.values() for cell in found.values() if cell != "-"]
    failed = [cell for cell in said if cell != "ok"]
    versions = {name: version(name) for name in ("tritonclient", "grpcio", "geventhttpclient", "aiohttp")}
    print(json.dumps({"checks": len(said), "failed": len(failed), "versions": versions, "clients": results}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
