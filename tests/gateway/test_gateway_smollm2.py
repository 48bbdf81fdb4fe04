"""The whole way with a real model: an agent, llama.cpp's server with SmolLM2, the gateway."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from gateway_kit import error_of, events_of, said

from millhand.language.exchange import bearer
from millhand.testing import millhand_agents

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "language" / "kit"))

from smollm_kit import smollm2

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
pytestmark = pytest.mark.timeout(300)
QUESTION = [{"role": "user", "content": "What does a bearing do?"}]
SCHEMA = {
    "type": "object",
    "properties": {"part": {"type": "string", "maxLength": 20}, "minutes": {"type": "integer"}},
    "required": ["part", "minutes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    model = folder / "language" / "smollm2"
    model.mkdir(parents=True)
    (model / "model.gguf").symlink_to(smollm2())
    (model / "language.toml").write_text('format = "gguf"\nfile = "model.gguf"\ncontext_tokens = 2048\n')
    config = f"""
[models]
paths = ["{model.parent}"]
[http]
enabled = false
[gateway]
port = 0
[language]
model = "smollm2"
context_tokens = 512
slots = 2
threads = 1
check_s = 0.5
restart_delay_s = 0.1
"""
    with millhand_agents(folder) as start:
        agent = start(config)
        agent.wait(lambda: get(agent, "/health").status_code == 200, "the language model", 240)
        yield agent


def url(agent):
    return agent.call("state")["gateway"]


def get(agent, path):
    return httpx.get(f"{url(agent)}{path}", trust_env=False, timeout=60)


def chat(agent, **fields):
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{url(agent)}/v1/chat/completions", json=body, trust_env=False, timeout=120)


def server_url(agent):
    return agent.call("language.show")["urls"][0]


def own_key(agent):
    """What the server wants to be shown."""
    (model,) = next(iter(agent.client.stream("language.routes")))["models"]
    return bearer(model["keys"][model["urls"][0]])


def busy(agent):
    slots = httpx.get(f"{server_url(agent)}/slots", headers=own_key(agent), trust_env=False, timeout=60).json()
    return sum(slot["is_processing"] for slot in slots)


def test_an_answer_whole_and_streamed_is_the_server_s_own(agent):
    whole = chat(agent).json()
    text = whole["choices"][0]["message"]["content"]
    assert text and whole["usage"]["completion_tokens"] == 8
    events = events_of(chat(agent, stream=True, stream_options={"include_usage": True}).text)
    assert said(events) == text and events[-2]["usage"]["completion_tokens"] == 8
    direct = {"messages": QUESTION, "max_tokens": 8, "temperature": 0}
    path = f"{server_url(agent)}/v1/chat/completions"
    assert httpx.post(path, json=direct, trust_env=False, timeout=120).status_code == 401
    answer = httpx.post(path, json=direct, headers=own_key(agent), trust_env=False, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == text


def test_a_json_schema_binds_the_answer(agent):
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}
    answer = chat(agent, response_format=form, max_tokens=40).json()["choices"][0]["message"]["content"]
    found = json.loads(answer)
    assert set(found) == {"part", "minutes"} and isinstance(found["minutes"], int)


def test_a_conversation_that_is_too_long(agent):
    answer = chat(agent, messages=[{"role": "user", "content": "pump " * 3000}])
    assert answer.status_code == 400 and error_of(answer)["code"] == "context_length_exceeded"
    assert "shorten the conversation" in error_of(answer)["message"]


def test_what_the_server_says_it_can_it_does(agent):
    choice = chat(agent, logprobs=True, seed=3, stop=["\n"], top_k=1).json()["choices"][0]
    assert choice["message"]["content"] and choice["logprobs"]


def test_clients_that_leave_free_their_slots(agent):
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 400, "stream": True, "ignore_eos": True}
    for _ in range(3):
        with httpx.stream(
            "POST", f"{url(agent)}/v1/chat/completions", json=body, trust_env=False, timeout=120
        ) as answer:
            next(answer.iter_bytes())
    agent.wait(lambda: busy(agent) == 0, "the slots are free")
    assert chat(agent).status_code == 200


def test_the_agent_asks_through_the_gateway(agent):
    before = requests(agent)
    assert agent.call("language.complete", messages=QUESTION, max_tokens=8)
    assert requests(agent) == before + 1


def requests(agent):
    lines = get(agent, "/metrics").text.splitlines()
    name = 'http_requests_total{method="POST",path="/v1/chat/completions",status="200"}'
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0)


def test_a_server_that_is_killed_within_a_stream(agent):
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 400, "stream": True, "ignore_eos": True}
    (holder,) = [
        process
        for process in psutil.Process(agent.process.pid).children(recursive=True)
        if process.cmdline()[1:3] == ["-m", "millhand_plugins.llamacpp.serve"]
    ]
    text = b""
    with httpx.stream("POST", f"{url(agent)}/v1/chat/completions", json=body, trust_env=False, timeout=120) as answer:
        for part in answer.iter_bytes():
            if not text:
                holder.kill()
            text += part
    events = events_of(text.decode())
    assert events[-1]["error"]["code"] == "server_failed"
    agent.wait(lambda: chat(agent).status_code == 200, "the model again", 120)
