"""The worker protocol against a real worker: versions, garbage, deaths, leaks, and what a client may not do."""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_kit import Worker, action, identity, scale

from millhand.errors import DeadlineError, InputError, MillhandError, ModelError, OverloadError
from millhand.serving import client as client_module
from millhand.serving import protocol
from millhand.serving.blocking_client import BlockingWorkerClient
from millhand.serving.client import WorkerClient, deadline_ns
from millhand.serving.ring import Ring
from millhand.testing import wait_until

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    (folder / "model.json").write_text("{}")
    running = Worker(folder)
    running.load("faulty", "faulty", folder / "model.json", queue=1000)
    yield running
    assert running.process.poll() is None, "the worker died"
    running.stop()


def raw(worker) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(os.fspath(worker.path))
    return connection


def greet(connection, hello=None, fds=()):
    """Send a hello and return the frames of the answer."""
    parts = protocol.frame(protocol.HELLO, 0, hello or protocol.Hello(protocol.VERSION))
    socket.send_fds(connection, [b"".join(bytes(part) for part in parts)], list(fds))
    return protocol.FrameReader().read(connection)


def still_works(worker):
    client = BlockingWorkerClient.connect(worker.path)
    answer = client.infer("faulty", action(0))
    client.close()
    return answer.version == 1


def test_another_version_is_a_clear_error(worker):
    with raw(worker) as connection:
        (frame,) = greet(connection, protocol.Hello(99))
        fault = protocol.decode_fault(frame.body)
        assert fault.message == "the client speaks worker protocol 99, this worker speaks 2"
        assert connection.recv(1) == b""


def test_a_first_frame_that_is_no_hello_is_refused(worker):
    with raw(worker) as connection:
        connection.sendall(protocol.frame(protocol.CALL, 1, protocol.Call("ping", {}))[0])
        (frame,) = protocol.FrameReader().read(connection)
        assert "no hello" in protocol.decode_fault(frame.body).message


def test_a_ring_that_could_shrink_is_refused(worker):
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    with raw(worker) as connection:
        (frame,) = greet(connection, protocol.Hello(protocol.VERSION, 2, 4096), [fd])
        assert "no sealed memfd" in protocol.decode_fault(frame.body).message
    with raw(worker) as connection, Path("/dev/null").open() as null:
        (frame,) = greet(connection, protocol.Hello(protocol.VERSION, 2, 4096), [null.fileno()])
        assert "no sealed memfd" in protocol.decode_fault(frame.body).message
    os.close(fd)
    assert still_works(worker)


def test_a_client_may_not_load_unload_or_shut_down(worker):
    client = BlockingWorkerClient.connect(worker.path)
    for call in ("load", "unload", "shutdown", "nonsense"):
        with pytest.raises(InputError, match="may not make that call"):
            client.call(call)
    assert client.call("metadata", model="faulty")["max_batch"] == 8
    client.close()


@pytest.mark.parametrize("size", [1, 2, 300, 100_000, 2_000_000])
def test_tensors_come_back_as_they_went(worker, tmp_path, size):
    """1 and 2 rows travel inline, 300 in the ring, 2,000,000 rows exceed the slot and go inline again."""
    artifact = tmp_path / "identity.onnx"
    identity(artifact)
    worker.load(f"same{size}", "onnxruntime", artifact, max_batch=size)
    client = BlockingWorkerClient.connect(worker.path)
    x = np.random.default_rng(7).random((size, 2), dtype=np.float32)
    np.testing.assert_array_equal(client.infer(f"same{size}", {"x": x}).outputs["y"], x)
    assert client._exchange.ring.leased == 0
    client.close()
    worker.control.call("unload", model=f"same{size}", version=1)
    with pytest.raises(ModelError, match="is not loaded"):
        worker.control.infer(f"same{size}", {"x": x[:1]})


def test_what_is_kept_of_a_request_does_not_outlive_a_reload_or_other_values(worker, tmp_path):
    """The same request in the same slot: other values, a model in place of another, a version that is gone."""
    artifact = tmp_path / "identity.onnx"
    identity(artifact)
    worker.load("kept", "onnxruntime", artifact, max_batch=4000)
    client = BlockingWorkerClient.connect(worker.path)
    for value in (1, 2, 3):
        x = np.full((1000, 2), value, dtype=np.float32)
        np.testing.assert_array_equal(client.infer("kept", {"x": x}, version=1).outputs["y"], x)
    scale(artifact, 10)
    worker.load("kept", "onnxruntime", artifact, max_batch=4000)
    np.testing.assert_array_equal(client.infer("kept", {"x": x}, version=1).outputs["y"], 10 * x)
    worker.load("kept", "onnxruntime", artifact, max_batch=10)
    with pytest.raises(InputError, match="1000 rows, allowed are 1 to 10"):
        client.infer("kept", {"x": x}, version=1)
    worker.control.call("unload", model="kept", version=1)
    with pytest.raises(ModelError, match="not loaded"):
        client.infer("kept", {"x": x}, version=1)
    client.close()


def test_foreign_byte_order_and_strides_travel_right(tmp_path, worker):
    artifact = tmp_path / "identity.onnx"
    identity(artifact)
    worker.load("order", "onnxruntime", artifact, max_batch=4000)
    x = np.random.default_rng(7).random((2, 3000), dtype=np.float32)
    for sent in (x.T, x.T.astype(">f4"), x.T[::2]):
        np.testing.assert_array_equal(worker.control.infer("order", {"x": sent}).outputs["y"], sent)


def infer_frame(request, payload=b"", **changes):
    """The bytes of an INFER with anything in it, also what no client sends."""
    tensor = [changes.pop("name", "x"), changes.pop("dtype", "float32"), changes.pop("shape", (1, 2))]
    tensor += [changes.pop("offset", 0), changes.pop("size", 8)]
    slot = changes.pop("slot", -1)
    rest = {"model": "faulty", "version": 1, "priority": 0, "inline": True, **changes}
    body = protocol.INFER_HEAD.pack(0, slot) + protocol.encode([*rest.values(), [tensor], []])
    return protocol.HEAD.pack(protocol.MAGIC, protocol.INFER, len(body), len(payload), request) + body + payload


def ask(connection, payload=bytes(8), **changes):
    connection.sendall(infer_frame(1, payload, **changes))
    (frame,) = protocol.FrameReader().read(connection)
    return frame


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "lies at 1 with 8 bytes, outside its 8 bytes"),
        ({"offset": -4}, "outside its 8 bytes"),
        ({"offset": 2**62, "size": 2**62}, "outside its 8 bytes"),
        ({"shape": (2, 2)}, "needs 16"),
        ({"shape": (2**40, 2**40)}, "needs"),
        ({"shape": (-1, -2)}, "negative shape"),
        ({"dtype": "float31"}, "has dtype 'float31'; did you mean 'float32'?"),
        ({"dtype": "object", "shape": (1, 3)}, "holds 2 strings"),
        ({"slot": 3, "inline": False}, "the connection has no ring"),
        ({"model": "x" * 5000}, "is not loaded"),
        ({"version": 7}, "has no version 7"),
    ],
)
def test_a_lying_request_gets_an_error_and_the_connection_lives(worker, changes, message):
    with raw(worker) as connection:
        greet(connection)
        frame = ask(connection, **changes)
        assert frame.kind == protocol.ERROR and message in protocol.decode_fault(frame.body).message
        assert ask(connection).kind == protocol.RESULT


def test_a_slot_outside_the_ring_is_an_error(worker):
    ring, fd = Ring.create(2, 4096)
    with raw(worker) as connection:
        greet(connection, protocol.Hello(protocol.VERSION, 2, 4096), [fd])
        frame = ask(connection, b"", slot=2, inline=False)
        assert "slot 2 does not exist" in protocol.decode_fault(frame.body).message
    os.close(fd)
    assert ring.leased == 0


@FUZZ
@given(data=st.binary(max_size=200))
def test_random_bytes_never_kill_the_worker(worker, data):
    with raw(worker) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert worker.process.poll() is None


VALID = b"".join(
    bytes(part)
    for parts in (
        protocol.frame(protocol.HELLO, 0, protocol.Hello(protocol.VERSION)),
        protocol.frame(protocol.CALL, 1, protocol.Call("ping", {})),
        [infer_frame(2, bytes(8))],
        protocol.frame(protocol.CANCEL, 2, None),
        protocol.frame(protocol.CALL, 3, protocol.Call("metadata", {"model": "faulty"})),
        [infer_frame(4, bytes(24), shape=(3, 2), size=24)],
    )
    for part in parts
)


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_frames_never_kill_the_worker(worker, changes):
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    with raw(worker) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert worker.process.poll() is None


@FUZZ
@given(cuts=st.lists(st.integers(1, len(VALID) - 1), max_size=12))
def test_frames_survive_any_cut_of_the_stream(cuts):
    """The reader gives the same frames however the bytes arrive."""
    near, far = socket.socketpair()
    reader, frames, edges = protocol.FrameReader(), [], sorted({0, len(VALID), *cuts})
    for start, stop in itertools.pairwise(edges):
        near.sendall(VALID[start:stop])
        while _waiting(far):
            frames += reader.read(far)
    near.close()
    far.close()
    assert [(frame.kind, frame.request) for frame in frames] == [
        (protocol.HELLO, 0), (protocol.CALL, 1), (protocol.INFER, 2), (protocol.CANCEL, 2), (protocol.CALL, 3),
        (protocol.INFER, 4),
    ]  # fmt: skip
    assert bytes(frames[-1].payload) == bytes(24)


def _waiting(connection):
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)


def test_a_claimed_size_takes_no_memory(worker):
    before = psutil.Process(worker.process.pid).memory_info().rss
    connections = [raw(worker) for _ in range(20)]
    for connection in connections:
        greet(connection)
        head = protocol.HEAD.pack(protocol.MAGIC, protocol.INFER, 10, protocol.PAYLOAD_BYTES_CAP, 1)
        connection.sendall(head + b"only this")
    assert still_works(worker)
    assert psutil.Process(worker.process.pid).memory_info().rss - before < 20 << 20
    for connection in connections:
        connection.close()


def test_an_oversized_frame_is_refused(worker):
    with raw(worker) as connection:
        greet(connection)
        connection.sendall(struct.pack("<HBxIIQ", protocol.MAGIC, protocol.INFER, 10, 0xFFFFFFFF, 1))
        (frame,) = protocol.FrameReader().read(connection)
        assert "is too large" in protocol.decode_fault(frame.body).message
        assert connection.recv(1) == b""


def test_many_connections_leak_neither_descriptors_nor_memory(worker):
    process = psutil.Process(worker.process.pid)

    def round_trip():
        client = BlockingWorkerClient.connect(worker.path)
        client.infer("faulty", {"x": np.zeros((8, 2), dtype=np.float32)})
        client.close()

    for _ in range(20):
        round_trip()
    fds, own, rss = process.num_fds(), psutil.Process().num_fds(), process.memory_info().rss
    for _ in range(200):
        round_trip()
    assert still_works(worker)
    wait_until(lambda: process.num_fds() <= fds + 1, "the worker's descriptors to close")
    wait_until(lambda: psutil.Process().num_fds() <= own + 1, "our descriptors to close")
    assert process.memory_info().rss - rss < 4 << 20


def test_a_client_that_leaves_mid_request_leaks_nothing(worker):
    process = psutil.Process(worker.process.pid)
    assert still_works(worker)
    fds = process.num_fds()
    for _ in range(20):
        ring, fd = Ring.create(2, 4096)
        connection = raw(worker)
        greet(connection, protocol.Hello(protocol.VERSION, 2, 4096), [fd])
        os.close(fd)
        np.frombuffer(ring.slot(0), np.float32, 2)[:] = (0, 0)
        connection.sendall(infer_frame(1, slot=0, inline=False))
        connection.close()
    assert still_works(worker)
    assert process.num_fds() <= fds + 1


def test_a_request_beyond_a_frame_is_refused_by_the_client_itself(worker, monkeypatch):
    client = BlockingWorkerClient.connect(worker.path)
    with pytest.raises(InputError, match="names and shapes of tensors take"):
        client.infer("faulty", action(0), wanted=("y" * 1000,) * 2000)
    monkeypatch.setattr(protocol, "PAYLOAD_BYTES_CAP", 4096)
    with pytest.raises(InputError, match="bytes, allowed are 4096"):
        client.infer("faulty", {"x": np.zeros((200_000, 2), np.float32)})
    assert client.infer("faulty", action(0)).version == 1  # the connection lives, and no slot is lost
    client.close()


async def test_what_waits_for_a_worker_that_does_not_read_is_bounded(worker, monkeypatch):
    monkeypatch.setattr(client_module, "UNSENT_BYTES_CAP", 1 << 20)
    client = await WorkerClient.connect(worker.path, "test", slots=0)
    rows = {"x": np.ones((8, 2), np.float32), "filler": np.zeros((1, 100_000), np.float32)}
    os.kill(worker.process.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED, "the worker's stop")
    try:
        asked = [asyncio.create_task(client.infer("faulty", rows)) for _ in range(40)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
        assert len(client._unsent) < (2 << 20)
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadError)]
    assert "takes no more requests" in str(refused[0]) and len(refused) < 40
    assert all("no input 'filler'" in str(outcome) for outcome in outcomes if outcome not in refused)
    assert client.in_flight == 0
    client.close()


async def test_thousands_of_requests_of_one_turn_of_the_loop_are_each_answered(worker):
    client = await WorkerClient.connect(worker.path, "test", slots=0)
    asked = [asyncio.create_task(client.infer("faulty", action(0))) for _ in range(900)]
    left = [asyncio.create_task(client.infer("faulty", action(0))) for _ in range(900)]
    await asyncio.sleep(0)
    for task in left:
        task.cancel()
    answers = await asyncio.gather(*asked)
    assert all(answer.outputs["y"].shape == (1, 2) for answer in answers)
    assert all(
        isinstance(outcome, asyncio.CancelledError) for outcome in await asyncio.gather(*left, return_exceptions=True)
    )
    client.close()


async def test_an_answer_that_comes_after_its_deadline_is_dropped(worker):
    client = await WorkerClient.connect(worker.path, "test")
    asked = asyncio.create_task(client.infer("faulty", action(0), deadline=deadline_ns(50)))
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251 (the loop shall be busy; the worker is not, and has answered)
    with pytest.raises(DeadlineError):
        await asked
    assert (await client.infer("faulty", action(0))).version == 1 and client.in_flight == 0
    client.close()


async def test_nobody_waits_beyond_a_deadline_that_was_told_after_a_later_one(worker):
    client = await WorkerClient.connect(worker.path, "test")
    os.kill(worker.process.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED, "the worker's stop")
    try:
        asked = [
            asyncio.create_task(client.infer("faulty", action(0), deadline=deadline_ns(ms))) for ms in (20_000, 40, 80)
        ]
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*asked[1:], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeadlineError] * 2 and not asked[0].done()
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    assert (await asked[0]).version == 1
    client.close()


def test_the_worker_exits_when_its_control_socket_closes(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    worker = Worker(tmp_path)
    worker.load("faulty", "faulty", tmp_path / "model.json")
    client = BlockingWorkerClient.connect(worker.path)
    with pytest.raises(MillhandError):  # its runner hangs for good; it must exit all the same
        client.infer("faulty", action(2), deadline=deadline_ns(300))
    worker.stop()
    assert worker.process.returncode == 0


AUDIT = """
import json, sys
def hook(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        open("/proc/self/fd/2", "w").write(f"AUDIT {event} {args[1:]}\\n")
    writes = event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
    if writes and args[0] != "/proc/self/fd/2":
        open("/proc/self/fd/2", "w").write(f"AUDIT {event} {args}\\n")
sys.addaudithook(hook)
from millhand.serving.worker import main; main()
"""


def test_a_worker_with_onnxruntime_looks_nothing_up_and_writes_nothing(tmp_path, capfd):
    identity(tmp_path / "identity.onnx")
    before = set(tmp_path.rglob("*"))
    worker = Worker(tmp_path, AUDIT)
    worker.load("same", "onnxruntime", tmp_path / "identity.onnx")
    worker.control.infer("same", action(3))
    process = psutil.Process(worker.process.pid)
    assert [connection for connection in process.net_connections() if connection.raddr] == []
    worker.stop()
    assert "AUDIT" not in capfd.readouterr().err
    # HOME is this folder: onnxruntime's telemetry would have put a cache there.
    assert set(tmp_path.rglob("*")) - before == {worker.path}


def test_what_a_worker_imports_is_python_3_10():
    """Each file that a worker loads parses as 3.10 and imports nothing that 3.10 or a lean worker lacks."""
    script = (
        "import sys, json, millhand.serving.worker, millhand_plugins.onnxruntime, millhand_plugins.onnxruntime.backend;"
        "import millhand_plugins.remote, millhand_plugins.remote.backend;"
        "print(json.dumps([[n, getattr(m, '__file__', None)] for n, m in sys.modules.items()]))"
    )
    loaded = dict(json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout))
    own = {name: path for name, path in loaded.items() if name.startswith("millhand") and path}
    assert "millhand.serving.batcher" in own
    assert not {"pydantic", "asyncio", "tomllib", "millhand.records", "millhand.serving.manifest"} & set(loaded)
    for path in own.values():
        tree = ast.parse(Path(path).read_text(), feature_version=(3, 10))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & {"StrEnum", "Self", "override", "assert_never", "UTC"}, path
