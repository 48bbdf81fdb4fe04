"""`millhand model bench` on real workers and over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest

from millhand.cli import EXIT_CODES
from millhand.errors import InputError
from millhand.serving.bench import Tally, Timing, random_requests, requests_from
from millhand.serving.bench_http import BINARY, Server, encoded
from millhand.testing import wait_until


def figures(done):
    assert done.code == 0, done.err
    found = done.data
    latency = [found["latency_ms"][name] for name in ("p50", "p90", "p99", "max")]
    assert latency == sorted(latency) and latency[0] > 0
    assert found["requests"] > 0
    return found


def http(node):
    return node.agent.call("state")["http"]


# ---- through the worker protocol ------------------------------------------------------------------------------------


def test_one_caller(node):
    found = figures(node.millhand("model", "bench", "scale", "--seconds", "0.5", "--rows", "4", "--json"))
    assert (found["version"], found["via"], found["rows"], found["errors"]) == (2, "worker", 4, {})
    assert found["rows_per_s"] == pytest.approx(4 * found["requests_per_s"], rel=1e-3)
    assert found["requests_per_s"] == pytest.approx(found["requests"] / found["seconds"], rel=1e-2)
    assert 0 < found["compute_share"] < 1 and 0 <= found["queue_share"] < 1
    assert found["mean_batch_rows"] == 4


def test_callers_share_batches(node):
    found = figures(node.millhand("model", "bench", "rows", "-n", "8", "--seconds", "0.5", "--json"))
    assert found["mean_batch_rows"] > 1.5
    text = node.millhand("model", "bench", "rows", "-n", "8", "--seconds", "0.2").out
    assert text.startswith("rows version 1: 8 at a time, 1 row each, random data, for 0.2 s\n")
    for label in ("Requests  ", "Latency   p50 ", "Worker    queue ", "Batches   "):
        assert f"\n{label}" in text


def test_a_fixed_rate(node):
    found = figures(node.millhand("model", "bench", "scale", "--rate", "50", "--seconds", "1", "--json"))
    assert (found["requests"], found["late"], found["unsent"]) == (50, 0, 0)
    assert found["concurrency"] == 64
    for words, rest in (((), "the rest is the way"), (("--rate", "50"), "the rest is the way, and waiting for a free")):
        text = " ".join(node.millhand("model", "bench", "scale", *words, "--seconds", "0.2").out.split())
        assert rest in text and ("free caller" in text) == bool(words)


def test_a_rate_that_is_too_much_counts_from_when_requests_were_due(node, tmp_path):
    path = tmp_path / "slow.csv"
    path.write_text("5,0\n")  # the model takes 200 ms for this
    words = ("model", "bench", "faulty", "-i", path, "--rate", "20", "-n", "1", "--seconds", "1.5")
    found = figures(node.millhand(*words, "--json"))
    assert found["latency_ms"]["max"] > 800, "the last one sent was due long before"
    assert found["late"] > 3
    assert found["requests"] + found["unsent"] == 30
    assert found["queue_share"] + found["compute_share"] < 0.8
    text = node.millhand(*words).out
    assert "were never sent: raise --concurrency" in text.replace("\n          ", " ")


def test_what_a_file_holds_is_sent(node, tmp_path):
    array = np.zeros((3, 2), np.float32)
    np.save(tmp_path / "x.npy", array)
    figures(
        node.millhand("model", "bench", "scale", "-i", tmp_path / "x.npy", "--rows", "2", "--seconds", "0.1", "--json")
    )
    body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    words = ("model", "bench", "scale", "--seconds", "0.1", "--json", "-i", "-")
    assert figures(node.millhand(*words, stdin=json.dumps(body).encode()))
    done = node.millhand("model", "bench", "pair", "-i", tmp_path / "x.npy")
    assert "holds one array, the model has the inputs speed, counts" in done.error


@contextmanager
def benching(node, *words):
    """`model bench` as a process, from the moment on when it sends."""
    command = [sys.executable, "-m", "millhand", "--config", str(node.agent.config_path), "model", "bench", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answered(node, model):
    stats = node.agent.call("model.stats")["models"]
    return sum(entry["success"] for entry in stats if entry["model"] == model)


def test_ctrl_c_prints_what_was_measured(node):
    before = answered(node, "words")
    with benching(node, "words", "--seconds", "600") as process:
        wait_until(lambda: answered(node, "words") > before + 50, "some requests")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (EXIT_CODES["interrupted"], "")
    assert "\nLatency   p50 " in out and "\nInterrupted after " in out


def test_a_worker_that_dies_is_an_error_and_the_measurement_goes_on(node):
    before = answered(node, "flags")
    with benching(node, "flags", "--version", "1", "--seconds", "600", "--json") as process:
        wait_until(lambda: answered(node, "flags") > before + 50, "some requests")
        for worker in node.agent.call("model.stats")["workers"]:
            psutil.Process(worker["pid"]).kill()
        wait_until(lambda: node.agent.call("model.show", model="flags")["state"] != "ready", "its death")
        wait_until(lambda: node.agent.call("model.show", model="flags")["state"] == "ready", "its return")
        counted = answered(node, "flags")
        wait_until(lambda: answered(node, "flags") > counted + 50, "requests after it")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    found = json.loads(out)
    assert set(found["errors"]) == {"worker"}
    assert found["requests"] > 100 and found["interrupted"]


# ---- over HTTP ------------------------------------------------------------------------------------------------------


def test_over_http(node):
    words = ("model", "bench", "pair", "--http", http(node), "--seconds", "0.3", "--json")
    found = figures(node.millhand(*words, "-n", "3", "--rows", "2", "--body", "json"))
    assert (found["via"], found["body"], found["queue_share"]) == (http(node), "json", None)
    assert found["mean_batch_rows"] is None
    text = node.millhand("model", "bench", "words", "--http", http(node), "--seconds", "0.2", "--version", "1").out
    assert f"words version 1 at {http(node)}" in text and "Worker" not in text


def test_binary_bodies_where_the_server_takes_them(node):
    words = ("model", "bench", "words", "--http", http(node), "--seconds", "0.2", "--json")
    if BINARY in Server.parse(http(node)).get("/v2")["extensions"]:
        assert figures(node.millhand(*words))["body"] == "binary"
    else:
        assert figures(node.millhand(*words))["body"] == "json"


def test_json_cannot_carry_what_is_no_number():
    tensors = {"x": np.array([[1.0, np.nan]], np.float32)}
    with pytest.raises(InputError, match="'x' holds NaN or infinity") as caught:
        encoded(Server.parse("http://h:1"), "m", None, tensors, False)
    assert caught.value.hint == "send --body binary"


def test_a_binary_request_holds_what_the_extension_says():
    tensors = {"x": np.array([[1.0, 2.0]], np.float32), "t": np.array([[b"ab", b"c"]], dtype=object)}
    head, _, body = encoded(Server.parse("http://h:1"), "m", 2, tensors, True).partition(b"\r\n\r\n")
    fields = dict(line.split(": ") for line in head.decode().splitlines()[1:])
    assert head.startswith(b"POST /v2/models/m/versions/2/infer HTTP/1.1\r\n")
    size = int(fields["Inference-Header-Content-Length"])
    request, data = json.loads(body[:size]), body[size:]
    assert int(fields["Content-Length"]) == len(body)
    assert [tensor["parameters"]["binary_data_size"] for tensor in request["inputs"]] == [8, 11]
    assert data == b"\0\0\x80?\0\0\0@" + b"\2\0\0\0ab\1\0\0\0c"


@contextmanager
def server(answer):
    """An HTTP server whose answers to a POST `answer` writes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
            self.reply(200, {"extensions": []} if self.path == "/v2" else {"inputs": inputs})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def reply(self, status, data):
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def test_a_server_that_closes_after_each_answer(node):
    with server(lambda handler: handler.reply(200, {})) as url:
        found = figures(node.millhand("model", "bench", "m", "--http", url, "--seconds", "0.3", "-n", "2", "--json"))
    assert found["errors"] == {}


def test_a_server_that_is_busy_and_one_that_is_none(node):
    with server(lambda handler: handler.reply(503, {"error": "queue is full"})) as url:
        done = node.millhand("model", "bench", "m", "--http", url, "--seconds", "0.3")
    assert done.code == EXIT_CODES["error"] and "503 queue is full" in done.error
    with server(lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")) as url:
        done = node.millhand("model", "bench", "m", "--http", url, "--seconds", "0.3")
    assert "does not answer in HTTP" in done.error


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("scal",), "error", "did you mean 'scale'?"),
        (("scale", "--version", "1"), "error", "model 'scale' does not serve version 1"),
        (("rows", "--rows", "9"), "error", "--rows 9 is more than model 'rows' takes at once, 8"),
        (("scale", "--rows", "0"), "usage", "--rows"),
        (("scale", "--seconds", "0"), "usage", "--seconds"),
        (("scale", "--seconds", "nan"), "usage", "nan is no finite number"),
        (("scale", "--rate", "-1"), "usage", "--rate"),
        (("scale", "--rate", "inf"), "usage", "--rate"),
        (("scale", "-n", "0"), "usage", "--concurrency"),
        (("scale", "--body", "json"), "usage", "--body is for --http"),
        (("scale", "--http", "ftp://host"), "error", "'ftp://host' is no address of a server"),
        (("scale", "--http", "http://host/v2"), "error", "give http://host:port, without a path"),
        (("scale", "--http", "http://host:99999"), "error", "is no address"),
        (("scale", "--http", "http://127.0.0.1:1"), "error", "'http://127.0.0.1:1' does not answer"),
    ],
)
def test_nonsense_is_refused(node, words, code, message):
    done = node.millhand("model", "bench", *words)
    assert done.code == EXIT_CODES[code]
    assert message in done.error
    assert done.out == ""


def test_an_unknown_model_over_http(node):
    done = node.millhand("model", "bench", "nosuch", "--http", http(node))
    assert "404" in done.error and "'nosuch' is not served" in done.error


def test_a_model_that_fails_ends_it(node, tmp_path):
    (tmp_path / "bad.csv").write_text("3,0\n")
    done = node.millhand("model", "bench", "faulty", "-i", tmp_path / "bad.csv")
    assert done.code == EXIT_CODES["error"] and "the native library said no" in done.error


# ---- the figures themselves -----------------------------------------------------------------------------------------


def test_figures():
    tally = Tally(elapsed_s=2.0)
    for _ in range(4):  # one batch of four requests of 2 rows
        tally.add(10_000_000, Timing(2_000_000, 4_000_000, 8), 2)
    tally.add(30_000_000, Timing(0, 4_000_000, 2), 2)  # one that ran alone
    found = tally.figures(2)
    assert found["mean_batch_rows"] == 5.0, "(8 + 2) rows in two batches"
    assert (found["requests_per_s"], found["rows_per_s"]) == (2.5, 5.0)
    assert found["queue_share"] == pytest.approx(8 / 70, abs=1e-3)
    assert (found["latency_ms"]["p50"], found["latency_ms"]["max"]) == (10.0, 30.0)


def test_requests():
    inputs = [
        {"name": "a", "datatype": "FP16", "shape": [-1, 3, -1]},
        {"name": "b", "datatype": "BOOL", "shape": [-1]},
        {"name": "c", "datatype": "BYTES", "shape": [-1, 2]},
        {"name": "d", "datatype": "UINT8", "shape": [-1, 2]},
    ]
    first, second = random_requests(inputs, 4)[:2]
    assert {name: (array.dtype.name, array.shape) for name, array in first.items()} == {
        "a": ("float16", (4, 3, 1)),
        "b": ("bool", (4,)),
        "c": ("object", (4, 2)),
        "d": ("uint8", (4, 2)),
    }
    assert not np.array_equal(first["a"], second["a"])
    sent = requests_from({"x": np.arange(5)[:, None]}, 2)
    assert [request["x"].ravel().tolist() for request in sent] == [[0, 1], [2, 3], [4, 0]], "over again at the end"
    assert requests_from({"x": np.arange(1)[:, None]}, 3)[0]["x"].ravel().tolist() == [0, 0, 0]
