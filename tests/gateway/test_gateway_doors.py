"""Who comes in: tokens, rates, bounds of number, size and time; web pages; what the metrics say of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess

import httpx
import psutil
import pytest
from gateway_kit import MODEL, Site, asked, error_of, said, until

from millhand.errors import ConfigError, InputError
from millhand.serving.openai.admission import Bucket
from millhand.serving.openai.settings import GatewaySettings
from millhand.serving.openai.tokens import TokenKeeper, add_token, read_tokens, write_tokens
from millhand.validation import validate


@pytest.fixture(scope="module")
def shut(make_site, tmp_path_factory):
    """A gateway that asks for tokens; its bounds are narrow. `names` holds the tokens."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    names = {name: add_token(path, name, role) for name, role in (("ada", "operator"), ("max", "trainee"))}
    site = make_site(
        tokens_file=path,
        rates={"trainee": {"requests_per_minute": 3}, "operator": {"tokens_per_minute": 1000}},
        cors_origins=("https://panel.example",),
        request_timeout_s=0.5,
    )
    site.names, site.path = names, path
    return site


@pytest.fixture(scope="module")
def narrow(make_site):
    """One answer at a time, one waits, nobody waits long."""
    return make_site(streams_cap=1, queue=1, queue_wait_s=1, first_token_s=0.5, idle_s=0.5, deadline_s=2)


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_a_token_is_asked_for(shut):
    for headers in ({}, bearer("guess"), {"Authorization": "Bearer"}, {"Authorization": "Basic abc"}):
        answer = shut.chat(headers=headers)
        assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert shut.chat(headers=bearer(shut.names["ada"])).status_code == 200
    assert shut.get("/v1/models").status_code == 401 and shut.get("/metrics").status_code == 401
    assert shut.get("/health").status_code == 200


def test_a_token_can_be_taken_back(shut):
    token = add_token(shut.path, "eve", "operator")
    until(lambda: shut.chat(headers=bearer(token)).status_code == 200, "the new token holds")
    write_tokens(shut.path, [one for one in read_tokens(shut.path) if one.name != "eve"])
    until(lambda: shut.chat(headers=bearer(token)).status_code == 401, "the token holds no more")


def test_a_role_has_its_rate(shut):
    answers = [shut.chat(headers=bearer(shut.names["max"])) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 20
    assert error_of(answers[-1])["code"] == "rate_limit_exceeded"


def test_tokens_are_rationed_after_they_were_used(shut):
    headers = bearer(shut.names["ada"])
    answers = [shut.chat({"tokens": 2000}, headers=headers), shut.chat(headers=headers)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert error_of(answers[1])["type"] == "tokens"


def test_a_bucket_fills_again():
    clock = [0.0]
    bucket = Bucket(60, lambda: clock[0])
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1)
    clock[0] = 30
    assert bucket.wait_s(1) == 0 and bucket.wait_s(31) == pytest.approx(1)
    clock[0] = 10_000
    assert bucket.wait_s(60) == 0 and bucket.wait_s(61) > 0


def test_web_pages_may_not_ask_unless_they_are_named(shut):
    headers = bearer(shut.names["ada"])
    answer = shut.get("/v1/models", headers={**headers, "Origin": "https://evil.example"})
    assert answer.status_code == 403 and "Access-Control-Allow-Origin" not in answer.headers
    answer = shut.get("/v1/models", headers={**headers, "Origin": "https://panel.example"})
    assert answer.headers["Access-Control-Allow-Origin"] == "https://panel.example"
    answer = httpx.options(f"{shut.url}/v1/models", headers={"Origin": "https://panel.example"}, trust_env=False)
    assert answer.status_code == 204 and "Authorization" in answer.headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_never_finishes_its_head_is_left(shut, sent):
    host, _, port = shut.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        link.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(100) == b""


def test_a_body_that_does_not_come(shut):
    host, _, port = shut.url.removeprefix("http://").partition(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {shut.names['ada']}\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as link:
        link.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert link.recv(1000).startswith(b"HTTP/1.1 408")


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_more_than_the_queue_holds_is_refused_at_once(narrow):
    slow = {"tokens": 1, "first_s": 1.5}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        first = pool.submit(narrow.chat, slow)
        until(lambda: narrow.server.open == 1)
        answers = list(pool.map(lambda _: narrow.chat({"tokens": 1}), range(4)))
        assert first.result().status_code == 200
    refused = [answer for answer in answers if answer.status_code == 503]
    assert 3 <= len(refused) <= 4  # the one that waited may have had its turn
    assert all(error_of(answer)["code"] == "overloaded" and "Retry-After" in answer.headers for answer in refused)
    until(lambda: narrow.chat().status_code == 200, "there is room again")


def test_a_client_that_leaves_the_queue_leaves_no_trace(narrow):
    url = f"{narrow.url}/v1/chat/completions"
    long = asked({"tokens": 20, "every_s": 0.2}, stream=True)
    with (
        httpx.Client(trust_env=False, timeout=0.5) as waits,  # less than the second that the queue lets it wait
        concurrent.futures.ThreadPoolExecutor() as pool,
        httpx.stream("POST", url, json=long, trust_env=False) as first,
    ):
        until(lambda: narrow.server.open == 1)
        asking = pool.submit(waits.post, url, json=asked("x"))
        until(lambda: narrow.sample("millhand_language_requests_waiting", model_name=MODEL) == 1)
        with pytest.raises(httpx.ReadTimeout):
            asking.result(30)
        first.read()
    assert narrow.chat().status_code == 200
    assert narrow.sample("millhand_language_requests_waiting", model_name=MODEL) == 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"tokens": 2, "first_s": 60}, "did not begin in time"),
        ({"tokens": 9, "stop_after": 2, "ending": "hang"}, "has come to a halt"),
        ({"tokens": 100, "every_s": 0.1}, "has come to a halt"),
    ],
)
def test_a_stream_that_takes_too_long_ends_with_an_error(narrow, script, words):
    events = narrow.events(script)
    assert words in events[-1]["error"]["message"] and events[-1]["error"]["code"] == "timeout"
    until(lambda: narrow.server.open == 0, "the server is free again")


def test_a_whole_answer_that_takes_too_long(narrow):
    answer = narrow.chat({"tokens": 1, "first_s": 60})
    assert answer.status_code == 504 and error_of(answer)["code"] == "timeout"
    until(lambda: narrow.server.open == 0, "the server is free again")


def test_a_client_that_does_not_read_is_left(narrow):
    host, _, port = narrow.url.removeprefix("http://").partition(":")
    body = httpx.Request("POST", narrow.url, json=asked({"tokens": 400, "characters": 100_000}, stream=True)).read()
    with socket.create_connection((host, int(port)), timeout=30) as link:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        link.sendall(head.encode() + body)
        until(lambda: narrow.server.open == 1)
        until(lambda: narrow.server.open == 0, "the server is free again")


# ---- settings and files ---------------------------------------------------------------------------------------------


def test_beyond_loopback_a_token_is_a_must():
    with pytest.raises(ConfigError, match="name a tokens_file"):
        validate(GatewaySettings, {"host": "0.0.0.0"}, "config")
    assert validate(GatewaySettings, {"host": "0.0.0.0", "tokens_file": "x"}, "config").host == "0.0.0.0"


def test_a_broken_tokens_file_is_named(tmp_path):
    path = tmp_path / "tokens"
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenKeeper(path)
    token = add_token(path, "ada", "operator")
    assert token not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert TokenKeeper(path).caller(f"Bearer {token}").name == "ada"
    with pytest.raises(InputError, match="has a token already"):
        add_token(path, "ada", "operator")
    with pytest.raises(InputError, match="node's own"):
        add_token(path, "bob", "agent")
    path.write_text("ada operator\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_tokens(path)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="written by others"):
        read_tokens(path)


# ---- the process ----------------------------------------------------------------------------------------------------


def test_metrics_under_vllm_s_names(narrow):
    narrow.events({"tokens": 5})
    page = narrow.get("/metrics", params={"names": "vllm"}).text
    for line in (
        f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}}',
        f'vllm:inter_token_latency_seconds_count{{model_name="{MODEL}"}}',
        f'vllm:num_requests_running{{model_name="{MODEL}"}} 0',
        f'vllm:num_requests_waiting{{model_name="{MODEL}"}} 0',
        f'vllm:request_success_total{{model_name="{MODEL}",finished_reason="stop"}}',
        "# TYPE vllm:generation_tokens_total counter",
    ):
        assert line in page
    assert "vllm:" not in narrow.get("/metrics").text
    assert narrow.get("/metrics", params={"names": "x"}).status_code == 400


def test_the_plain_page_passes_promtool(narrow):
    narrow.chat()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=narrow.get("/metrics").text, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_requests_are_counted_as_at_every_front(narrow):
    path = "/v1/chat/completions"
    before = narrow.sample("http_requests_total", method="POST", path=path, status="200")
    narrow.chat()
    assert narrow.sample("http_requests_total", method="POST", path=path, status="200") == before + 1
    assert narrow.sample("http_request_duration_seconds_count", path=path) >= before + 1


def test_what_is_under_way_may_finish_and_the_rest_ends_clearly(tmp_path):
    site = Site(tmp_path).start()
    until(lambda: site.get("/health").status_code == 200)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        short = pool.submit(site.events, {"tokens": 10, "every_s": 0.1})
        until(lambda: site.server.open == 1)
        site.do(site.front.stop())
        assert said(short.result()).endswith(" w9")
    site.stop()


def test_it_ends_with_the_daemon(tmp_path):
    site = Site(tmp_path).start()
    until(lambda: site.get("/health").status_code == 200)
    (pid,) = site.front.pids
    for watch in site.front._watches:  # nobody starts it again, as after a kill -9 of the daemon
        watch.cancel()
    site.do(site.daemon.control.stop())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    site.stop()


def test_a_killed_process_comes_back(narrow):
    (pid,) = narrow.front.pids
    os.kill(pid, signal.SIGKILL)

    def back():
        try:
            return narrow.front.pids not in ([], [pid]) and narrow.chat().status_code == 200
        except httpx.TransportError:
            return False

    until(back)
