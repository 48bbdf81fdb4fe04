"""The node's language model across its processes: what is told, and what follows a change. Stand-in processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from server_kit import StandIn, gone, server_of

from millhand.diagnosis import diagnose
from millhand.errors import InputError, LanguageError, ModelError
from millhand.language.launch import Launch
from millhand.language.library import LanguageManifest, LanguageModel
from millhand.language.plan import Plan
from millhand.language.servers import LanguageServers
from millhand.language.settings import LanguageSettings

Until = Callable[..., Any]
QUICK = LanguageSettings(model="m", check_s=0.1, restart_delay_s=0.05, stop_s=5, start_timeout_s=60)


class Node:
    """Plans for a stand-in, in as many processes as `replicas` says; or the fault that is set."""

    def __init__(self, folder: Path) -> None:
        self.standin = StandIn("echo", folder)
        self.model = LanguageModel("m", folder, LanguageManifest(format="gguf", file=Path(), parameters=7))
        self.replicas = 2
        self.fault: Exception | None = None

    def plan(self) -> Plan:
        if self.fault is not None:
            raise self.fault
        launch = Launch(name="m", model=self.model.path, port=0, context_tokens=512)
        return Plan(self.model, self.standin, (launch,) * self.replicas, ["standin: it is a test"])


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
async def servers(node: Node, tmp_path: Path) -> AsyncIterator[LanguageServers]:
    made = LanguageServers(QUICK, node.plan, tmp_path / "log")
    made.start()
    yield made
    await made.stop()


def told(servers: LanguageServers) -> dict[str, Any]:
    (model,) = servers.routes()["models"]
    return dict(model)


async def test_two_processes_and_what_is_told_of_them(servers: LanguageServers, until: Until) -> None:
    """One that dies takes its address along; the other answers on, and the stream tells of each change."""
    assert servers.state == "starting"
    seen: list[int] = []

    async def follow() -> None:
        async for routes in servers.watch_routes():
            seen.append(len(routes["models"][0]["urls"]))  # noqa: PERF401 - it never ends

    following = asyncio.create_task(follow())
    await until(lambda: len(told(servers)["urls"]) == 2, "both")
    first, second = servers.replicas
    assert (first.name, second.name) == ("m", "m-2")
    assert first.log_path != second.log_path
    server_of(second.pid).kill()
    await until(lambda: second.restarts == 1 and len(told(servers)["urls"]) == 2, "both again")
    await until(lambda: seen[-1] == 2 and 1 in seen[seen.index(2) :], "the stream")
    assert told(servers)["state"] == "ready" and told(servers)["parameters"] == 7
    assert told(servers)["abilities"] == ["chat", "json_schema", "usage"]  # it chats, so it does not embed
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


async def test_the_agents_client_asks_them_in_turn(servers: LanguageServers, until: Until) -> None:
    client = servers.client()
    with pytest.raises(LanguageError, match="the language model is starting"):
        await client([{"role": "user", "content": "hello"}])
    await until(lambda: len(told(servers)["urls"]) == 2, "both")
    place = servers._next_place
    assert {place().url for _ in range(4)} == set(told(servers)["urls"])
    keys = told(servers)["keys"]
    assert len(set(keys.values())) == 2 and all("keys" not in shown for shown in (servers.show(),))
    assert {place().headers["Authorization"] for _ in range(4)} == {f"Bearer {key}" for key in keys.values()}
    schema = {"type": "object"}
    asked = json.loads(await client([{"role": "user", "content": "hello"}], schema=schema, max_tokens=5))
    assert asked["model"] == "m" and asked["max_tokens"] == 5 and asked["temperature"] == 0
    assert asked["response_format"]["json_schema"]["schema"] == schema
    assert "seed" not in asked  # the stand-in does not say that it has seeds


async def test_one_or_all_are_started_anew(servers: LanguageServers, node: Node, until: Until) -> None:
    await until(lambda: len(told(servers)["urls"]) == 2, "both")
    with pytest.raises(InputError, match="no language server is called 'x'") as refused:
        await servers.restart("x")
    assert refused.value.hint == "one of: m, m-2"
    before = [replica.pid for replica in servers.replicas]
    assert await servers.restart("m-2") == ["m-2"]
    await until(lambda: len(told(servers)["urls"]) == 2, "both again")
    after = [replica.pid for replica in servers.replicas]
    assert after[0] == before[0] and after[1] != before[1]
    node.replicas = 1
    assert await servers.restart() == ["m"]
    await until(lambda: len(told(servers)["urls"]) == 1, "the new plan")
    assert len(servers.replicas) == 1


async def test_a_plan_that_cannot_be_is_told_and_made_again(tmp_path: Path, until: Until) -> None:
    node = Node(tmp_path)
    node.fault = ModelError("language model 'm' is not here", hint="add it")
    servers = LanguageServers(QUICK, node.plan, tmp_path / "log")
    servers.start()
    try:
        await until(lambda: servers.state == "failed", "the fault")
        assert (told(servers)["reason"], told(servers)["hint"]) == ("language model 'm' is not here", "add it")
        with pytest.raises(LanguageError, match="is failed: language model 'm' is not here"):
            await servers.client()([{"role": "user", "content": "hello"}])
        node.fault = ZeroDivisionError("a plugin's")
        await until(lambda: "cannot be planned: ZeroDivisionError: a plugin's" in told(servers)["reason"], "the other")
        node.fault = None
        await until(lambda: servers.state == "ready", "ready")
        assert told(servers)["reason"] == ""
    finally:
        await servers.stop()


async def test_other_settings_end_the_processes_and_none_ends_all(servers: LanguageServers, until: Until) -> None:
    await until(lambda: len(told(servers)["urls"]) == 2, "both")
    children = [server_of(replica.pid) for replica in servers.replicas]
    await servers.exchange_settings(QUICK)
    assert not any(map(gone, children))
    await servers.exchange_settings(LanguageSettings())
    assert all(map(gone, children))
    assert servers.state == "off" and servers.routes() == {"models": []}
    with pytest.raises(InputError, match="no language model is configured"):
        await servers.restart()
    with pytest.raises(LanguageError, match="no language model is configured"):
        await servers.client()([{"role": "user", "content": "hello"}])


def test_check_says_what_would_serve_and_what_does_not_fit(tmp_path: Path) -> None:
    """Nothing is started for it: the files only look like models."""
    for name, gib in (("small", 0.001), ("large", 8000)):
        folder = tmp_path / "data" / "language" / name
        folder.mkdir(parents=True)
        (folder / "language.toml").write_text('format = "gguf"\nfile = "m.gguf"\n')
        with (folder / "m.gguf").open("wb") as file:
            file.write(b"GGUF")
            file.truncate(int(gib * (1 << 30)))

    def findings(model: str) -> dict[str, Any]:
        config = tmp_path / "millhand.toml"
        config.write_text(
            f'[node]\ndata_dir = "{tmp_path}/data"\nrun_dir = "{tmp_path}/run"\n[http]\nenabled = false\n'
            f'[language]\nmodel = "{model}"\n[plugins.llamacpp]\nuse = "xllamacpp"\n'
        )
        return {finding.name: dataclasses.asdict(finding) for finding in diagnose(config)}

    found = findings("small")
    assert found["language"]["level"] == "ok"
    assert found["language"]["message"].startswith("'small' in 1 process; ")
    assert found["language"]["message"].endswith("xllamacpp, on the CPU")
    assert "language memory" not in found
    assert findings("large")["language memory"]["level"] == "error"
    missing = findings("nowhere")["language"]
    assert missing["level"] == "error" and "millhand model add nowhere" in missing["hint"]
