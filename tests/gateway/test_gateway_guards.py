"""Guards: three lines of defence, each decision counted and kept, none of them in the way of a harmless answer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading

import pytest
from gateway_kit import MODEL, asked, error_of, said, until

from millhand.language.guarding import GuardContext, Part, Verdict
from millhand.serving.openai.audit import FILE, Audit, decisions, previous
from millhand.serving.openai.guarding import Guards


@pytest.fixture(scope="module")
def guarded(make_site):
    return make_site(plugins={"wordguard": {"policy": "Be brief."}}, audit="all")


@pytest.fixture(scope="module")
def whole(make_site):
    """Before guards that must see an answer whole."""
    return make_site(plugins={"wordguard": {"whole": True}})


def kept(site):
    return list(decisions(site.folder / FILE))


def test_a_request_is_refused_before_the_server_sees_it(guarded):
    answer = guarded.chat("this is FORBIDDEN")
    error = error_of(answer)
    assert answer.status_code == 400 and error["code"] == "content_filter"
    assert "a forbidden word" in error["message"] and "words.forbidden" in error["message"]
    assert all("FORBIDDEN" not in str(body) for body in guarded.server.bodies)


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_every_message_is_looked_at(guarded, role):
    messages = [{"role": role, "content": [{"type": "text", "text": "FORBIDDEN"}]}, {"role": "user", "content": "x"}]
    assert guarded.post("/v1/chat/completions", {**asked("x"), "messages": messages}).status_code == 400


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_other_endpoints_are_guarded_too(guarded, path, field):
    assert guarded.post(path, {"model": MODEL, field: "FORBIDDEN"}).json()["error"]["code"] == "content_filter"


def test_a_text_is_changed_on_its_way_in(guarded):
    guarded.chat("my password is hunter2")
    assert guarded.server.bodies[-1]["messages"][-1]["content"] == "my password is ***"
    guarded.post("/v1/embeddings", {"model": MODEL, "input": ["a", "hunter2"]})
    assert guarded.server.bodies[-1]["input"] == ["a", "***"]


def test_the_policy_is_told_to_the_model(guarded):
    guarded.chat("x")
    assert guarded.server.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "You help."}, {"role": "user", "content": "x"}]
    guarded.post("/v1/chat/completions", {**asked("x"), "messages": own})
    assert guarded.server.bodies[-1]["messages"][0]["content"] == "Be brief. You help."
    guarded.post("/v1/completions", {"model": MODEL, "prompt": "x"})
    assert guarded.server.bodies[-1]["prompt"] == "Be brief.\n\nx"


class Waiting:
    """Ends its check once the event loop has gone on: never, where it holds the loop up."""

    name = "waiting"
    stages = ("input",)

    def __init__(self):
        self.gone_on = threading.Event()

    def check(self, stage, text, context):
        if not self.gone_on.wait(30):
            raise TimeoutError
        return Verdict(action="refuse" if "no" in text else "pass", text=text)


@pytest.mark.parametrize(("text", "seen"), [("x" * 50_000, "x" * 50_000), ("no" * 50_000, None)])
async def test_a_long_text_holds_up_nobody_else(tmp_path, text, seen):
    guard = Waiting()
    session = Guards([guard], Audit(tmp_path / "a", 1 << 16, "none")).session(GuardContext(model="m"), "", None)
    judging = asyncio.create_task(session.part(Part("client", text)))
    await asyncio.sleep(0)
    guard.gone_on.set()
    assert await judging == seen


def test_a_tool_that_is_not_allowed(guarded):
    tools = [{"type": "function", "function": {"name": "forbidden_tool"}}]
    assert error_of(guarded.chat("x", tools=tools))["code"] == "content_filter"


def test_a_key_that_stands_twice_has_one_meaning(guarded):
    body = b'{"model":"scripted","messages":[{"role":"user","content":"FORBIDDEN"}],'
    body += b'"messages":[{"role":"user","content":"fine"}]}'
    assert guarded.post("/v1/chat/completions", content=body).status_code == 200
    assert b"FORBIDDEN" not in guarded.server.raw[-1]


def test_a_guard_that_raises_refuses(guarded):
    assert "a guard of this node failed" in error_of(guarded.chat("EXPLODE"))["message"]
    assert kept(guarded)[-1]["rule"] == "guard.error"


TOKENS = ["It is", " hun", "ter", "2", ", so", " FOR", "D", "."]


@pytest.mark.parametrize("kind", ["guarded", "whole"])
def test_an_answer_is_changed_on_its_way_out(request, kind):
    site = request.getfixturevalue(kind)
    wanted = "It is ***, so FORD."
    assert said(site.events({"tokens": TOKENS})) == wanted
    answer = site.chat({"tokens": TOKENS}).json()["choices"][0]
    assert answer["message"]["content"] == wanted and answer["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["guarded", "whole"])
def test_an_answer_is_refused_on_its_way_out(request, kind):
    site = request.getfixturevalue(kind)
    tokens = ["It is", " FORB", "IDD", "EN", " here"]
    events = site.events({"tokens": tokens})
    last = events[-2]["choices"][0]
    assert said(events) == ("It is " if kind == "guarded" else "")
    assert last["finish_reason"] == "content_filter" and "a forbidden word" in last["delta"]["refusal"]
    assert events[-1] == "[DONE]"
    choice = site.chat({"tokens": tokens}).json()["choices"][0]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["content"] is None
    assert "a forbidden word" in choice["message"]["refusal"]


def test_a_refused_stream_frees_the_server_at_once(guarded):
    left = guarded.server.left
    guarded.events({"tokens": ["FORB", "IDDEN", "x"], "every_s": 0.2})
    until(lambda: guarded.server.left == left + 1 and not guarded.server.open)


def test_a_harmless_stream_goes_out_as_it_came(guarded):
    for body in (asked("hi", stream=True), {"model": MODEL, "prompt": "hi", "stream": True}):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        through = guarded.post(path, body).content
        direct = guarded._client.post(f"{guarded.urls[0]}{path}", json=body).content
        assert through == direct


def test_thoughts_are_guarded_too(guarded):
    with guarded.told(reasoning=True):
        events = guarded.events({"tokens": ["<think>my hun", "ter2</think>", "So."]})
        assert (said(events, "reasoning_content"), said(events)) == ("my ***", "So.")


def test_arguments_of_tools_are_guarded_too(guarded):
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "hunter2"}'}}
    script = json.dumps({"calls": [call]}).replace("hunter2", "hunt\\u0065r2")  # the script is guarded on its way in
    events = guarded.events(script, tools=tools)
    calls = [
        call for event in events[:-1] for choice in event["choices"] for call in choice["delta"].get("tool_calls", [])
    ]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": "***"}'
    message = guarded.chat(script, tools=tools).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": "***"}'


def test_decisions_are_kept_without_the_text(guarded):
    guarded.chat("a hunter2 b", headers={"Authorization": "Bearer the-agent-s-own"})
    found = [line for line in kept(guarded) if line["action"] == "change" and line["stage"] == "input"][-1]
    assert (found["guard"], found["rule"], found["reason"]) == ("words", "words.starred", "a password")
    assert (found["model"], found["role"], found["source"], found["characters"]) == (MODEL, "agent", "agent", 11)
    assert len(found["sha256"]) == 64 and "hunter2" not in (guarded.folder / FILE).read_text()
    assert {line["action"] for line in kept(guarded)} == {"pass", "change", "refuse"}


def test_findings_alone_are_kept_where_nothing_else_is_asked_for(whole):
    whole.chat("fine")
    whole.chat("FORBIDDEN")
    assert {line["action"] for line in kept(whole)} <= {"change", "refuse"}


def test_the_agent_says_where_its_texts_come_from(guarded):
    own = {"source": "order", "grounds": ["the bearing is worn"]}
    headers = {"Authorization": "Bearer the-agent-s-own"}
    assert guarded.chat("a hunter2 c", millhand=own, headers=headers).status_code == 200
    assert "millhand" not in guarded.server.bodies[-1]
    assert [line for line in kept(guarded) if line["action"] == "change" and line["stage"] == "input"][-1][
        "source"
    ] == "order"
    assert guarded.chat("x", millhand={"source": "nobody"}, headers=headers).status_code == 400


def test_parts_of_the_agents_prompt_are_judged_by_their_own_source(guarded):
    part = {"source": "knowledge", "text": "hunter2 opens it"}
    headers = {"Authorization": "Bearer the-agent-s-own"}
    assert guarded.chat("Read: hunter2 opens it.", millhand={"parts": [part]}, headers=headers).status_code == 200
    assert "hunter2" not in guarded.server.bodies[-1]["messages"][-1]["content"]
    found = [line for line in kept(guarded) if line["action"] == "change" and line["stage"] == "input"][-1]
    assert (found["source"], found["characters"]) == ("knowledge", 16)
    wrong = {"parts": [{"source": "nobody", "text": "x"}]}
    assert guarded.chat("x", millhand=wrong, headers=headers).status_code == 400


def test_decisions_are_counted(guarded):
    def count(**labels):
        return guarded.sample("millhand_guard_decisions_total", guard="words", **labels)

    before = count(action="refuse", stage="input", rule="words.forbidden")
    refused = guarded.sample("millhand_guard_requests_total", outcome="refused")
    passed = guarded.sample("millhand_guard_requests_total", outcome="passed")
    guarded.chat("FORBIDDEN")
    guarded.chat("fine")
    assert count(action="refuse", stage="input", rule="words.forbidden") == before + 1
    assert guarded.sample("millhand_guard_requests_total", outcome="refused") == refused + 1
    assert guarded.sample("millhand_guard_requests_total", outcome="passed") == passed + 1


def test_the_audit_never_outgrows_its_cap(tmp_path):
    path, context = tmp_path / "audit" / "guards.jsonl", GuardContext(model="m")
    audits = [Audit(path, 1 << 16, "findings") for _ in range(2)]
    for number in range(1000):
        verdict = Verdict(action="refuse", text="x", rule=f"rule.{number}", reason="because")
        audits[number % 2].write("g", "input", verdict, "x", context, "")
    assert path.stat().st_size + previous(path).stat().st_size <= 1 << 16
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [] or found[-1]["rule"] == "rule.999"
    rules = [int(line["rule"].removeprefix("rule.")) for line in decisions(path)]
    assert rules == list(range(rules[0], 1000))


def test_the_audit_shows_whole_reasons(tmp_path):
    reason = "it tells the language model to leave its instructions, " * 4 + "or asks for them"
    context = GuardContext(model="m", role="operator", source="knowledge")
    refused = Verdict(action="refuse", text="x", rule="injection.override", reason=reason)
    Audit(tmp_path / "data" / FILE, 1 << 16, "findings").write("g", "input", refused, "x", context, "panel-3")
    (tmp_path / "millhand.toml").write_text(
        f'[node]\nid = "n"\ndata_dir = "{tmp_path}/data"\nrun_dir = "{tmp_path}/r"\n'
    )
    told = [sys.executable, "-m", "millhand", "-c", str(tmp_path / "millhand.toml"), "gateway", "audit"]
    short, whole = (
        subprocess.run([*told, *more], capture_output=True, text=True, timeout=60, check=True).stdout.split()
        for more in ([], ["--verbose"])
    )
    assert "or asks for them" not in " ".join(short) and "or asks for them" in " ".join(whole)
    assert "panel-3 (operator) of m" in " ".join(whole) and "knowledge;" in whole
