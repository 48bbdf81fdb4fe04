"""Other people's servers as upstreams: Triton and MLServer, from the venvs that benchmarks/serving.py --peers makes.

Runs where MILLHAND_PEERS names their folder (build/peers).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from millhand.errors import InputError, ModelError
from millhand.testing import wait_until
from millhand_plugins.remote.backend import RemoteSession

PEERS = os.environ.get("MILLHAND_PEERS", "")
SCRIPTS = Path(__file__).parents[4] / "benchmarks" / "peers"
SPECS = {"input": ("float32", (-1, 2))}, {"logits": ("float32", (-1, 2))}
X = {"input": np.arange(8, dtype=np.float32).reshape(4, 2)}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PEERS, reason="MILLHAND_PEERS names no folder of peers")]

Load = Callable[..., RemoteSession]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start(command: list[Any], port: int, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "peer.log").open("wb") as log:
        process = subprocess.Popen(command, env={**inherited, **environment}, cwd=folder, stdout=log, stderr=log)

    def ready() -> bool:
        assert process.poll() is None, (folder / "peer.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/cnn/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    wait_until(ready, "the peer", deadline_s=90, every_s=0.2)
    return process


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """logits = 2 input."""
    weight = numpy_helper.from_array(np.float32(2).reshape(1), "w")
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("input", "logits")]
    node = helper.make_node("Mul", ["input", "w"], ["logits"])
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:], [weight])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def triton(model: Path, tmp_path: Path) -> Iterator[str]:
    python, port = Path(PEERS) / "pytriton/bin/python", free_port()
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    command = [python, SCRIPTS / "pytriton_server.py", model, str(port), str(free_port())]
    process = start(command, port, tmp_path, {"LD_LIBRARY_PATH": libraries})
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


@pytest.fixture
def mlserver(model: Path, tmp_path: Path) -> Iterator[str]:
    ports = {"http_port": free_port(), "grpc_port": free_port(), "metrics_port": free_port()}
    home = tmp_path / "models"
    (home / "cnn").mkdir(parents=True)
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports}
    (home / "settings.json").write_text(json.dumps(settings))
    runtime = {"name": "cnn", "implementation": "mlserver_runtime.OnnxRuntime", "parameters": {"uri": str(model)}}
    (home / "cnn/model-settings.json").write_text(json.dumps(runtime))
    command = [Path(PEERS) / "mlserver/bin/python", "-m", "mlserver.cli.main", "start", home]
    process = start(command, ports["http_port"], tmp_path, {"PYTHONPATH": str(SCRIPTS)})
    yield f"http://127.0.0.1:{ports['http_port']}"
    process.terminate()
    process.wait(60)


def answers(session: RemoteSession) -> None:
    for _ in range(50):
        answer = session.run_until(X, time.monotonic_ns() + 2_000_000_000)["logits"]
        np.testing.assert_array_equal(answer, 2 * X["input"])
    assert session.counts["upstream"] == 50


def test_triton_answers_in_binary(triton: str, load: Load) -> None:
    session = load(triton, model="cnn", specs=SPECS, require_upstream=True)
    assert session._upstreams[0]._binary
    answers(session)
    odd = np.array([[np.nan, np.inf]], np.float32)
    np.testing.assert_array_equal(session.run({"input": odd})["logits"], odd)
    with pytest.raises(InputError, match=r"answered 400: .*batch-size must be <= 64"):
        session.run({"input": np.zeros((100, 2), np.float32)})
    with pytest.raises(ModelError, match="answered 404"):
        load(triton, model="absent", specs=SPECS, require_upstream=True)


def test_mlserver_answers_in_json(mlserver: str, load: Load) -> None:
    session = load(mlserver, model="cnn", specs=SPECS, require_upstream=True)
    assert not session._upstreams[0]._binary
    answers(session)
    with pytest.raises(ModelError, match="answered 404"):
        load(mlserver, model="absent", specs=SPECS, require_upstream=True)
