"""Triton's inference service over real sockets: a gRPC process beside a pool and a control socket, asked by grpcio."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import numpy as np
import psutil
import pytest
from grpc_kit import SERVICE, Client, infer_request, info_of, outputs
from onnx import TensorProto
from serving_kit import identity, scale, until, write_faulty, write_model

from millhand.control import ControlServer
from millhand.serving.front import grpc_front
from millhand.serving.grpc import wire
from millhand.serving.settings import GrpcSettings
from millhand.serving.tensors import DATATYPES

HEALTH = "grpc.health.v1.Health"
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
X = np.array([[1, 2]], dtype=np.float32)


@pytest.fixture
async def served(root, make_pool, tmp_path):
    """(pool, client, front): a gRPC process in front of whatever `root` holds when the test calls it."""
    parts = []

    async def start(settings=None, **options):
        pool = await make_pool(**options)
        control = ControlServer(tmp_path / "c.sock", pool.control_handlers())
        await control.start()
        front = grpc_front(GrpcSettings(port=0, processes=1, **(settings or {})), tmp_path / "c.sock")
        await front.start()
        client = Client(f"127.0.0.1:{front.port}")
        parts.extend([client.close, front.stop, control.stop])
        await until(lambda: _ready(client))
        return pool, client, front

    yield start
    for part in parts:
        await part()


async def _ready(client):
    return (await client.call("ServerReady", wait_for_ready=True, timeout=20)).ready


async def refused(call):
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_the_access_log_is_a_line_a_call(root, served, capfd):
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    _, client, _ = await served({"access_log": True})
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    request = infer_request("scale", {"x": X})
    answer = await client.call("ModelInfer", request, metadata=[("traceparent", f"00-{trace}-00f067aa0ba902b7-00")])
    await refused(client.infer("scal", {"x": X}))
    await refused(client.call("Nothing\n", service="odd"))
    streamed = [part.ByteSize() async for part in client.stream(iter([request, request]))]
    text = ""

    def lines():
        nonlocal text
        text += capfd.readouterr().err
        found = [line for line in text.splitlines() if "millhand.access" in line and "ServerReady" not in line]
        return found if len(found) == 4 else []

    infer, unknown, odd, stream = await until(lines)
    start = f'millhand.access: method=gRPC path="/{SERVICE}/ModelInfer"'
    assert f"{start} model=scale status=OK bytes={answer.ByteSize()} ms=" in infer
    assert infer.endswith(f" trace_id={trace}")
    assert f"{start} model=scal status=NOT_FOUND bytes=0 ms=" in unknown
    assert r' path="/odd/Nothing\n" model= status=UNIMPLEMENTED' in odd
    assert f'ModelStreamInfer" model=scale status=OK bytes={sum(streamed)} ms=' in stream


# ---- server and models ----------------------------------------------------------------------------------------------


async def test_health_and_metadata(root, served):
    folder = write_model(root, "scale", extra='policy = "all"\nmax_batch = 8\nmax_delay_us = 500')
    scale(folder / "1/model.onnx", 2)
    scale(folder / "2/model.onnx", 3)
    _, client, _ = await served()
    assert (await client.call("ServerLive")).live
    server = await client.call("ServerMetadata")
    assert server.name == "millhand" and "statistics" in server.extensions
    for name, version, ready in (
        ("scale", "", True),
        ("scale", "2", True),
        ("scale", "9", False),
        ("other", "", False),
    ):
        request = wire.ModelRequest(name=name, version=version)
        assert (await client.call("ModelReady", request)).ready is ready
    model = await client.call("ModelMetadata", wire.ModelRequest(name="scale"))
    assert (model.name, list(model.versions), model.platform) == ("scale", ["1", "2"], "onnxruntime")
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("x", "FP32", [-1, 2])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [("y", "FP32", [-1, 2])]
    config = (await client.call("ModelConfig", wire.ModelRequest(name="scale"))).config
    assert (config.name, config.max_batch_size) == ("scale", 8)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("x", wire.DATA_TYPE["FP32"], [2])]
    error = await refused(client.call("ModelMetadata", wire.ModelRequest(name="scael")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "did you mean 'scale'?" in error.details()


async def test_the_standard_health_service(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    for name in ("", "inference.GRPCInferenceService"):
        answer = await client.call("Check", wire.HealthCheckRequest(service=name), HEALTH)
        assert wire.HealthCheckResponse.FromString(answer).status == 1
    error = await refused(client.call("Check", wire.HealthCheckRequest(service="x"), HEALTH))
    assert error.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "name", ["SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings"]
)
async def test_what_is_not_served_says_so_with_a_remedy(served, name):
    _, client, _ = await served()
    error = await refused(client.call(name))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert name in error.details() and info_of(error).metadata["hint"]


async def test_an_unknown_method_is_unimplemented(served):
    _, client, _ = await served()
    error = await refused(client.call("ModelInfr"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "did you mean '/inference.GRPCInferenceService/ModelInfer'?" in error.details()


# ---- inference ------------------------------------------------------------------------------------------------------


async def test_infer_with_version_id_and_outputs(root, served):
    folder = write_model(root, "scale", extra='policy = "all"')
    scale(folder / "1/model.onnx", 2)
    scale(folder / "2/model.onnx", 3)
    _, client, _ = await served()
    request = infer_request("scale", {"x": X}, model_version="1", id="abc")
    request.outputs.add(name="y")
    response = await client.call("ModelInfer", request)
    assert (response.model_name, response.model_version, response.id) == ("scale", "1", "abc")
    np.testing.assert_array_equal(outputs(response)["y"], 2 * X)
    assert not response.parameters
    np.testing.assert_array_equal((await client.infer("scale", {"x": X}))["y"], 3 * X)


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
async def test_every_datatype_raw_and_typed(root, served, datatype):
    identity(write_model(root, "same", datatype=datatype) / "1/model.onnx", kind=ONNX_TYPES[datatype])
    _, client, _ = await served()
    data = np.array([[0, 1], [1, 0]]).astype(DATATYPES[datatype])
    if datatype.startswith(("INT", "UINT")):
        limits = np.iinfo(data.dtype)
        data[1] = limits.min, limits.max
    answer = (await client.infer("same", {"x": data}))["y"]
    np.testing.assert_array_equal(answer, data)
    assert answer.dtype == data.dtype
    request = wire.ModelInferRequest(model_name="same")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=data.shape)
    field = {"BOOL": "bool", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32", "FP64": "fp64"}.get(
        datatype, datatype.rstrip("0123456789").lower()
    )
    if datatype == "FP16":
        error = await refused(client.call("ModelInfer", request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "raw_input_contents" in error.details()
        return
    getattr(tensor.contents, f"{field}_contents").extend(data.ravel().tolist())
    np.testing.assert_array_equal(outputs(await client.call("ModelInfer", request))["y"], data)


async def test_bytes_raw_and_typed(root, served):
    identity(write_model(root, "same", datatype="BYTES") / "1/model.onnx", kind=TensorProto.STRING)
    _, client, _ = await served()
    data = np.array([["pump", "é"]], dtype=object)
    data.ravel()[:] = [b"pump", "é".encode()]
    expected = b"\4\0\0\0pump\2\0\0\0" + "é".encode()
    assert (await client.infer("same", {"x": data}))["y"] == expected
    request = wire.ModelInferRequest(model_name="same")
    request.inputs.add(name="x", datatype="BYTES", shape=[1, 2]).contents.bytes_contents.extend(data.ravel())
    assert outputs(await client.call("ModelInfer", request))["y"] == expected


async def test_classification(root, served):
    labels = '[prediction]\ntask = "classification"\noutput = "y"\nlabels = ["fine", "worn"]'
    identity(write_model(root, "same", extra=labels) / "1/model.onnx")
    _, client, _ = await served()
    request = infer_request("same", {"x": np.array([[0.25, 0.75], [4, 2]], np.float32)})
    request.outputs.add(name="y").parameters["classification"].int64_param = 1
    response = await client.call("ModelInfer", request)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 1])
    assert outputs(response)["y"] == b"\x0f\0\0\x000.750000:1:worn\x0f\0\0\x004.000000:0:fine"


def _raw(**fields):
    request = wire.ModelInferRequest(model_name="same")
    request.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [1, 2], **fields})
    request.raw_input_contents.append(X.tobytes())
    return request


def _typed(datatype, field, values, shape=(1, 2)):
    request = wire.ModelInferRequest(model_name="same")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=shape)
    getattr(tensor.contents, field).extend(values)
    return request


def _with(request, change):
    change(request)
    return request


BAD = [
    (b"\xff\xff", "no inference.ModelInferRequest"),
    (_raw(datatype="BF16"), "'BF16' is not served"),
    (_raw(datatype="FP23"), "did you mean 'FP32'?"),
    (_raw(datatype="FP64"), "tensor 'x' has 8 bytes, its shape [1, 2] of FP64 needs 16"),
    (_raw(datatype="INT32"), "is INT32, expected FP32"),
    (_raw(shape=[1, 3]), "tensor 'x' has 8 bytes, its shape [1, 3] of FP32 needs 12"),
    (_raw(shape=[-1, 2]), "negative"),
    (_raw(shape=[2**62, 2**62]), "needs"),
    (_raw(shape=[2, 1]), "has shape [2, 1], expected [-1, 2]"),
    (_raw(shape=[]), "tensor 'x' has 8 bytes"),
    (_raw(name="z"), "no input 'z'"),
    (_raw(datatype="BYTES"), "tensor 'x': its 8 bytes are not the 2 strings"),
    (wire.ModelInferRequest(model_name="same"), "input"),
    (_with(_raw(), lambda r: r.raw_input_contents.append(b"")), "holds 2 tensors, inputs names 1"),
    (_with(_raw(), lambda r: r.inputs[0].contents.fp32_contents.append(1)), "contents beside raw_input_contents"),
    (_with(_raw(), lambda r: (r.inputs.add().CopyFrom(r.inputs[0]), r.raw_input_contents.append(b""))), "given twice"),
    (_with(_raw(), lambda r: r.outputs.add(name="z")), "no output 'z' (it gives y)"),
    (_with(_raw(), lambda r: r.outputs.add(name="yy")), "no output 'yy'; did you mean 'y'?"),
    (_typed("FP32", "fp32_contents", [1]), "tensor 'x' has 1 elements, its shape [1, 2] needs 2"),
    (_typed("FP32", "fp64_contents", [1, 2]), "has fp64_contents, expected fp32_contents"),
    (_typed("INT8", "int_contents", [1, 300]), "tensor 'x': 300 at [0, 1] does not fit INT8, -128 to 127"),
    (_typed("UINT8", "uint_contents", [256, 0]), "tensor 'x': 256 at [0, 0] does not fit UINT8, 0 to 255"),
    (_typed("BYTES", "bytes_contents", [b"a"]), "tensor 'x' has 1 elements"),
    (_with(_raw(), lambda r: r.parameters["deadline_ms"].CopyFrom(wire.InferParameter(int64_param=-1))), "deadline_ms"),
    (_with(_raw(), lambda r: r.parameters["priority"].CopyFrom(wire.InferParameter(string_param="1"))), "priority"),
    (
        _with(_raw(), lambda r: r.inputs[0].parameters["shared_memory_region"].CopyFrom(wire.InferParameter())),
        "shared memory regions are not served",
    ),
]


async def test_bad_requests_are_invalid_arguments(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    for request, text in BAD:
        error = await refused(client.call("ModelInfer", request))
        assert (error.code(), text in error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True), error.details()
        info = info_of(error)
        assert (info.reason, info.domain, info.metadata["retriable"]) == ("INPUT", "millhand", "false")
    np.testing.assert_array_equal((await client.infer("same", {"x": X}))["y"], X)


@pytest.mark.slow
async def test_10_000_random_mutations_of_a_request_never_hurt(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, front = await served()
    generator = np.random.default_rng(5)
    valid = infer_request("same", {"x": X}, id="7")
    valid.parameters["priority"].int64_param = 1
    valid.outputs.add(name="y")
    message = valid.SerializeToString()
    codes = set()

    async def send():
        data = bytearray(message)
        for _ in range(generator.integers(1, 6)):
            data[generator.integers(len(data))] = generator.integers(256)
        data = bytes(data[: generator.integers(len(data) + 1)]) if generator.random() < 0.2 else bytes(data)
        try:
            await client.call("ModelInfer", data, timeout=60)
            codes.add(grpc.StatusCode.OK)
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())

    (pid,) = front.pids
    for number in range(200):
        await asyncio.gather(*(send() for _ in range(50)))
        if number == 50:
            settled = psutil.Process(pid).memory_info().rss
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert psutil.Process(pid).memory_info().rss < 1.02 * settled
    np.testing.assert_array_equal((await client.infer("same", {"x": X}))["y"], X)
    assert front.pids == [pid]


async def test_compressed_requests(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served({"message_bytes_cap": 100_000})
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        answer = await client.infer("same", {"x": X}, compression=compression)
        np.testing.assert_array_equal(answer["y"], X)
    bomb = infer_request("same", {"x": np.zeros((100_000, 2), np.float32)})
    error = await refused(client.call("ModelInfer", bomb, compression=grpc.Compression.Gzip))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_large_messages_travel_and_larger_ones_are_refused(root, served):
    folder = write_model(root, "same", extra="max_batch = 4", columns=1_000_000)
    identity(folder / "1/model.onnx", columns=1_000_000)
    _, client, front = await served({"message_bytes_cap": 8 << 20})
    rows = np.random.default_rng(3).random((2, 1_000_000), np.float32)
    large = Client(f"127.0.0.1:{front.port}", **{"grpc.max_receive_message_length": -1})
    answers = await asyncio.gather(*(large.infer("same", {"x": rows + number}) for number in range(3)))
    for number, answer in enumerate(answers):
        np.testing.assert_array_equal(answer["y"], rows + number)
    error = await refused(large.infer("same", {"x": np.concatenate([rows, rows])}))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "[grpc] message_bytes_cap" in error.details()
    assert (await client.call("ServerLive")).live
    await large.close()


async def test_many_calls_on_one_connection_get_their_own_answers(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served({"streams_cap": 16})
    rows = [np.array([[number, -number]], np.float32) for number in range(300)]
    for row, answer in zip(
        rows, await asyncio.gather(*(client.infer("same", {"x": row}) for row in rows)), strict=True
    ):
        np.testing.assert_array_equal(answer["y"], row)


# ---- deadlines, cancellation, faults --------------------------------------------------------------------------------


def _action(number):
    return {"x": np.full((1, 2), number, np.float32)}


async def test_the_deadline_of_the_call_and_of_the_parameters(root, served):
    write_faulty(root, "slow")  # 5: takes 200 ms
    _, client, _ = await served()
    error = await refused(client.infer("slow", _action(5), timeout=0.05))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for key, value in (("timeout", 50_000), ("deadline_ms", 50)):
        request = infer_request("slow", _action(5))
        request.parameters[key].int64_param = value
        error = await refused(client.call("ModelInfer", request, timeout=20))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert info_of(error).reason == "DEADLINE"
    request.parameters["deadline_ms"].double_param = 5000.5
    np.testing.assert_array_equal(outputs(await client.call("ModelInfer", request))["y"], _action(5)["x"])


async def _count(pool, key, count=1):
    """Whether so many requests are what `key` says."""
    return sum(model[key] for model in (await pool.stats())["models"]) == count


async def test_cancelled_calls_are_cancelled_in_the_worker(root, served):
    write_faulty(root, "slow", extra="max_batch = 1")
    pool, client, _ = await served(deadline_ms=60_000)
    hangs = client.call("ModelInfer", infer_request("slow", _action(2)))  # until the worker is killed
    await until(lambda: _count(pool, "running"))
    calls = [client.call("ModelInfer", infer_request("slow", _action(0))) for _ in range(3)]
    await until(lambda: _count(pool, "waiting", 3))
    for call in calls:
        call.cancel()
    await until(lambda: _count(pool, "cancelled", 3))
    assert await _count(pool, "waiting", 0)
    hangs.cancel()
    await asyncio.gather(hangs, *calls, return_exceptions=True)


async def test_overload_and_a_dying_worker_are_unavailable_and_retriable(root, served):
    write_faulty(root, "slow", extra="max_batch = 1")
    _, client, _ = await served(queue=1)
    calls = [client.call("ModelInfer", infer_request("slow", _action(5))) for _ in range(6)]
    errors = [
        answer for answer in await asyncio.gather(*calls, return_exceptions=True) if isinstance(answer, Exception)
    ]
    assert errors and {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}
    assert info_of(errors[0]).reason == "OVERLOAD" and info_of(errors[0]).metadata["retriable"] == "true"
    error = await refused(client.infer("slow", _action(1)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert info_of(error).metadata["retriable"] == "true"

    async def back():
        try:
            return (await client.infer("slow", _action(0)))["y"] is not None
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False

    await until(back)


async def test_a_model_that_raises_is_an_internal_error(root, served):
    write_faulty(root, "slow")
    _, client, _ = await served()
    error = await refused(client.infer("slow", _action(3)))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "the native library said no" in error.details()
    assert info_of(error).reason == "MODEL"


# ---- streams --------------------------------------------------------------------------------------------------------


async def test_a_stream_answers_in_order_and_outlives_errors(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()

    async def requests():
        for number in range(100):
            if number == 40:
                yield b"\xff"
            elif number == 41:
                yield infer_request("other", {"x": X}, id="41")
            else:
                yield infer_request("same", {"x": X * number}, id=str(number))

    answers = [answer async for answer in client.stream(requests())]
    assert len(answers) == 100
    for number, answer in enumerate(answers):
        if number in (40, 41):
            assert answer.error_message and answer.infer_response.id == ("" if number == 40 else "41")
        else:
            assert (answer.error_message, answer.infer_response.id) == ("", str(number))
            np.testing.assert_array_equal(outputs(answer.infer_response)["y"], X * number)


async def test_a_stream_answers_while_it_goes_on(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    call = client.stream()
    for number in range(3):
        request = infer_request("same", {"x": X * number})
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        await call.write(request)
        answer = await call.read()
        np.testing.assert_array_equal(outputs(answer.infer_response)["y"], X * number)
        assert answer.infer_response.parameters["triton_final_response"].bool_param
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_a_cancelled_stream_cancels_its_requests(root, served):
    write_faulty(root, "slow", extra="max_batch = 1")
    pool, client, _ = await served(deadline_ms=60_000)
    call = client.stream()
    await call.write(infer_request("slow", _action(2)))  # hangs until the worker is killed
    await until(lambda: _count(pool, "running"))
    for _ in range(3):
        await call.write(infer_request("slow", _action(0)))
    await until(lambda: _count(pool, "waiting", 3))
    call.cancel()

    await until(lambda: _count(pool, "cancelled", 3))


async def test_the_deadline_of_a_stream_ends_it(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    call = client.stream(timeout=0.3)
    await call.write(infer_request("same", {"x": X}))
    assert outputs((await call.read()).infer_response)["y"] is not None
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# ---- statistics and repository --------------------------------------------------------------------------------------


async def test_statistics(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    for _ in range(3):
        await client.infer("same", {"x": np.concatenate([X, X])})
    (stats,) = (await client.call("ModelStatistics", wire.ModelRequest(name="same"))).model_stats
    assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("same", "1", 6, 3)
    assert stats.inference_stats.success.count == 3 and stats.inference_stats.compute_infer.ns > 0
    assert [(batch.batch_size, batch.compute_infer.count) for batch in stats.batch_stats] == [(2, 3)]
    assert len((await client.call("ModelStatistics")).model_stats) == 1
    error = await refused(client.call("ModelStatistics", wire.ModelRequest(name="other")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


ADMIN = ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"]


async def test_the_repository_is_closed_without_a_token_file(root, served):
    _, client, _ = await served()
    for name in ADMIN:
        error = await refused(client.call(name, metadata=[("authorization", "Bearer x")]))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "[grpc] admin_token_file" in error.details()


async def test_the_repository_with_a_token(root, served, tmp_path, caplog):
    caplog.set_level("INFO", logger="millhand.serving")
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    scale(folder / "2/model.onnx", 3)
    token = tmp_path / "token"
    token.write_text("seven words\n")
    _, client, _ = await served({"admin_token_file": token})
    for name in ADMIN:
        assert (await refused(client.call(name))).code() is grpc.StatusCode.UNAUTHENTICATED
        error = await refused(client.call(name, metadata=[("authorization", "Bearer eight words")]))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    known = {"metadata": [("authorization", "Bearer seven words")]}

    async def index(ready=False):
        answer = await client.call("RepositoryIndex", wire.RepositoryIndexRequest(ready=ready), **known)
        return [(model.name, model.version, model.state, model.reason) for model in answer.models]

    assert await index() == [
        ("scale", "1", "UNAVAILABLE", "policy latest: 2 is newer"),
        ("scale", "2", "READY", ""),
    ]
    await client.call("RepositoryModelUnload", wire.RepositoryModelRequest(model_name="scale"), **known)
    assert await index(ready=True) == []
    error = await refused(client.infer("scale", {"x": X}))
    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)
    request = wire.RepositoryModelRequest(model_name="scale")
    request.parameters["version"].int64_param = 1
    await client.call("RepositoryModelLoad", request, **known)
    np.testing.assert_array_equal((await client.infer("scale", {"x": X}))["y"], 2 * X)
    request.parameters["version"].int64_param = 9
    error = await refused(client.call("RepositoryModelLoad", request, **known))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "has no version 9; version 1 serves on" in error.details()
    told = [record.getMessage() for record in caplog.records if "asked for by gRPC" in record.getMessage()]
    assert told == [
        "model 'scale' is unloaded, an unload was asked for by gRPC",
        "model 'scale' serves version 1, asked for by gRPC",
        f"model 'scale' is not loaded, asked for by gRPC: {error.details()}",
    ]
    error = await refused(client.call("RepositoryModelLoad", wire.RepositoryModelRequest(model_name="scal"), **known))
    assert error.code() is grpc.StatusCode.NOT_FOUND and "did you mean 'scale'?" in error.details()
    request.parameters["config"].string_param = "{}"
    error = await refused(client.call("RepositoryModelLoad", request, **known))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    token.write_text("eight words")
    assert (await refused(client.call("RepositoryIndex", **known))).code() is grpc.StatusCode.PERMISSION_DENIED


# ---- the process ----------------------------------------------------------------------------------------------------


async def test_a_stop_lets_calls_finish_and_says_unavailable_then(root, served):
    write_faulty(root, "slow")
    _, client, front = await served()
    call = asyncio.create_task(client.infer("slow", _action(5)))
    stream = client.stream()
    await stream.write(infer_request("slow", _action(5)))
    (pid,) = front.pids
    await until(lambda: _handled(client))
    os.kill(pid, signal.SIGTERM)
    np.testing.assert_array_equal((await call)["y"], _action(5)["x"])
    np.testing.assert_array_equal(outputs((await stream.read()).infer_response)["y"], _action(5)["x"])
    assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    assert "the server stops" in await stream.details()
    await until(lambda: _restarted(front, client))


async def _handled(client):
    """A call that comes after others on its connection says that they arrived."""
    return (await client.call("ServerLive")).live


async def _restarted(front, client):
    return front.restarts == 1 and await _ready(client)


async def test_several_processes_share_the_port(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, front = await served({})
    assert len(front.pids) == 1
    clients = [Client(f"127.0.0.1:{front.port}") for _ in range(8)]
    for answer in await asyncio.gather(*(each.infer("same", {"x": X}) for each in [*clients, client])):
        np.testing.assert_array_equal(answer["y"], X)
    for each in clients:
        await each.close()
