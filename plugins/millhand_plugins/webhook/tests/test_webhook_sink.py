"""The webhook against real HTTP and HTTPS servers that fail, hang, redirect, refuse and recover."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

import millhand_plugins.webhook as plugin
from millhand.errors import ConfigError, SinkError
from millhand.records import Alert, AlertState, Severity, WorkOrder
from millhand.validation import validate
from millhand_plugins.webhook.settings import WebhookConfig
from millhand_plugins.webhook.sink import WebhookSink

SECRET = "a long random text"
ALERT = Alert(
    id="a1",
    asset="pump",
    model="m",
    rule="r",
    kind="looseness",
    severity=Severity.WARNING,
    message="loose",
    raised_ns=5,
    changed_ns=5,
    evidence={"facts": {"velocity_rms_mm_s": float("nan")}},
)
ORDER = WorkOrder("o1", "a1", "pump", "noise", "bolts", ("tighten",), 2, 7)


class Peer:
    """A plant's system: answers with what `script` says next (then 204), keeps what it got."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.script: list[Any] = []
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.hangs = threading.Event()
        self.ended = threading.Event()
        """The client closed a connection that was left hanging."""
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                peer.got.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                answer = peer.script.pop(0) if peer.script else 204
                if callable(answer):
                    answer(self)
                else:
                    self.send_response(answer)
                    if 300 <= answer < 400:
                        self.send_header("Location", "/elsewhere")
                    self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer nothing until the client has gone."""
        self.hangs.set()
        handler.rfile.read(1)
        self.ended.set()

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        """Send one header line after the other, each in time, without an end."""
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                handler.wfile.write(b"X-Wait: longer\r\n")
                time.sleep(0.1)
        except OSError:
            self.ended.set()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.stop()


@pytest.fixture
def sink(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., WebhookSink]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)

    def make(**options: Any) -> WebhookSink:
        table = {"url": f"http://127.0.0.1:{peer.port}/hooks?plant=a", "secret_env": "HOOK_SECRET", **options}
        (made,) = plugin.millhand_sinks(validate(plugin.millhand_config(), table, "[plugins.webhook]"))
        assert isinstance(made, WebhookSink)
        return made

    return make


def readme_verify() -> Callable[..., bool]:
    """The function that README.md tells receivers to use, as it stands there."""
    page = Path(plugin.__file__).with_name("README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space: dict[str, Any] = {}
    exec(snippet, space)
    return space["verify"]


async def test_record_arrives_whole_and_signed(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    await sink().deliver(ALERT)
    await sink().deliver(ORDER)
    (path, headers, body), (_, order_headers, order_body) = peer.got
    assert path == "/hooks?plant=a"
    assert headers["content-type"] == "application/json"
    assert headers["x-millhand-event"] == "alert"
    assert json.loads(body)["type"] == "alert"
    assert json.loads(body)["record"]["evidence"] == {"facts": {"velocity_rms_mm_s": None}}
    assert json.loads(order_body)["record"] == json.loads(msgspec.json.encode(ORDER))
    verify = readme_verify()
    assert verify(SECRET.encode(), body, headers["x-millhand-signature"])
    assert verify(SECRET.encode(), order_body, order_headers["x-millhand-signature"])
    assert not verify(b"another secret", body, headers["x-millhand-signature"])
    assert not verify(SECRET.encode(), body + b" ", headers["x-millhand-signature"])
    assert not verify(SECRET.encode(), body, headers["x-millhand-signature"], tolerance_s=-1)


async def test_each_change_of_a_record_has_a_key_of_its_own(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    acked = msgspec.structs.replace(ALERT, state=AlertState.ACKED, changed_ns=6)
    cleared = msgspec.structs.replace(ALERT, state=AlertState.CLEARED, changed_ns=8)
    acked_late = msgspec.structs.replace(cleared, acked_by="kim", changed_ns=9)
    for record in (ALERT, ALERT, acked, cleared, acked_late, ORDER):
        await sink().deliver(record)
    keys = [headers["idempotency-key"] for _, headers, _ in peer.got]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


async def test_only_the_wanted_records_are_sent(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    only_orders = sink(records=["order"])
    await only_orders.deliver(ALERT)
    await only_orders.deliver(ORDER)
    assert [headers["x-millhand-event"] for _, headers, _ in peer.got] == ["order"]


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 405, 408, 425, 429, 500, 503])
async def test_what_can_be_mended_is_offered_again_for_ever(
    peer: Peer, sink: Callable[..., WebhookSink], status: int
) -> None:
    webhook = sink(refusals_cap=2)
    peer.script = [status] * 5
    for _ in range(5):
        with pytest.raises(SinkError, match=str(status)) as caught:
            await webhook.deliver(ALERT)
        assert caught.value.hint
        assert caught.value.retriable
    await webhook.deliver(ALERT)
    assert webhook.given_up == 0
    assert len(peer.got) == 6, "a redirect must not be followed"
    assert {path for path, _, _ in peer.got} == {"/hooks?plant=a"}


@pytest.mark.parametrize("status", [400, 409, 413, 422])
async def test_record_that_is_refused_is_given_up_at_the_cap(
    peer: Peer, sink: Callable[..., WebhookSink], status: int
) -> None:
    webhook = sink(refusals_cap=3)
    peer.script = [status] * 3
    for _ in range(2):
        with pytest.raises(SinkError, match=f"a1-open-5 with {status}"):
            await webhook.deliver(ALERT)
    await webhook.deliver(ALERT)
    assert webhook.given_up == 1
    await webhook.deliver(ORDER)
    assert webhook.given_up == 1


async def test_refusals_before_a_success_do_not_count_later(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    webhook = sink(refusals_cap=2)
    for _ in range(3):
        peer.script = [422]
        with pytest.raises(SinkError):
            await webhook.deliver(ALERT)
        await webhook.deliver(ALERT)
    assert webhook.given_up == 0


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
async def test_peer_that_never_ends_its_answer_is_left_in_time(
    peer: Peer, sink: Callable[..., WebhookSink], behaviour: str
) -> None:
    webhook = sink(timeout_s=0.5)
    peer.script = [getattr(peer, behaviour)]
    started = time.monotonic()
    with pytest.raises(SinkError, match=r"within 0\.5 s") as caught:
        await webhook.deliver(ALERT)
    assert time.monotonic() - started < 3
    assert caught.value.retriable
    assert await asyncio.to_thread(peer.ended.wait, 10), "the request's thread still waits"
    await webhook.deliver(ALERT)


async def test_stop_during_a_request_leaves_no_thread_behind(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    peer.script = [peer.hang]
    task = asyncio.create_task(sink(timeout_s=60).deliver(ALERT))
    assert await asyncio.to_thread(peer.hangs.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(peer.ended.wait, 10)


async def test_peer_that_talks_nonsense_or_hangs_up_is_an_error(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    peer.script = [lambda handler: handler.wfile.write(b"what?\r\n\r\n"), lambda handler: None]
    for _ in range(2):
        with pytest.raises(SinkError, match="cannot be reached"):
            await sink().deliver(ALERT)


async def test_peer_that_is_away_is_an_error_until_it_is_back(peer: Peer, sink: Callable[..., WebhookSink]) -> None:
    webhook = sink()
    peer.stop()
    with pytest.raises(SinkError, match="refused") as caught:
        await webhook.deliver(ALERT)
    assert f"127.0.0.1:{peer.port}" in caught.value.message
    peer.__init__()  # type: ignore[misc]
    await sink().deliver(ALERT)


# ---- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA of our own (ca.pem) and a server's certificate for 127.0.0.1 from it (server.pem, server.key)."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("tls")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
    for arguments in (
        ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Plant CA"],
        ["-keyout", "server.key", "-out", "server.pem", "-subj", "/CN=plant", *signed],
    ):
        subprocess.run(
            ["openssl", "req", "-x509", *new_key, *arguments], cwd=folder, check=True, capture_output=True, timeout=30
        )
    return folder


@pytest.fixture
def secure_peer(certificates: Path) -> Iterator[Peer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    peer = Peer(context)
    yield peer
    peer.stop()


async def test_own_ca_is_trusted_and_a_stranger_is_not(
    secure_peer: Peer, sink: Callable[..., WebhookSink], certificates: Path
) -> None:
    url = f"https://127.0.0.1:{secure_peer.port}/"
    with pytest.raises(SinkError, match="certificate") as caught:
        await sink(url=url).deliver(ALERT)
    assert "certificate" in caught.value.hint
    assert not secure_peer.got
    await sink(url=url, ca_file=str(certificates / "ca.pem")).deliver(ALERT)
    assert len(secure_peer.got) == 1


async def test_name_in_the_certificate_must_fit(
    secure_peer: Peer, sink: Callable[..., WebhookSink], certificates: Path
) -> None:
    webhook = sink(url=f"https://localhost:{secure_peer.port}/", ca_file=str(certificates / "ca.pem"))
    with pytest.raises(SinkError, match="certificate"):
        await webhook.deliver(ALERT)
    assert not secure_peer.got


async def test_hanging_tls_peer_is_left_in_time(
    secure_peer: Peer, sink: Callable[..., WebhookSink], certificates: Path
) -> None:
    url = f"https://127.0.0.1:{secure_peer.port}/"
    webhook = sink(url=url, ca_file=str(certificates / "ca.pem"), timeout_s=0.5)
    secure_peer.script = [secure_peer.hang]
    with pytest.raises(SinkError, match="within"):
        await webhook.deliver(ALERT)
    assert await asyncio.to_thread(secure_peer.ended.wait, 10)


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_bad_ca_file_is_named(tmp_path: Path, sink: Callable[..., WebhookSink], content: str | None) -> None:
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_text(content)
    with pytest.raises(SinkError, match="ca_file = ") as caught:
        await sink(url="https://127.0.0.1:1/", ca_file=str(ca_file)).deliver(ALERT)
    assert str(ca_file) in caught.value.message


# ---- settings -------------------------------------------------------------------------------------------------------


async def test_secret_from_a_file_is_its_first_line(
    tmp_path: Path, peer: Peer, sink: Callable[..., WebhookSink]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from a file\nnot this\n")
    await sink(secret_env="", secret_file=str(secret)).deliver(ALERT)
    _, headers, body = peer.got[0]
    assert readme_verify()(b"from a file", body, headers["x-millhand-signature"])


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"\n\n", "holds no secret"), (b"", "holds no secret"), (b"\xff\xfe", "not UTF-8")],
)
def test_secret_file_that_is_missing_or_useless_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        WebhookSink(WebhookConfig(url="http://plant.example/", secret_file=secret))
    assert str(secret) in caught.value.message
    assert caught.value.hint


def test_secret_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_SECRET", raising=False)
    with pytest.raises(ConfigError, match="'HOOK_SECRET'"):
        WebhookSink(WebhookConfig(url="http://plant.example/", secret_env="HOOK_SECRET"))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"url": "plant.example/hook", "secret_env": "S"}, "absolute"),
        ({"url": "ftp://plant.example/", "secret_env": "S"}, "absolute"),
        ({"url": "http://plant.example:99999/", "secret_env": "S"}, "(?i)port"),
        ({"url": "http://me:pass@plant.example/", "secret_env": "S"}, "password"),
        ({"url": "http://plant.example/"}, "exactly one"),
        ({"url": "http://plant.example/", "secret_env": "S", "secret_file": "f"}, "exactly one"),
        ({"url": "http://plant.example/", "secret_env": "S", "record": ["alert"]}, "did you mean 'records'"),
        ({"url": "http://plant.example/", "secret_env": "S", "timeout_s": 0}, "timeout_s"),
    ],
)
def test_wrong_table_is_refused_naming_the_key(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(WebhookConfig, table, "[plugins.webhook]")
