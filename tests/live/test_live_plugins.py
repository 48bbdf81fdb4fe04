"""Plugins that fail in every way: the daemon starts, says so, and the other assets run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_kit import HTTP_OFF, cli_json, ended, file_asset, state_of, write_rows

from millhand.testing import Agent

ADAPTER = """
import asyncio, threading, time
from pydantic import BaseModel
from millhand.clock import stamp
from millhand.hookspecs import hookimpl
from millhand.records import Batch, Reading


class Options(BaseModel):
    pass


class Kind:
    name = "{name}"
    options = Options

    def create(self, asset, options):
        return Adapter()


class Adapter:
    async def open(self, cursor):
        pass

    async def batches(self):
        {body}
        yield Batch()

    async def close(self):
        pass


@hookimpl
def millhand_adapters(config):
    return [Kind()]
"""
MODULES = {
    "needy": "import a_library_that_nobody_has\n",
    "crashing": "raise RuntimeError('no licence dongle')\n",
    "raising": """
from millhand.hookspecs import hookimpl

@hookimpl
def millhand_extractors(config):
    raise ValueError("extractors.json is empty")

@hookimpl
def millhand_sinks(config):
    return 7
""",
    "blocking": ADAPTER.format(name="blocking", body="await asyncio.to_thread(threading.Event().wait)"),
    "faulty": ADAPTER.format(name="faulty", body='raise ZeroDivisionError("register 7")'),
    "leaving": ADAPTER.format(name="leaving", body="raise SystemExit(3)"),
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which these modules are installed as plugins of one package."""
    folder = tmp_path / "site"
    information = folder / "field_plugins-1.4.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: field-plugins\nVersion: 1.4\n")
    points = [f"{name} = field_{name}" for name in MODULES]
    (information / "entry_points.txt").write_text("[millhand]\n" + "\n".join(points) + "\n")
    for name, text in MODULES.items():
        (folder / f"field_{name}.py").write_text(text)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path}


def asset(name: str, adapter: str) -> str:
    return f'\n[[assets]]\nname = "{name}"\nadapter = "{adapter}"\n'


def plugins(agent: Agent) -> dict[str, dict[str, Any]]:
    return {plugin["name"]: plugin for plugin in agent.call("plugin.list")}


def test_broken_plugins_are_shown_and_the_rest_runs(
    tmp_path: Path, environment: dict[str, str], millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 100)
    agent = millhand_agent(
        HTTP_OFF
        + "[plugins.needy]\n[plugins.crashing]\n[plugins.raising]\n[plugins.absent]\n"
        + file_asset(recording)
        + asset("drill", "needy"),
        environment=environment,
    )
    agent.wait(ended(agent, "press"), "the end of the recording")
    assert state_of(agent, "press")["counters"]["readings"] == 200
    found = plugins(agent)
    assert (found["needy"]["state"], found["needy"]["distribution"]) == ("failed", "field-plugins")
    assert "a_library_that_nobody_has" in found["needy"]["error"]
    assert found["needy"]["hint"].startswith("install the package that brings 'a_library_that_nobody_has'")
    assert (found["crashing"]["state"], found["crashing"]["error"]) == ("failed", "RuntimeError: no licence dongle")
    assert found["raising"]["state"] == "degraded"
    assert "millhand_" in found["raising"]["error"]
    assert found["absent"]["state"] == "failed"
    drill = state_of(agent, "drill")
    assert (drill["state"], "adapter = 'needy' is not known" in drill["error"]) == ("waiting", True)
    # The CLI says the same, in its own process.
    code, listed = cli_json(agent, "plugin", "list")
    assert code == 0
    assert {p["name"]: p["state"] for p in listed}["needy"] == "failed"
    code, checked = cli_json(agent, "check")
    assert code == 4
    assert {f["name"]: f["level"] for f in checked["findings"]}["plugin crashing"] == "error"


def test_a_required_plugin_that_fails_ends_the_start(
    environment: dict[str, str], millhand_agent: Callable[..., Agent]
) -> None:
    agent = millhand_agent("[plugins.needy]\nrequired = true\n", environment=environment, started=False)
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(60) == 1
    assert "Error: plugin 'needy' is required and could not be loaded" in agent.log()
    assert "Try: install the package" in agent.log()
    assert "Traceback" not in agent.log()


def test_a_failed_plugin_is_tried_again(
    tmp_path: Path, environment: dict[str, str], millhand_agent: Callable[..., Agent]
) -> None:
    agent = millhand_agent(HTTP_OFF + asset("drill", "needy"), environment=environment)
    assert state_of(agent, "drill")["state"] == "waiting"
    library = tmp_path / "site" / "a_library_that_nobody_has.py"
    library.write_text("")
    (tmp_path / "site" / "field_needy.py").write_text(
        "import a_library_that_nobody_has\n" + ADAPTER.format(name="needy", body="yield Batch()")
    )
    agent.wait(lambda: plugins(agent)["needy"]["state"] == "loaded", "the plugin", 30)
    agent.wait(lambda: state_of(agent, "drill")["counters"]["batches"] == 2, "the asset's batches")


def test_a_blocked_adapter_stalls_neither_its_neighbour_nor_the_stop(
    tmp_path: Path, environment: dict[str, str], millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 100)
    agent = millhand_agent(
        HTTP_OFF + file_asset(recording, speed=1.0) + asset("drill", "blocking") + "silence_s = 0.3\n",
        environment=environment,
    )
    agent.wait(ended(agent, "press"), "the end of the recording")
    drill = agent.wait(lambda: state_of(agent, "drill")["error"] and state_of(agent, "drill"), "its silence said")
    assert (drill["state"], drill["hint"] != "") == ("silent", True)
    started = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - started < 15


def test_a_faulty_adapter_backs_off(
    tmp_path: Path, environment: dict[str, str], millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 100)
    started = time.monotonic()
    agent = millhand_agent(
        HTTP_OFF + file_asset(recording) + asset("drill", "faulty") + asset("lathe", "leaving"), environment=environment
    )
    agent.wait(ended(agent, "press"), "the end of the recording")
    for name, what in (("drill", "ZeroDivisionError: register 7"), ("lathe", "the adapter tried to end the agent")):
        status = agent.wait(lambda name=name: state_of(agent, name)["restarts"] >= 4 and state_of(agent, name), name)
        assert status["state"] == "failing"
        assert what in status["error"]
        assert status["hint"]
        # Three pauses of 0.2, 0.4 and 0.8 s, a fifth shorter at most.
        assert time.monotonic() - started > 0.8 * 1.4
        assert status["restarts"] < 12
    assert agent.stop() == 0
