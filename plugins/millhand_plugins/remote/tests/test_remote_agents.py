"""Two real agents, one the other's upstream: answers through both, and the upstream killed under load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from millhand.testing import Agent, wait_until

MODEL = """
name = "press"
description = "made by a test"
licence = "Apache-2.0"
{extra}
[[inputs]]
name = "x"
shape = [-1, 2]
[[outputs]]
name = "y"
shape = [-1, 2]
"""
REMOTE = (
    'backend = "remote"\nartifact = "upstream.toml"\nisolation = "own"\noptions = { retry_ms = 200, timeout_ms = 500 }'
)
FALLBACK = '[fallback]\nbackend = "onnxruntime"\nartifact = "model.onnx"\n'
DEADLINE_MS = 3000


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Node:
    """An agent that serves `press` over HTTP."""

    def __init__(self, agent: Agent, port: int) -> None:
        self.agent, self.port = agent, port
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> Node:
        self.agent.start()
        wait_until(self.ready, f"the model on port {self.port}")
        return self

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/models/press/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def infer(self, data: Any, client: httpx.Client | None = None) -> httpx.Response:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": data}
        body = {"inputs": [tensor], "parameters": {"deadline_ms": DEADLINE_MS}}
        post = httpx.post if client is None else client.post
        extra = {"trust_env": False} if client is None else {}
        return post(f"{self.url}/v2/models/press/infer", json=body, timeout=30, **extra)

    def y(self, data: Any) -> Any:
        answer = self.infer(data)
        assert answer.status_code == 200, answer.text
        return answer.json()["outputs"][0]["data"]

    def counts(self) -> dict[str, int]:
        (entry,) = self.agent.call("model.stats")["models"]
        counts: dict[str, int] = entry["session"]
        return counts


@pytest.fixture
def upstream(millhand_agent: Callable[..., Agent], tmp_path: Path, onnx_scale: Callable[..., None]) -> Node:
    """y = 2 x."""
    folder = tmp_path / "upstream" / "press"
    (folder / "1").mkdir(parents=True)
    (folder / "model.toml").write_text(MODEL.format(extra=""))
    onnx_scale(folder / "1/model.onnx", 2)
    port = free_port()
    config = f'[models]\npaths = ["{folder.parent}"]\n[http]\nport = {port}\n'
    return Node(millhand_agent(config, started=False), port)


@pytest.fixture
def node(
    millhand_agent: Callable[..., Agent], tmp_path: Path, onnx_scale: Callable[..., None], upstream: Node
) -> Callable[..., Node]:
    """Start the node whose `press` is the upstream's; its fallback is y = 3 x."""

    def make(fallback: bool = True) -> Node:
        folder = tmp_path / "node" / "press"
        (folder / "1").mkdir(parents=True)
        (folder / "model.toml").write_text(MODEL.format(extra=REMOTE))
        onnx_scale(folder / "1/model.onnx", 3)
        text = f"urls = {json.dumps([upstream.url])}\nmodel = 'press'\n"
        (folder / "1/upstream.toml").write_text(text + (FALLBACK if fallback else ""))
        port = free_port()
        config = (
            f'[plugins.remote]\nhosts = ["127.0.0.1:{upstream.port}"]\n'
            f'[models]\npaths = ["{folder.parent}"]\n[http]\nport = {port}\n'
        )
        return Node(millhand_agent(config, started=False), port).start()

    return make


def test_a_node_answers_with_another_nodes_model(node: Callable[..., Node], upstream: Node) -> None:
    upstream.start()
    assert "binary_tensor_data" in httpx.get(f"{upstream.url}/v2", trust_env=False).json()["extensions"]
    front = node()
    assert front.y([1, 2.5]) == [2, 5]
    refused = front.infer([1, 2, 3])
    assert refused.status_code == 400
    assert upstream.agent.call("model.stats")["models"][0]["success"] >= 2, "the warm-up and the request"
    assert front.counts()["upstream"] == 2
    assert front.counts()["local"] == 0


def test_a_node_without_its_upstream_says_503_and_comes_good(node: Callable[..., Node], upstream: Node) -> None:
    front = node(fallback=False)
    refused = front.infer([1, 2])
    assert refused.status_code == 503
    assert f"upstream '{upstream.url}'" in refused.json()["error"]
    upstream.start()
    wait_until(lambda: front.infer([1, 2]).status_code == 200, "an answer of the upstream")
    assert front.y([1, 2.5]) == [2, 5]
    assert front.counts()["circuit_closed"] == 1


def test_a_model_that_cannot_answer_says_so_at_its_load_and_later(node: Callable[..., Node], upstream: Node) -> None:
    """The upstream answers, but has no such model; then it has one."""
    upstream.agent.write_config(f"[http]\nport = {upstream.port}\n")
    upstream.agent.start()
    front = node(fallback=False)

    def says(*words: str) -> str:
        command = [sys.executable, "-m", "millhand", "-c", str(front.agent.config_path), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (0, 3, 4), done.stderr
        return " ".join((done.stdout + done.stderr).split())

    gone = f"upstream '{upstream.url}' answered 404"
    loaded = says("model", "load", "press")
    assert loaded.startswith(f"press serves version 1. Warning: version 1 does not answer: {gone}")
    assert "and there is no fallback (does the model stand there" in loaded
    for words in (("list",), ("show", "press")):
        assert f"does not answer: {gone}" in says("model", *words)
    assert f"WARN model press: version 1 does not answer: {gone}" in says("check")
    shown = says("model", "show", "press")
    assert f"upstream {upstream.url}: circuit open, tried" in shown and f"; last error: {gone}" in shown
    assert "fallback none" in shown and "0 answered by upstreams, 0 answered by the fallback, " in shown

    upstream.agent.stop()
    upstream.agent.write_config(
        f'[models]\npaths = ["{upstream.agent.folder.parent}/upstream"]\n[http]\nport = {upstream.port}\n'
    )
    upstream.start()
    wait_until(lambda: front.infer([1, 2]).status_code == 200, "an answer of the upstream")
    wait_until(lambda: f"upstream {upstream.url}: circuit closed" in says("model", "show", "press"), "the heartbeat")
    assert "does not answer" not in says("model", "list")
    assert says("model", "load", "press") == "press serves version 1."


def test_a_replaced_fallback_is_loaded_where_only_its_own_file_changed(
    node: Callable[..., Node], tmp_path: Path, onnx_scale: Callable[..., None]
) -> None:
    front = node()
    assert front.y([1, 2.5]) == [3, 7.5]
    onnx_scale(tmp_path / "node/press/1/model.onnx", 4)
    front.agent.call("model.load", model="press")
    assert front.y([1, 2.5]) == [4, 10]


def test_kill_9_of_the_upstream_under_load_loses_no_request(node: Callable[..., Node], upstream: Node) -> None:
    upstream.start()
    front = node()
    done = threading.Event()
    answers: Counter[str] = Counter()
    wrong: list[str] = []
    lock = threading.Lock()

    def ask(seed: int) -> None:
        number = seed
        with httpx.Client(trust_env=False) as client:
            while not done.is_set():
                number += 4
                started = time.monotonic()
                answer = front.infer([number, -number], client)
                took_ms = (time.monotonic() - started) * 1e3
                data = answer.json().get("outputs", [{}])[0].get("data")
                known = {(2 * number, -2 * number): "upstream", (3 * number, -3 * number): "local"}
                kind = known.get(tuple(data or ()), "")
                with lock:
                    answers[kind] += 1
                    if not kind or took_ms > DEADLINE_MS:
                        wrong.append(f"{answer.status_code} {took_ms:.0f} ms {answer.text[:200]}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: answers["upstream"] > 50, "answers of the upstream")
        upstream.agent.kill()
        wait_until(lambda: answers["local"] > 50, "answers of the fallback")
        upstream.start()
        before = answers["upstream"]
        wait_until(lambda: answers["upstream"] > before + 50, "answers of the upstream that came back")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    counts = front.counts()
    assert counts["unanswered"] == 0
    assert 0 < counts["local"] <= answers["local"], "batches, of one or several requests"
    assert counts["circuit_open"] >= 1
    assert counts["circuit_closed"] >= 1
