"""Answers: what a server says reaches the client as it was said, streamed or whole."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from gateway_kit import MODEL, asked, events_of, said, until

from millhand.serving.openai.routes import LanguageRoutes, Route


def test_a_whole_answer(site):
    answer = site.chat().json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "All is well."}
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}


def test_a_stream_byte_for_byte(site):
    body = asked("hello", stream=True, stream_options={"include_usage": True})
    through = site.post("/v1/chat/completions", body).content
    direct = httpx.post(f"{site.urls[0]}/v1/chat/completions", json=body, trust_env=False).content
    assert through == direct
    assert events_of(through.decode())[-2]["usage"]["completion_tokens"] == 4


def test_usage_is_counted_and_not_sent_where_nobody_asked_for_it(site):
    before = site.sample("millhand_language_generation_tokens_total", model_name=MODEL)
    events = site.events({"tokens": 9})
    assert said(events) == "".join(f" w{number}" for number in range(9))
    assert events[-1] == "[DONE]" and all("usage" not in event for event in events[:-1])
    assert site.sample("millhand_language_generation_tokens_total", model_name=MODEL) == before + 9


def test_the_server_gets_the_bytes_that_the_client_sent(site):
    body = b'{ "model":"scripted",  "messages":[{"role":"user","content":"h\\u00e9"}], "temperature":0.10 }'
    site.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert body in site.servers[0].raw + site.servers[1].raw


def test_each_server_is_shown_its_own_key(site):
    keys = {url: f"Bearer key-{place}" for place, url in enumerate(site.urls)}

    def shown(wanted):
        site.chat(headers={"Authorization": "Bearer the-client-s"})
        seen = [server.headers[-1].get("Authorization") for server in site.servers if server.headers]
        return set(seen) <= wanted

    with site.told(keys={url: key.removeprefix("Bearer ") for url, key in keys.items()}):
        until(lambda: shown(set(keys.values())), "the servers are shown their keys")
        for server, key in zip(site.servers, keys.values(), strict=True):
            assert not server.headers or server.headers[-1]["Authorization"] == key
    until(lambda: shown({None}), "no key without one")


def test_the_token_does_not_travel_on(site):
    site.chat(headers={"Authorization": "Bearer secret", "X-Own": "1"})
    seen = [headers for server in site.servers for headers in server.headers]
    assert seen and not any("secret" in str(headers) or "X-Own" in headers for headers in seen)


def test_completions(site):
    whole = site.post("/v1/completions", {"model": MODEL, "prompt": "hello"}).json()
    assert whole["choices"][0]["text"] == "All is well."
    stream = site.post("/v1/completions", {"model": MODEL, "prompt": "hello", "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == "All is well."


def test_embeddings_of_a_server_that_embeds(site):
    answer = site.post("/v1/embeddings", {"model": MODEL, "input": ["ab", "abc"]}).json()
    assert [row["embedding"] for row in answer["data"]] == [[2.0, 1.0], [3.0, 1.0]]


def test_embeddings_of_the_node_s_own_embedder(site):
    answer = site.post("/v1/embeddings", {"model": "minilm", "input": ["ab", "abc"]}).json()
    assert [row["embedding"] for row in answer["data"]] == [[2.0, 0.5], [3.0, 0.5]]
    coded = site.post("/v1/embeddings", {"model": "minilm", "input": "ab", "encoding_format": "base64"}).json()
    assert coded["data"][0]["embedding"] == "AAAAQAAAAD8="
    answer = site.post("/v1/embeddings", {"model": "none", "input": "ab"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_models(site):
    listed = site.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert listed["data"][0]["max_model_len"] == 4096
    assert site.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    assert site.get("/v1/models/none").status_code == 404


def test_a_thousand_turns(site):
    turns = [{"role": role, "content": f"turn {n}"} for n in range(500) for role in ("user", "assistant")]
    answer = site.post("/v1/chat/completions", {**asked("x"), "messages": [*turns, {"role": "user", "content": "end"}]})
    assert answer.status_code == 200


def test_the_least_busy_server_is_asked(site):
    counts = [len(server.bodies) for server in site.servers]
    with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=asked({"tokens": 2, "every_s": 60}, stream=True)):
        until(lambda: sum(server.open for server in site.servers) == 1)
        busy = next(number for number, server in enumerate(site.servers) if server.open)
        for _ in range(3):
            assert site.chat().status_code == 200
        new = [len(server.bodies) - before for server, before in zip(site.servers, counts, strict=True)]
        assert (new[busy], new[1 - busy]) == (1, 3)
    until(lambda: not any(server.open for server in site.servers))


def test_of_equals_any_is_asked():
    """Several processes that know their own requests alone do not all begin with the first server."""
    routes, route = LanguageRoutes(Path("none")), Route(name="m", urls=("http://a", "http://b"))
    assert {routes.least_busy(route) for _ in range(200)} == set(route.urls)
    routes.begin("http://a")
    assert {routes.least_busy(route) for _ in range(200)} == {"http://b"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(site, stream):
    left = sum(server.left for server in site.servers)
    body = asked({"tokens": 3, "first_s": 0 if stream else 600, "every_s": 600}, stream=stream)
    with httpx.Client(trust_env=False, timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{site.url}/v1/chat/completions", json=body)
    until(lambda: sum(server.left for server in site.servers) == left + 1, "the server hears that the client left")
    until(lambda: site.sample("millhand_language_requests_running", model_name=MODEL) == 0)


def thoughts(events):
    return said(events, "reasoning_content")


@pytest.mark.parametrize(
    ("tokens", "thought", "answer"),
    [
        (["<think>", "I ", "think", "</think>", "\n\n", "So."], "I think", "So."),
        (["<th", "ink>I", " think</", "think>", "So", "."], "I think", "So."),
        (["I think", "\n</thi", "nk>\n", "\nSo."], "I think\n", "So."),
        (["a < b", " </th", "e>", "</think>", "So."], "a < b </the>", "So."),
        (["<think>never done"], "never done", ""),
    ],
)
def test_thoughts_are_kept_apart_in_streams(site, tokens, thought, answer):
    with site.told(reasoning=True):
        events = site.events({"tokens": tokens})
        assert (thoughts(events), said(events)) == (thought, answer)
        assert events[-1] == "[DONE]"


def test_thoughts_are_kept_apart_in_whole_answers(site):
    with site.told(reasoning=True):
        message = site.chat({"raw": "<think>\nI think\n</think>\n\nSo."}).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "So.", "reasoning_content": "I think"}
        message = site.chat({"raw": "I think\n</think>\n\nSo."}).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("I think", "So.")
        assert "reasoning_content" not in site.chat({"raw": "No thought."}).json()["choices"][0]["message"]


def test_thinking_that_is_switched_off_makes_no_thoughts(site):
    with site.told(reasoning=True):
        events = site.events({"tokens": ["So", "."]}, chat_template_kwargs={"enable_thinking": False})
        assert (thoughts(events), said(events)) == ("", "So.")


def test_a_server_that_keeps_thoughts_apart_itself(site):
    with site.told(reasoning=True, abilities=["chat", "reasoning", "usage"]):
        events = site.events({"tokens": ["I ", "think"], "field": "reasoning"})
        assert (thoughts(events), said(events)) == ("I think", "")
