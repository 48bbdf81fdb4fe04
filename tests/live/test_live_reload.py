"""Start, reload and stop of a real daemon: signals, service manager, second daemon, what a killed one leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from live_kit import (
    HTTP_ANY,
    HTTP_OFF,
    Site,
    drained,
    ended,
    file_asset,
    http_url,
    rig_asset,
    state_of,
    write_engine,
    write_rows,
)

from millhand import __version__
from millhand.diagnosis import diagnose
from millhand.testing import Agent, wait_until

FOLLOW = "follow = true\npoll_ms = 20"


def assets(agent: Agent) -> set[str]:
    return {status["asset"] for status in agent.call("asset.list")}


def stored(agent: Agent, asset: str) -> list[float]:
    """Every `sequence` that the node's own store holds."""
    chunks = agent.client.stream("readings.export", asset=asset, names=["sequence"])
    return [row[3] for chunk in chunks for row in chunk]


def test_assets_come_change_and_go_by_sighup(tmp_path: Path, millhand_agent: Callable[..., Agent]) -> None:
    press, drill = write_rows(tmp_path / "press.csv", 50), write_rows(tmp_path / "drill.csv", 50)
    other = write_rows(tmp_path / "other.csv", 80, first=500)
    engine = write_engine(tmp_path / "engine.csv", 40)
    stays = file_asset(press, "press", more=FOLLOW)
    agent = millhand_agent(HTTP_OFF + stays + file_asset(drill, "drill", more=FOLLOW))
    agent.wait(lambda: state_of(agent, "drill")["counters"]["readings"] == 100, "the drill's readings")
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 100, "the press' readings")

    # One comes, with a plugin and a model that were not needed before; one changes; one stays as it is.
    changed = file_asset(other, "drill", more='on_change = "restart"')
    agent.write_config(
        HTTP_OFF + "[plugins.turbofan]\n" + stays + changed + file_asset(engine, "engine", models=["turbofan-rul"])
    )
    agent.reload()
    agent.wait(lambda: assets(agent) == {"press", "drill", "engine"}, "the new asset")
    agent.wait(ended(agent, "drill", "engine"), "the ends of both")
    assert state_of(agent, "engine")["counters"]["predictions"] == 40
    assert state_of(agent, "engine")["error"] == ""
    assert Counter(stored(agent, "drill")) == Counter([*range(50), *range(500, 580)])
    # The one that stayed was not touched: its counters went on.
    write_rows(press, 10, first=50)
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 120, "rows behind the reload")

    agent.write_config(HTTP_OFF + stays)
    agent.reload()
    agent.wait(lambda: assets(agent) == {"press"}, "the others gone")
    assert stored(agent, "press") == list(range(60))
    assert Counter(stored(agent, "drill")) == Counter([*range(50), *range(500, 580)])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('[[assets]]\nname = "drill"\nadaptor = "file"\n', "did you mean 'adapter'?"),
        ("[telemetry\n", "millhand.toml"),
        ("[plugins.absent]\nrequired = true\n", "plugin 'absent' is required"),
    ],
)
def test_an_invalid_file_changes_nothing(
    tmp_path: Path, millhand_agent: Callable[..., Agent], broken: str, said: str
) -> None:
    press, drill = write_rows(tmp_path / "press.csv", 50), write_rows(tmp_path / "drill.csv", 50)
    stays = file_asset(press, "press", more=FOLLOW)
    agent = millhand_agent(HTTP_OFF + stays)
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 100, "the press' readings")
    agent.write_config(HTTP_OFF + file_asset(drill, "lathe") + broken)
    agent.reload()
    agent.wait(lambda: "the configuration was not read again" in agent.log(), "the line in the log")
    assert said in agent.log()
    assert assets(agent) == {"press"}
    write_rows(press, 10, first=50)
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 120, "rows behind the reload")
    # Mended, the next reload works.
    agent.write_config(HTTP_OFF + stays + file_asset(drill, "lathe"))
    agent.reload()
    agent.wait(lambda: assets(agent) == {"press", "lathe"}, "the new asset")


def not_taken_up(agent: Agent) -> list[str]:
    """What `check` says of a daemon that goes by something else than the configuration."""
    command = [sys.executable, "-m", "millhand", "--config", str(agent.config_path), "check", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=agent.environment)
    found = json.loads(done.stdout)["findings"]
    return [one["message"] for one in found if one["name"] == "daemon" and one["level"] == "warning"]


def test_check_tells_what_a_running_agent_has_not_taken_up(
    tmp_path: Path, millhand_agent: Callable[..., Agent]
) -> None:
    """Until a reload, or where it takes a restart; the options of a plugin that is loaded wait for one as well."""
    log = "[log]\nlevel = 'info'\n"
    agent = millhand_agent(HTTP_OFF + log + "[plugins.turbofan]\nenabled = false\n[plugins.modbus]\n")
    assert not_taken_up(agent) == []
    limits = "[store]\nset_aside_files_cap = 5\n"
    modbus = "[plugins.modbus]\nrequired = true\n"
    press = file_asset(write_rows(tmp_path / "press.csv", 10), "press")
    new = HTTP_OFF + log.replace("info", "debug") + limits + "[plugins.turbofan]\n" + modbus + press
    agent.write_config(new)
    said = "it does not go yet by what the configuration says now: "
    restart = f"{said}[store], [plugins.modbus]"
    assert not_taken_up(agent) == [f"{said}[log], [[assets]], [plugins.file], [plugins.turbofan]", restart]
    agent.reload()
    agent.wait(lambda: "[plugins.modbus] changed: this takes effect at the next restart" in agent.log(), "the reload")
    agent.wait(lambda: not_taken_up(agent) == [restart], "what takes a restart alone")
    states = {plugin["name"]: plugin["state"] for plugin in agent.call("plugin.list")}
    assert states["turbofan"] == "loaded"
    assert agent.stop() == 0
    agent.start()
    assert not_taken_up(agent) == []
    # An asset that goes takes its adapter along; models of a plugin that is gone are served until a restart.
    agent.write_config(HTTP_OFF + log)
    agent.reload()
    agent.wait(lambda: not_taken_up(agent) == [f"{said}[store], [plugins.turbofan]"], "what is left of the plugins")


def test_check_tells_of_an_older_agent_and_of_one_whose_file_is_broken(
    tmp_path: Path, millhand_agent: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = millhand_agent(HTTP_OFF)
    assert agent.process is not None
    copy = tmp_path / "copy.toml"
    copy.write_text(agent.config_path.read_text())

    def said() -> list[tuple[str, str]]:
        found = [one for one in diagnose(copy) if one.name == "daemon" and one.level == "warning"]
        return [(one.message, one.hint) for one in found]

    assert said() == []
    agent.write_config(HTTP_OFF + "[stor]\n")
    ((message, hint),) = said()
    assert message.startswith("it cannot read its configuration again: ")
    assert str(agent.config_path) in message and "'stor'" in message and hint
    monkeypatch.setattr("millhand.diagnosis.__version__", "9.9.9")
    ((message, hint),) = said()
    assert message == f"it runs version {__version__}, installed is 9.9.9"
    assert hint.endswith(f"kill {agent.process.pid}, and start it again")


def test_what_was_queued_before_a_broker_was_named_arrives(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent]
) -> None:
    recording = write_rows(tmp_path / "press.csv", 300)
    press = file_asset(recording, "press", more=FOLLOW)
    agent = millhand_agent(HTTP_OFF + press)
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 600, "the readings")
    assert agent.call("telemetry.status") == {"enabled": False}

    agent.write_config(HTTP_OFF + site.telemetry + press)
    agent.reload()
    agent.wait(lambda: agent.call("telemetry.status")["enabled"], "the publisher")
    write_rows(recording, 100, first=300)
    agent.wait(lambda: len(site.readings("press")) >= 400, "all rows at the hub")
    assert sorted(site.readings("press")) == list(range(400))

    # Off and on again: what comes in between waits.
    agent.write_config(HTTP_OFF + press)
    agent.reload()
    agent.wait(lambda: not agent.call("telemetry.status")["enabled"], "the publisher's end")
    write_rows(recording, 50, first=400)
    agent.wait(lambda: state_of(agent, "press")["counters"]["readings"] == 900, "the readings")
    agent.write_config(HTTP_OFF + site.telemetry + press)
    agent.reload()
    agent.wait(lambda: len(site.readings("press")) >= 450, "the last rows at the hub")
    agent.wait(lambda: drained(agent), "the acknowledgement")
    assert sorted(site.readings("press")) == list(range(450))


def test_sigterm_under_load_is_quick_and_loses_nothing(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent]
) -> None:
    rows = 1200
    recording, engine = write_rows(tmp_path / "press.csv", rows), write_engine(tmp_path / "engine.csv", rows)
    agent = millhand_agent(
        HTTP_ANY
        + site.telemetry
        + "[plugins.turbofan]\n"
        + file_asset(recording, "press", more="batch_rows = 1")
        + file_asset(engine, "engine", models=["turbofan-rul"], more="batch_rows = 5")
        + rig_asset("skid", speed="full")
    )
    agent.wait(lambda: state_of(agent, "engine")["counters"]["predictions"] >= 50, "some predictions")
    started = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - started < 5
    assert list(agent.run_dir.iterdir()) == []
    agent.start()
    assert 50 <= len(agent.call("prediction.list", asset="engine", limit=10_000)) < rows
    agent.wait(ended(agent, "press", "engine", "skid"), "the ends of all", 60)
    assert stored(agent, "press") == stored(agent, "engine") == list(range(rows))
    assert len(agent.call("prediction.list", asset="engine", limit=10_000)) == rows
    agent.wait(lambda: drained(agent), "the acknowledgement", 60)
    assert sorted(site.readings("press")) == sorted(site.readings("engine")) == list(range(rows))


def second_daemon(agent: Agent, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millhand", "--config", str(agent.config_path), "run"]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**agent.environment, **environment},
    )


def test_a_second_daemon_is_refused_and_the_first_is_unharmed(
    tmp_path: Path, millhand_agent: Callable[..., Agent]
) -> None:
    engine = write_engine(tmp_path / "engine.csv", 40)
    agent = millhand_agent(
        HTTP_ANY + "[plugins.turbofan]\n" + file_asset(engine, "engine", models=["turbofan-rul"], more=FOLLOW)
    )
    agent.wait(lambda: state_of(agent, "engine")["counters"]["predictions"] == 40, "the predictions")
    sockets = set(agent.run_dir.iterdir())
    for environment in ({}, {"MILLHAND_NODE__DATA_DIR": str(tmp_path / "elsewhere")}):
        second = second_daemon(agent, **environment)
        assert second.returncode == 1
        assert "another" in second.stderr
        assert "Try: stop " in second.stderr
        assert "Traceback" not in second.stderr and "stopped" not in second.stderr
    assert set(agent.run_dir.iterdir()) == sockets
    # Another run_dir, the same store.
    second = second_daemon(agent, MILLHAND_NODE__RUN_DIR=str(tmp_path / "run"))
    assert second.returncode == 1
    assert "in use by another process" in second.stderr
    with urllib.request.urlopen(f"{http_url(agent)}/v2/health/ready", timeout=10) as answer:
        assert json.load(answer) == {"ready": True}
    ready = urllib.request.urlopen(f"{http_url(agent)}/v2/models/turbofan-rul/ready", timeout=10)
    assert json.load(ready)["ready"]
    ready.close()
    assert agent.stop() == 0


def test_what_a_killed_daemon_leaves_behind_is_cleared(tmp_path: Path, millhand_agent: Callable[..., Agent]) -> None:
    engine = write_engine(tmp_path / "engine.csv", 40)
    agent = millhand_agent(HTTP_ANY + "[plugins.turbofan]\n" + file_asset(engine, "engine", models=["turbofan-rul"]))
    assert agent.process is not None
    family = psutil.Process(agent.process.pid).children(recursive=True)
    assert len(family) >= 2
    agent.kill()
    assert any(path.name.startswith("worker-") for path in agent.run_dir.iterdir())
    assert (agent.run_dir / "control.sock").exists()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    agent.start()
    agent.wait(ended(agent, "engine"), "the end of the recording")
    assert len(list(agent.run_dir.glob("worker-*.sock"))) == 1
    assert agent.stop() == 0
    assert list(agent.run_dir.iterdir()) == []


@pytest.fixture
def service_manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(tmp_path / "notify"))
        manager.settimeout(20)
        yield manager


def test_the_service_manager_is_told(
    tmp_path: Path, service_manager: socket.socket, millhand_agent: Callable[..., Agent]
) -> None:
    agent = millhand_agent(
        HTTP_OFF,
        environment={"NOTIFY_SOCKET": service_manager.getsockname(), "WATCHDOG_USEC": "600000"},
        started=False,
    )
    agent.start(wait=False)

    def next_line(prefix: str) -> str:
        while not (line := service_manager.recv(4096).decode()).startswith(prefix):
            assert line.startswith("WATCHDOG=1"), line
        return line

    assert "STATUS=" in next_line("READY=1")
    for _ in range(3):
        assert service_manager.recv(4096) == b"WATCHDOG=1"
    agent.reload()
    reloading = next_line("RELOADING=1")
    assert abs(int(reloading.partition("MONOTONIC_USEC=")[2]) - time.monotonic_ns() // 1000) < 20_000_000
    next_line("READY=1")
    assert agent.process is not None
    # A daemon that hangs feeds no watchdog.
    agent.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(agent.process.pid).status() == psutil.STATUS_STOPPED, "the stop")
    service_manager.setblocking(False)
    while True:
        try:
            service_manager.recv(4096)
        except BlockingIOError:
            break
    service_manager.settimeout(1.0)
    with pytest.raises(TimeoutError):
        service_manager.recv(4096)
    agent.process.send_signal(signal.SIGCONT)
    service_manager.settimeout(20)
    next_line("WATCHDOG=1")
    agent.process.send_signal(signal.SIGTERM)
    next_line("STOPPING=1")
    assert agent.stop() == 0


def test_signals_during_the_start_are_heeded(tmp_path: Path, millhand_agent: Callable[..., Agent]) -> None:
    agent = millhand_agent(HTTP_ANY + rig_asset("skid", speed=1.0), started=False)
    agent.start(wait=False)
    assert agent.process is not None
    control = agent.run_dir / "control.sock"
    # The store is opened early and the control socket late: in between the daemon is starting.
    wait_until((agent.folder / "data" / "millhand.db-wal").exists, "the store", every_s=0.002)
    assert not control.exists()
    agent.process.send_signal(signal.SIGHUP)
    agent.wait(lambda: "configuration read again" in agent.log(), "the reload")
    agent.wait(agent.answers, "the agent")
    agent.kill()
    (agent.folder / "data" / "millhand.db-wal").unlink(missing_ok=True)
    agent.start(wait=False)
    wait_until((agent.folder / "data" / "millhand.db-wal").exists, "the store", every_s=0.002)
    assert agent.stop() == 0
    assert "Traceback" not in agent.log()
