"""Open Inference Protocol v2 over real sockets: the HTTP process beside a pool and a control socket."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from onnx import TensorProto
from serving_kit import action, identity, scale, until, write_faulty, write_model


def body(data, shape=(1, 2), datatype="FP32", **extra):
    return {"inputs": [{"name": "x", "shape": list(shape), "datatype": datatype, "data": data}], **extra}


async def test_health_and_metadata(root, served):
    folder = write_model(root, "scale", extra='policy = "all"')
    scale(folder / "1/model.onnx", 2)
    scale(folder / "2/model.onnx", 3)
    _, client, _ = await served()
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    await until(lambda: _is(client, "/v2/health/ready", 200))
    server = (await client.get("/v2")).json()
    assert server["name"] == "millhand" and isinstance(server["extensions"], list)
    model = (await client.get("/v2/models/scale")).json()
    assert model == {
        "name": "scale",
        "versions": ["1", "2"],
        "platform": "onnxruntime",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert (await client.get("/v2/models/scale/versions/1")).status_code == 200
    assert (await client.get("/v2/models/scale/versions/1/ready")).status_code == 200
    assert (await client.get("/v2/models/scale/versions/9")).status_code == 404


async def _is(client, path, status):
    return (await client.get(path)).status_code == status


async def test_infer_with_version_id_and_outputs(root, served):
    folder = write_model(root, "scale", extra='policy = "all"')
    scale(folder / "1/model.onnx", 2)
    scale(folder / "2/model.onnx", 3)
    _, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    answer = await client.post("/v2/models/scale/infer", json=body([[1, 2.5]], id="42", outputs=[{"name": "y"}]))
    assert answer.status_code == 200
    assert answer.json() == {
        "model_name": "scale",
        "model_version": "2",
        "id": "42",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [3.0, 7.5]}],
    }
    answer = await client.post("/v2/models/scale/versions/1/infer", json=body([1, 2]))
    assert answer.json()["model_version"] == "1" and answer.json()["outputs"][0]["data"] == [2.0, 4.0]
    answer = await client.post("/v2/models/scale/infer", json=body([1, 2], outputs=[{"name": "z"}]))
    assert answer.status_code == 400 and "no output 'z'" in answer.json()["error"]


DATA = {
    "BOOL": [True, False], "UINT8": [0, 255], "UINT16": [0, 65535], "UINT32": [0, 2**32 - 1], "UINT64": [0, 2**64 - 1],
    "INT8": [-128, 127], "INT16": [-(2**15), 2**15 - 1], "INT32": [-(2**31), 2**31 - 1], "INT64": [-(2**63), 2**63 - 1],
    "FP16": [0.5, -2.0], "FP32": [0.1, -1e30], "FP64": [0.1, 1e300], "BYTES": ["Pumpe 7", "größer"],
}  # fmt: skip
KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip


async def test_every_datatype_travels(root, served):
    for datatype, kind in KINDS.items():
        name = datatype.lower()
        identity(write_model(root, name, datatype=datatype) / "1/model.onnx", kind=kind)
    _, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    for datatype, data in DATA.items():
        answer = await client.post(f"/v2/models/{datatype.lower()}/infer", json=body(data, datatype=datatype))
        assert answer.status_code == 200, answer.text
        output = answer.json()["outputs"][0]
        assert output["datatype"] == datatype
        assert output["data"] == (pytest.approx(data, rel=1e-6) if datatype == "FP32" else data)


BAD = [
    (b"{", 400, "no inference request"),
    (b"\xff\xfe", 400, "no inference request"),
    (b"[]", 400, "no inference request"),
    (b'{"inputs": []}', 400, "tensor 'x' of model 'same' is missing"),
    (b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[NaN,1]}]}', 400, "NaN"),
    (body([1, "2"]), 400, "tensor 'x': data is not FP32"),
    (body([1, None]), 400, "tensor 'x': data is not FP32"),
    (body([1e300, 1]), 400, "tensor 'x': 1e+300 at [0, 0] does not fit FP32, -3.4"),
    (body([1.5, 2], datatype="INT32"), 400, "tensor 'x': data is not INT32"),
    (body([256, 0], datatype="UINT8"), 400, "256 at [0, 0] does not fit UINT8, 0 to 255 (send values within"),
    (body([1, 2], outputs=[{"name": "yy"}]), 400, "has no output 'yy'; did you mean 'y'? (it gives y)"),
    (body([1, 2, 3]), 400, "tensor 'x' has 3 elements, its shape [1, 2] needs 2"),
    (body([1, 2], datatype="FLOAT"), 400, "datatype 'FLOAT' is not known"),
    (body([1, 2], datatype="FP64"), 400, "'x' of model 'same' is FP64, expected FP32"),
    (body([1, 2], shape=(2, 1)), 400, "has shape [2, 1], expected [-1, 2]"),
    (body([1, 2], shape=(-1, 2)), 400, "is negative"),
    (body([], shape=(0, 2)), 400, "has 0 rows"),
    (body([1, 2], parameters={"deadline_ms": -1}), 400, "'deadline_ms' = -1"),
    ({"inputs": [*body([1, 2])["inputs"], *body([1, 2])["inputs"]]}, 400, "is given twice"),
    ({"inputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}, 400, "no input 'y'"),
]


async def test_bad_requests_are_answered_with_tensor_and_remedy(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    for sent, status, message in BAD:
        content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        answer = await client.post("/v2/models/same/infer", content=content)
        assert answer.status_code == status, (sent, answer.text)
        assert message in answer.json()["error"], (sent, answer.text)
    assert (await client.post("/v2/models/same/infer", json=body([1, 2]))).status_code == 200


async def test_unknown_places_are_404_with_a_suggestion(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    answer = await client.post("/v2/models/sane/infer", json=body([1, 2]))
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("model 'sane' is not served; did you mean 'same'?")
    answer = await client.get("/v3")
    assert answer.status_code == 404 and "/v2" in answer.json()["error"]
    assert (await client.get("/v2/models/same/infer")).status_code == 405


async def test_a_huge_body_is_413_and_a_busy_server_goes_on(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served({"body_bytes_cap": 4096})
    await until(lambda: _is(client, "/v2/health/ready", 200))
    answer = await client.post("/v2/models/same/infer", content=b"[" * 5000)
    assert answer.status_code == 413 and "4096 bytes" in answer.json()["error"]

    async def chunks():
        for _ in range(100):
            yield b"[" * 1000

    answer = await client.post("/v2/models/same/infer", content=chunks())
    assert answer.status_code == 413
    assert (await client.post("/v2/models/same/infer", json=body([1, 2]))).status_code == 200


async def test_deadline_is_504_and_a_dead_worker_503(root, served):
    write_faulty(root, "faulty")
    pool, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    late = await client.post("/v2/models/faulty/infer", json=body([5, 0], parameters={"deadline_ms": 30}))
    assert late.status_code == 504 and "before the deadline" in late.json()["error"]
    died = await client.post("/v2/models/faulty/infer", json=body([1, 0]))
    assert died.status_code == 503 and "send the request again" in died.json()["error"]
    wrong = await client.post("/v2/models/faulty/infer", json=body([3, 0]))
    if wrong.status_code == 503:  # the worker is still being restarted
        await until(lambda: _is(client, "/v2/models/faulty/ready", 200))
        wrong = await client.post("/v2/models/faulty/infer", json=body([3, 0]))
    assert wrong.status_code == 500 and "the native library said no" in wrong.json()["error"]
    await pool.unload("faulty")
    await until(lambda: _is(client, "/v2/models/faulty/ready", 503))
    assert (await client.post("/v2/models/faulty/infer", json=body([0, 0]))).status_code == 503


async def test_a_reload_is_followed_without_a_failed_request(root, served):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    pool, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    seen, stop = set(), asyncio.Event()

    async def ask():
        while not stop.is_set():
            answer = await client.post("/v2/models/scale/infer", json=body([1, 1]))
            assert answer.status_code == 200, answer.text
            version = answer.json()["model_version"]
            assert answer.json()["outputs"][0]["data"][0] == 1 + int(version)
            seen.add(version)

    tasks = [asyncio.create_task(ask()) for _ in range(3)]
    await until(lambda: "1" in seen)
    scale(folder / "2/model.onnx", 3)
    await pool.load("scale")
    await until(lambda: "2" in seen)
    stop.set()
    await asyncio.gather(*tasks)


async def test_models_are_managed_with_the_token_alone(root, served, tmp_path):
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    token = tmp_path / "token"
    token.write_text("secret\n")
    _, client, _ = await served({"admin_token_file": token})
    load, admin = "/v2/repository/models/late/load", {"Authorization": "Bearer secret"}
    for path in (load, "/v2/repository/models/scale/unload", "/v2/repository/index"):
        answer = await client.post(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("Bearer secrets", "secret"):
            assert (await client.post(path, headers={"Authorization": wrong})).status_code == 403
    answer = await client.post(load, headers=admin)
    assert answer.status_code == 404 and "'late'" in answer.json()["error"]
    folder = write_model(root, "late")  # it comes while the node runs
    answer = await client.post(load, headers=admin)
    assert answer.status_code == 400 and "late" in answer.json()["error"]
    scale(folder / "1/model.onnx", 5)
    for _ in range(5):  # what was loaded answers at once, what was unloaded does not
        assert (await client.post(load, headers=admin)).status_code == 200
        answer = await client.post("/v2/models/late/infer", json=body([1, 2]))
        assert answer.json()["outputs"][0]["data"] == [5.0, 10.0]
        unload = await client.post("/v2/repository/models/late/unload", headers=admin)
        assert unload.status_code == 200
        assert (await client.post("/v2/models/late/infer", json=body([1, 2]))).status_code == 503
    index = (await client.post("/v2/repository/index", headers=admin, json={"ready": True})).json()
    assert [(entry["name"], entry["state"]) for entry in index] == [("scale", "READY")]


async def test_loads_and_unloads_are_told_in_the_log(root, served, tmp_path, caplog):
    """Who asked, what serves, and after a failure what serves on; the client is told that too."""
    caplog.set_level("INFO", logger="millhand.serving")
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    token = tmp_path / "token"
    token.write_text("secret")
    _, client, _ = await served({"admin_token_file": token})

    def ask(action):
        headers = {"Authorization": "Bearer secret"}
        return client.post(f"/v2/repository/models/scale/{action}", headers=headers)

    (folder / "2").mkdir()
    (folder / "2/model.onnx").write_text("no model")
    failed = await ask("load")
    assert failed.status_code == 400 and "; version 1 serves on (" in failed.json()["error"]
    await ask("unload")
    (folder / "2/model.onnx").unlink()
    await ask("load")
    assert [record.getMessage() for record in caplog.records if "scale" in record.getMessage()] == [
        "model 'scale' serves version 1",
        f"model 'scale' is not loaded, asked for by HTTP: {failed.json()['error']}",
        "model 'scale' is unloaded, an unload was asked for by HTTP",
        "model 'scale': 2/ has no 'model.onnx'; it is empty",
        "model 'scale' serves version 1, asked for by HTTP",
    ]
    (entry,) = (await client.post("/v2/repository/index", headers={"Authorization": "Bearer secret"})).json()
    assert entry == {"name": "scale", "version": "1", "state": "READY", "reason": ""}


async def test_classes_have_the_names_of_model_toml(root, served):
    folder = write_model(root, "fault", columns=3)
    identity(folder / "1/model.onnx", 3)
    with (folder / "model.toml").open("a") as file:
        file.write('[prediction]\ntask = "classification"\noutput = "y"\nlabels = ["healthy", "leak", "wear"]\n')
    _, client, _ = await served()
    await until(lambda: _is(client, "/v2/health/ready", 200))
    wish = {"name": "y", "parameters": {"classification": 2}}
    answer = await client.post("/v2/models/fault/infer", json=body([1, 3, 2], (1, 3), outputs=[wish]))
    assert answer.json()["outputs"][0] == {
        "name": "y", "datatype": "BYTES", "shape": [1, 2], "data": ["3.000000:1:leak", "2.000000:2:wear"]}  # fmt: skip


async def test_metrics_of_daemon_and_http_process(root, served):
    identity(write_model(root, "same") / "1/model.onnx")
    _, client, _ = await served(heartbeat_ms=20)
    await until(lambda: _is(client, "/v2/health/ready", 200))
    for _ in range(3):
        await client.post("/v2/models/same/infer", json=body([1, 2]))

    async def counted():
        text = (await client.get("/metrics")).text
        return text if 'nv_inference_request_success{model="same",version="1"} 3' in text else ""

    text = await until(counted)
    assert 'http_requests_total{method="POST",path="/v2/models/{model}/infer",status="200"} 3' in text
    assert 'millhand_model_ready{model="same",version="1"} 1' in text
    assert 'millhand_inference_batch_rows_count{model="same",version="1"} 3' in text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


async def test_predict_call_of_the_control_socket(root, make_pool):
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    pool = await make_pool()
    answer = await pool.control_handlers()["model.infer"](model="scale", request=body([[1, 2]]))
    assert answer["outputs"][0]["data"] == [2.0, 4.0]
    np.testing.assert_array_equal((await pool.infer("scale", action(3)))[0]["y"], [[6, 6]])
