"""What cannot be: every bad request and every bad server ends in a clear error, and harms no other request."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from gateway_kit import MODEL, asked, error_of, said, until

JSON = {"Content-Type": "application/json"}


def chat_error(site, *, status=400, **fields):
    answer = site.post("/v1/chat/completions", {**asked("hi"), **fields})
    assert answer.status_code == status, answer.text
    return error_of(answer)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "none"}, "model", "not served"),
        ({"model": 7}, "model", "must be a text"),
        ({"max_tokens": 10**9}, "max_tokens", "more than the 4096 tokens"),
        ({"max_tokens": 10**30}, "max_tokens", "whole number"),
        ({"max_tokens": -1}, "max_tokens", "whole number"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens", "ask for less"),
        ({"temperature": "hot"}, "temperature", "number from 0 to 2"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"n": 4}, "n", "not served here"),
        ({"store": True}, "store", "not served here"),
        ({"messages": []}, "messages", "missing"),
        ({"messages": "hi"}, "messages", "missing"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, "messages[0]", "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0]", "content must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]",
            "'image_url' is not served",
        ),
        ({"stop": ["a"] * 50}, "stop", "at most 16"),
        ({"tools": [{"type": "function"}]}, "tools", "[0] must be"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools", "'f': parameters"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "must hold"),
        ({"millhand": {"source": "order"}}, "millhand", "not known"),
    ],
)
def test_a_field_that_cannot_be_is_named(site, fields, param, words):
    error = chat_error(site, status=404 if words == "not served" else 400, **fields)
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("text", "a schema is an object"),
        ({"type": "text"}, "type 'text' is not known"),
        ({"type": ["string", 5]}, "type 5 is not known"),
        ({"properties": []}, "properties is an object, not a list"),
        ({"properties": {"a": {"items": {"type": "x"}}}}, "properties.a.items: type 'x'"),
        ({"required": "a"}, "required is a list"),
        ({"enum": []}, "enum has 0 values"),
        ({"enum": list(range(5000))}, "enum has 5000 values"),
        ({"anyOf": {"a": 1}}, "anyOf is a list"),
        ({"type": "array", "minItems": 10**9}, "more than 2000"),
        ({"type": "string", "maxLength": -1}, "whole number from 0 on"),
        ({"type": "string", "pattern": "("}, "no regular expression"),
        ({"type": "string", "pattern": "a" * 10_000}, "at most 512"),
        ({"$ref": "https://example.com/schema"}, "only point into the schema itself"),
        ({"$ref": "#/$defs/none"}, "points at nothing"),
        (nested(40), "nested deeper than 32"),
        ({"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}, "more than 1000 parts"),
    ],
)
def test_a_schema_that_cannot_be_is_named(site, schema, words):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert words in chat_error(site, response_format=form)["message"]


def test_a_schema_that_can_be_passes(site):
    schema = {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/step"}, "maxItems": 9}},
        "$defs": {"step": {"type": ["string", "null"], "pattern": "^[a-z]+$"}},
        "required": ["steps"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert site.chat(response_format=form).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "not valid UTF-8"),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
def test_a_body_that_cannot_be_read(site, body, words):
    answer = site.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400 and words in error_of(answer)["message"]
    assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize("announced", [True, False])
def test_ten_megabytes(site, announced):
    body = json.dumps(asked("x" * 10_000_000)).encode()
    content = body if announced else iter([body[start : start + 65536] for start in range(0, len(body), 65536)])
    try:
        answer = httpx.post(
            f"{site.url}/v1/chat/completions", content=content, headers=JSON, trust_env=False, timeout=60
        )
    except httpx.TransportError:
        return  # it was refused before all of it was sent
    assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"]}),
        ("/v1/completions", {"model": MODEL, "prompt": [1, 2]}),
        ("/v1/embeddings", {"model": MODEL, "input": []}),
        ("/v1/embeddings", {"model": MODEL, "input": [[1, 2]]}),
        ("/v1/embeddings", {"model": MODEL, "input": ["a"] * 3000}),
        ("/v1/embeddings", {"model": MODEL}),
    ],
)
def test_other_endpoints_name_their_fields_too(site, path, body):
    answer = site.post(path, body)
    assert answer.status_code == 400 and error_of(answer)["param"] in ("prompt", "input")


@pytest.mark.parametrize(
    ("fields", "ability"),
    [
        ({"seed": 1}, "seed"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "usage"),
    ],
)
def test_what_the_server_cannot_do_is_refused_before_it_sees_it(site, fields, ability):
    with site.told(abilities=["chat"]):
        seen = sum(len(server.bodies) for server in site.servers)
        error = chat_error(site, **fields)
        assert error["code"] == "unsupported" and "cannot do this" in error["message"]
        neutral = {"seed": None, "stop": [], "logprobs": False, "tools": [], "response_format": {"type": "text"}}
        assert sum(len(server.bodies) for server in site.servers) == seen
        assert site.chat(**neutral).status_code == 200
        assert site.post("/v1/embeddings", {"model": MODEL, "input": "a"}).json()["error"]["code"] == "unsupported"


@pytest.mark.parametrize(("state", "retry"), [("starting", True), ("restarting", True), ("failed", False)])
def test_a_model_that_does_not_answer_now(site, state, retry):
    with site.told(state=state, reason="it is being read", urls=[]):
        answer = site.chat()
        assert answer.status_code == 503 and ("Retry-After" in answer.headers) == retry
        assert f"is {state}: it is being read" in error_of(answer)["message"]
        assert site.get("/health").status_code == 503


def test_a_replica_that_takes_no_connection_is_passed_over(site):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with site.told(urls=[dead, *site.urls]):
            assert [site.chat().status_code for _ in range(4)] == [200] * 4
        with site.told(urls=[dead]):
            answer = site.chat()
            assert answer.status_code == 503 and "takes no connection" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("ending", "words"),
    [("die", "broke off"), ("garbage", "no answer"), ("error", "out of memory")],
)
def test_a_server_that_fails_within_a_stream(site, ending, words):
    events = site.events({"tokens": 5, "stop_after": 3, "ending": ending})
    assert said(events) == " w0 w1 w2"
    assert words in events[-1]["error"]["message"] and events[-1]["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_dies_before_it_answers(site, stream):
    answer = site.chat({"tokens": 1, "ending": "die"}, stream=stream)
    assert answer.status_code == 502 and answer.headers["Retry-After"] == "1"
    assert "send the request again" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("status", "error", "wanted", "code"),
    [
        (
            400,
            {"message": "too long", "type": "exceed_context_size_error", "code": 400},
            400,
            "context_length_exceeded",
        ),
        (400, {"message": "the maximum context length is 9"}, 400, "context_length_exceeded"),
        (400, {"message": "Failed to parse grammar"}, 400, "invalid_value"),
        (500, {"message": "roles must alternate"}, 502, "server_failed"),
        (503, {"message": "Loading model"}, 503, "server_failed"),
        (500, "plain words", 502, "server_failed"),
    ],
)
def test_what_a_server_refuses_is_told_in_its_words(site, status, error, wanted, code):
    answer = site.chat({"status": status, "error": error})
    found = error_of(answer)
    assert (answer.status_code, found["code"]) == (wanted, code)
    assert (error if isinstance(error, str) else error["message"]) in found["message"]


def test_unknown_paths_and_methods(site):
    assert error_of(site.get("/v2/chat"))["code"] == "not_found"
    answer = site.get("/v1/chat/completions")
    assert answer.status_code == 405 and "takes POST" in error_of(answer)["message"]
    until(lambda: site.sample("http_requests_total", path="other", status="404"))


def test_failures_are_counted(site):
    before = site.sample("millhand_gateway_failures_total", code="invalid_json")
    site.post("/v1/chat/completions", content=b"{")
    assert site.sample("millhand_gateway_failures_total", code="invalid_json") == before + 1


def test_curl_may_wait_to_be_told_to_go_on(site):
    body = json.dumps(asked("hi")).encode()
    host, _, port = site.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}"
        link.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        assert link.recv(100).startswith(b"HTTP/1.1 100 Continue")
        link.sendall(body)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK") and b"All is well." in answer
