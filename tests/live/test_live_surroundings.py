"""What a node finds around it: a clock that is wrong by decades, a kernel without IPv6, a host name of any bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_kit import HTTP_ANY, Site, check, cli, http_url

from millhand.testing import Agent

WITHOUT_IPV6 = (sys.executable, os.fspath(Path(__file__).parent / "kit" / "without_ipv6.py"))
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
HOST = '[[assets]]\nname = "node"\nadapter = "host"\n[assets.options]\nevery_ms = 200\n'
MODEL = '[plugins.turbofan]\n[models]\nload = ["turbofan-rul"]\n'
SIGNAL = "memory_used"


def works(agent: Agent, site: Site) -> None:
    """It records, what it records arrives, and it answers over HTTP."""
    agent.wait(lambda: len(own_values(agent)) > 2, "readings in the store")
    recorded = own_values(agent)
    agent.wait(lambda: len(site.readings("node", SIGNAL)) >= len(recorded), "the same readings at the hub")
    assert site.readings("node", SIGNAL)[: len(recorded)] == recorded
    assert httpx.get(f"{http_url(agent)}/v2/models/turbofan-rul/ready").status_code == 200
    assert cli(agent, "alert", "list").returncode == 0


def own_values(agent: Agent) -> list[Any]:
    chunks = agent.client.stream("readings.export", asset="node", names=[SIGNAL])
    return [row[3] for chunk in chunks for row in chunk]


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.parametrize("year", [1970, pytest.param(2039, marks=pytest.mark.long), 2107])
def test_a_clock_that_is_wrong_by_decades_costs_nothing_and_is_said(
    year: int, site: Site, millhand_agent: Callable[..., Agent]
) -> None:
    """A battery that is empty, and clocks that 31 and 32 bits of seconds do not hold."""
    shift_s = (year - 2026) * 365 * 86400
    environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{shift_s:+}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    agent = millhand_agent(HTTP_ANY + site.telemetry + MODEL + HOST, environment=environment)
    works(agent, site)
    _, findings = check(agent)
    assert findings["clock"]["level"] == "warning"
    assert str(year) in findings["clock"]["message"]
    assert agent.stop() == 0


def test_a_node_without_ipv6_does_all_it_does(site: Site, millhand_agent: Callable[..., Agent]) -> None:
    brokers = site.telemetry.replace("127.0.0.1", "localhost")
    agent = millhand_agent(
        HTTP_ANY + "[grpc]\nenabled = true\nport = 0\n" + brokers + MODEL + HOST, prefix=WITHOUT_IPV6
    )
    works(agent, site)
    assert agent.stop() == 0


@pytest.mark.parametrize("table", ["http", "grpc"])
def test_an_address_of_ipv6_on_a_node_without_it_is_said(table: str, millhand_agent: Callable[..., Agent]) -> None:
    agent = millhand_agent(
        f'[{table}]\nenabled = true\nhost = "::1"\nport = 8099\n', prefix=WITHOUT_IPV6, started=False
    )
    words = [*WITHOUT_IPV6, sys.executable, "-m", "millhand", "-c", str(agent.config_path)]
    checked = subprocess.run([*words, "--json", "check"], capture_output=True, text=True, check=False)
    finding = next(found for found in json.loads(checked.stdout)["findings"] if found["name"] == table)
    assert (finding["level"], finding["message"]) == ("error", "::1:8099: Address family not supported by protocol")
    assert "host" in finding["hint"]
    run = subprocess.run([*words, "run"], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert f"[{table}] host = '::1'" in run.stderr
    assert "Address family not supported" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root names a host")
@pytest.mark.parametrize(
    ("name", "node_id"),
    [
        (b"press 7", "press-7"),
        ("Förderband 3".encode(), "F-rderband-3"),
        (b"\xff\xfe", "--"),
        (b"p" * 64, "p" * 64),
        (b"", "node"),
    ],
    ids=["space", "unicode", "no text", "64", "empty"],
)
def test_a_host_of_any_name_is_set_up(name: bytes, node_id: str, tmp_path: Path) -> None:
    become = (
        "import os, socket, sys; socket.sethostname(bytes.fromhex(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
    )
    target, answers = tmp_path / "millhand.toml", tmp_path / "answers.toml"
    answers.write_text("")
    millhand = [sys.executable, "-m", "millhand", "-c", target, "setup", "--no-check", "--answers", answers]
    words = ["unshare", "--uts", sys.executable, "-c", become, name.hex(), *millhand]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f'id = "{node_id}"' in target.read_text()
