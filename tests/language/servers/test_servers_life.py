"""One process of a language server: started, proved, watched, started again, stopped. Real processes, made to fail."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_kit import PROGRAM, StandIn, gone, server_of, session_of

from millhand.errors import LanguageError
from millhand.language import replica as replica_module
from millhand.language.exchange import bearer
from millhand.language.launch import Command, Launch, ServerFigures
from millhand.language.proving import prove
from millhand.language.replica import Replica

Start = Callable[..., Replica]
Until = Callable[..., Any]


async def test_starts_proves_and_leaves_nothing_behind(replica: Start, until: Until) -> None:
    """A child that left the session is ended too."""
    server = replica("children")
    assert server.state == "starting"
    await until(lambda: server.state == "ready", "ready")
    assert server.url.startswith("http://127.0.0.1:")
    assert server.proof is not None and (server.proof.text, server.proof.tokens) == ("I am ready", 3)
    keeper = server.pid
    child = server_of(keeper)
    everything = [psutil.Process(keeper), child, *child.children(recursive=True)]
    assert len(everything) == 3
    await server.stop()
    assert all(map(gone, everything))
    assert not session_of(keeper)
    assert server.url == ""


async def test_killed_it_comes_back_at_another_place(replica: Start, until: Until) -> None:
    server = replica(restart_delay_s=0.5)
    await until(lambda: server.state == "ready", "ready")
    first = server.url
    server_of(server.pid).kill()
    await until(lambda: server.state == "restarting", "the death")
    assert server.reason == "died of SIGKILL" and server.hint.startswith("most likely memory ran out")
    assert server.url == ""
    await until(lambda: server.restarts == 1 and server.state == "ready", "ready again")
    assert server.url and server.url != first


async def test_nobody_else_may_ask_it(replica: Start, until: Until) -> None:
    """The key is new at each start, and stands neither in arguments nor in what is shown."""
    server = replica()
    await until(lambda: server.state == "ready" and server.figures.steps == 7, "ready, and its figures")
    first, child = server.api_key, server_of(server.pid)
    assert len(first) > 40
    with pytest.raises(LanguageError, match="401"):
        await prove(server.url, "m", (), False, 10, {})
    await prove(server.url, "m", (), False, 10, bearer(first))
    assert first not in str([*child.cmdline(), *psutil.Process(server.pid).cmdline(), server.to_dict()])
    assert first not in repr(server.launch)
    await server.restart()
    await until(lambda: server.state == "ready", "ready again")
    assert server.api_key and server.api_key != first


async def test_a_keeper_that_is_killed_takes_the_server_along(replica: Start, until: Until) -> None:
    server = replica()
    await until(lambda: server.state == "ready", "ready")
    keeper, child = server.pid, server_of(server.pid)
    os.kill(keeper, signal.SIGKILL)
    await until(lambda: server.restarts == 1 and server.state == "ready", "ready again")
    assert gone(child)


async def test_a_frozen_server_is_killed_and_started_again(replica: Start, until: Until) -> None:
    server = replica(hang_s=1)
    await until(lambda: server.state == "ready", "ready")
    child = server_of(server.pid)
    child.suspend()
    await until(lambda: server.restarts == 1 and server.state == "ready", "ready again")
    assert gone(child)


async def test_one_that_gets_nowhere_with_its_requests_hangs(replica: Start, until: Until) -> None:
    """It is well, says /health; its figures say that a request runs and nothing is computed."""
    server = replica("stuck", hang_s=1)
    reasons: list[str] = []
    await until(lambda: server.state == "ready", "ready")
    await until(lambda: reasons.append(server.reason) or "got nowhere with 1 requests" in server.reason, "the verdict")
    assert "hangs" in server.reason


@pytest.mark.parametrize(
    ("ways", "reason"),
    [
        ("broken", "it answered 500: the chat template fails at line 3"),
        ("garbage", "what is no JSON"),
        ("empty", "its completion is empty"),
        ("shapeless", "its answer is no completion"),
        ("uncounted", "counts None tokens"),
        ("overcounted", "counts 5000 tokens"),
        ("list", "its answer is no object"),
    ],
)
async def test_one_that_lies_about_its_health_is_not_believed(
    replica: Start, until: Until, ways: str, reason: str
) -> None:
    server = replica(ways, restart_delay_s=30)
    await until(lambda: server.state == "failed", "failed")
    assert reason in server.reason
    assert server.hint and server.url == "" and server.pid == 0


@pytest.mark.parametrize(
    ("ways", "within_s", "reason"),
    [
        ("silent", 4, "says that it is well, but gave no completion within 4 s"),
        ("sick", 1, "was not well within 1 s"),
        ("deaf", 1, "was not well within 1 s"),
    ],
)
async def test_one_that_is_silent_or_sick_runs_out_of_time(
    replica: Start, until: Until, ways: str, within_s: float, reason: str
) -> None:
    server = replica(ways, start_timeout_s=within_s, restart_delay_s=30)
    await until(lambda: server.state == "failed", "failed")
    assert server.reason == f"it {reason}"
    assert "start_timeout_s" in server.hint


async def test_an_embedding_model_is_proved_by_an_embedding(replica: Start, until: Until, tmp_path: Path) -> None:
    launch = Launch(name="m", model=tmp_path, port=0, context_tokens=512, embeddings=True)
    server = replica(launch=launch)
    await until(lambda: server.state == "ready", "ready")
    assert server.proof is not None and server.proof.tokens == 2
    await server.stop()
    server = replica("empty", launch=launch, restart_delay_s=30)
    await until(lambda: server.state == "failed", "failed")
    assert "embedding is empty, zero or not finite" in server.reason


async def test_one_that_exits_says_its_last_words_and_is_tried_until_it_is_mended(
    replica: Start, until: Until, tmp_path: Path
) -> None:
    standin = StandIn("exits", tmp_path)
    server = replica(server=standin)
    await until(lambda: server.restarts >= 2 and server.state == "failed", "failed again")
    assert server.reason == "it exited with status 3 before it was ready: error: the model is broken"
    assert str(server.log_path) in server.hint
    assert "bye" in server.log_path.with_suffix(".log.1").read_text()  # of the start before
    standin.behave("")
    await until(lambda: server.state == "ready", "ready")


async def test_a_plugin_that_raises_is_told_and_leaves_no_process(replica: Start, until: Until, tmp_path: Path) -> None:
    class Faulty(StandIn):
        def figures(self, metrics: str) -> ServerFigures:
            raise ZeroDivisionError("no such column")

    server = replica(server=Faulty("", tmp_path), restart_delay_s=30)
    await until(lambda: server.state == "ready", "ready")
    keeper = server.pid
    await until(lambda: server.state == "failed", "failed")
    assert server.reason == "the plugin of 'standin' failed: ZeroDivisionError: no such column"
    assert not session_of(keeper)


async def test_a_program_that_is_not_there(replica: Start, until: Until, tmp_path: Path) -> None:
    class Missing(StandIn):
        def command(self, launch: Launch) -> Command:
            return Command(("/nowhere/llama-server",))

    server = replica(server=Missing("", tmp_path), restart_delay_s=30)
    await until(lambda: server.state == "failed", "failed")
    assert "'/nowhere/llama-server' cannot be started: No such file or directory" in server.reason


async def test_a_restart_does_not_wait_for_the_pause(replica: Start, until: Until, tmp_path: Path) -> None:
    standin = StandIn("exits", tmp_path)
    server = replica(server=standin, restart_delay_s=3600, restart_delay_cap_s=3600)
    await until(lambda: server.state == "failed", "failed")
    standin.behave("")
    await server.restart()
    await until(lambda: server.state == "ready", "ready")
    assert server.restarts == 1


async def test_a_flood_of_output_stays_within_its_bounds(replica: Start, until: Until) -> None:
    """It neither fills the disk nor stops the server."""
    cap = 1 << 16
    server = replica("floods", log_bytes_cap=cap)
    await until(lambda: server.state == "ready", "ready")
    flooder = server_of(server.pid)
    begun = flooder.cpu_times().user
    await until(lambda: flooder.cpu_times().user - begun > 0.3, "a good deal of noise")
    logs = list(server.log_path.parent.iterdir())
    assert server.log_path in logs
    assert sum(path.stat().st_size for path in logs) <= 2 * cap + 4096
    assert server.state == "ready" and server.restarts == 0


@pytest.fixture
def stranger() -> Iterator[int]:
    """Another process' server, which says that it is well to whoever asks."""

    class Well(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Well)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ways", ["", "deaf"])
async def test_a_port_that_is_taken_meanwhile_is_given_up_for_another(
    replica: Start, until: Until, tmp_path: Path, stranger: int, monkeypatch: pytest.MonkeyPatch, ways: str
) -> None:
    """Whether the server cannot bind, or does not come to it: the stranger's answers are not believed."""
    ports, free = [stranger], replica_module.free_port
    monkeypatch.setattr(replica_module, "free_port", lambda: ports.pop() if ports else free())
    standin = StandIn(ways, tmp_path)
    server = replica(server=standin, restart_delay_s=0.5)
    await until(lambda: server.state == "failed", "failed")
    assert (
        "Address already in use" in server.reason or f"another process answers on its port {stranger}" in server.reason
    )
    standin.behave("")
    await until(lambda: server.state == "ready", "ready")
    assert not server.url.endswith(f":{stranger}")


def test_it_ends_with_the_daemon_whatever_ends_that(tmp_path: Path) -> None:
    (tmp_path / "ways.txt").write_text("children")
    program = f"""
        import asyncio, sys
        from pathlib import Path
        from millhand.language.launch import Command
        from millhand.language.process import ServerProcess, free_port

        async def main():
            port = free_port()
            command = Command((sys.executable, {os.fspath(PROGRAM)!r}, {os.fspath(tmp_path / "ways.txt")!r}, str(port)))
            process = await ServerProcess.start(
                command, port, Path({os.fspath(tmp_path / "m.log")!r}), log_bytes_cap=4096, stop_s=5
            )
            print(process.pid, flush=True)
            await asyncio.sleep(3600)

        asyncio.run(main())
    """
    daemon = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    keeper = psutil.Process(int(daemon.stdout.readline()))
    end_s = time.monotonic() + 30
    while len(family := keeper.children(recursive=True)) < 2:
        assert time.monotonic() < end_s
        time.sleep(0.02)
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    end_s = time.monotonic() + 30
    while not all(map(gone, [keeper, *family])):
        assert time.monotonic() < end_s
        time.sleep(0.02)
