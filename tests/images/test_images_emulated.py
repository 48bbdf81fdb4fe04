"""The package on boards that are not here: an AGX Orin emulated, an A30 and an A100 dressed, from their recordings.

`make test-arm64` runs it and prints every command with what it said. Under emulation Python is ten to thirty times
slower: nothing here is timed. The demo's rig lives at EMULATED_PACE on the emulated board, which the demo itself
offers and which slows its periods and deadlines alike; its whole life is lived. Each node is a machine of its own whose
way out leads nowhere and counts what it gets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from console_kit import Command, blocks, commands
from dressing_kit import BOARDS, ORIN, Board, dress
from node_kit import Node
from package_kit import ROOT, bare_root, install, missing, package

from millhand.demo.pace import machine_load, suitable_pace

DATA = os.environ.get("MILLHAND_DATA")
RECORD = os.environ.get("TEST_RECORD")
"""A folder for what ran, one JSON file a board: benchmarks/emulation.py reads it."""
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.data,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not DATA, reason="MILLHAND_DATA does not name the folder of public data sets: no recordings"),
]
READY_DEADLINE_S = 1500.0
"""On a busy machine an emulated command takes more than a minute."""
EMULATED_PACE = 0.05
"""Rig seconds a second on the emulated board, where little else runs: a life in twelve and a half minutes. On a busy
machine it is as much less as the demo would choose by itself."""
SLOWEST_EMULATED = 0.025
"""A snapshot of the rig every twenty seconds: enough where eighteen processes wanted two cores."""
COMMAND_DEADLINE_S = 2700
STARTS_WITH = {"clock", "broker", "daemon", "onnxruntime cuda"}
"""What `check` may warn of on a node that was set up, not started: no NTP, no broker, no ONNX Runtime for its GPU."""
INT8 = "rig-wave-int8"
ASKING = ("uname -m", "python3 --version", "df -h /", "date -u", "hostname", "millhand --version")
ASKING += ("millhand check", "millhand hw show", "millhand profile match", "id millhand", "ls -l /dev")
"""Commands of docs/first-node.md that change nothing: they hold on any node that is set up."""
FIRST = ("seq -s, 44 | millhand predict rig-fault --format csv", "millhand model list")
OPERATED = ("millhand readings --database /var/lib/millhand/export.db", "rm /var/lib/millhand/export.db")
OPERATED += ("millhand", "millhand alert list")
"""Commands of docs/first-node.md and docs/operate.md for an agent that runs."""
MACHINES = """\
[plugins.rig]

[[assets]]
name = "node"
adapter = "host"
"""


@dataclass
class Dressed:
    """A board's node, and what was seen of it."""

    board: Board
    node: Node
    seen: dict[str, Any]

    def millhand(self, *words: str, codes: tuple[int, ...] = (0,), user: str = "root", text: str | None = None) -> Any:
        """What `millhand --json …` says."""
        answer = self.node.run(
            "millhand", "--json", *words, codes=codes, user=user, text=text, timeout_s=COMMAND_DEADLINE_S
        )
        return json.loads(answer.stdout)

    def does(self, page: str, chosen: tuple[str, ...] = (), place: str = "") -> None:
        """Do what a page says: of its commands those that are chosen, or those of the blocks for a place."""
        found = [
            command
            for block in blocks(ROOT / "docs" / page)
            if block.place and place in ("", block.place)
            for command in commands(block)
            if not chosen or command.text in chosen
        ]
        assert found and {command.text for command in found} >= set(chosen), f"{page} does not say all of {chosen}"
        once: dict[str, Command] = {}
        for command in found:
            once.setdefault(command.text, command)
        for command in once.values():
            codes = (0, 3) if command.text == "millhand check" else (0,)
            said = self.node.run("sh", "-c", f"cd /root && {command.text}", codes=codes, timeout_s=COMMAND_DEADLINE_S)
            assert not command.missing(said.stdout), f"{command}: '{command.missing(said.stdout)}' did not come"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 candidate of rig-wave, built and proved on this machine."""
    folder = tmp_path_factory.mktemp("int8")
    config = folder / "millhand.toml"
    config.write_text(
        f"[node]\ndata_dir = '{folder / 'data'}'\nrun_dir = '{folder / 'run'}'\n[plugins.rig]\n[plugins.quantize]\n"
    )
    words = ["-c", os.fspath(config), "model", "build", "rig-wave", "--only", "int8-static"]
    subprocess.run([sys.executable, "-m", "millhand", *words], cwd=ROOT, check=True, timeout=600)
    return folder / "data/built/rig-wave/1/cpu/int8-static/model.onnx"


@pytest.fixture(scope="module", params=BOARDS, ids=lambda board: board.name)
def dressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dressed]:
    """A bare node of the board with the package installed, its network leading nowhere."""
    board: Board = request.param
    if reason := missing(board.architecture):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(board.name)
    root = folder / "root"
    bare_root(board.architecture, root)
    deb = install(root, package(board.architecture, folder / "dist"))
    proc = dress(board, root, Path(DATA or ".") / "hardware")
    try:
        with Node(board.name, root, proc) as node:
            node.run("dpkg", "-i", deb, timeout_s=900)
            seen = {"board": board.name, "architecture": board.architecture}
            yield Dressed(board, node, seen)
            if RECORD:
                (Path(RECORD) / f"{board.name}.json").write_text(json.dumps(seen))
    finally:
        shutil.rmtree(folder)


def test_it_installs_without_a_network(dressed: Dressed) -> None:
    status = dressed.node.run("dpkg-query", "-W", "-f", "${Status} ${Version} ${Architecture}", "millhand").stdout
    assert status.startswith("install ok installed ")
    assert status.endswith(f" {dressed.board.architecture}")
    dressed.seen["package"] = status.split()[3]
    dressed.seen["machine"] = dressed.node.run("uname", "-m").stdout.strip()
    dressed.seen["millhand"] = dressed.node.run("millhand", "--version").stdout.split()[-1]


def test_its_hardware_is_found(dressed: Dressed) -> None:
    board = dressed.board
    hardware = dressed.millhand("hw", "show")
    assert hardware["source"] == "live"
    assert [gpu["name"] for gpu in hardware["accelerators"]] == list(board.accelerators)
    assert [part["profile"] for gpu in hardware["accelerators"] for part in gpu["mig"]] == list(board.slices)
    assert hardware["driver"] == board.driver
    assert {key: (hardware["jetson"] or {}).get(key) for key in board.facts} == board.facts
    assert hardware["problems"] == []
    dressed.seen["accelerators"] = [gpu["name"] for gpu in hardware["accelerators"]]


def test_its_profile_matches(dressed: Dressed) -> None:
    match = dressed.millhand("profile", "match")
    assert match["profile"] == dressed.board.profile
    dressed.seen["profile"] = match["profile"]


def test_devices_that_may_not_be_opened_are_named(dressed: Dressed) -> None:
    if dressed.board is ORIN:
        pytest.skip("a Jetson's GPU is known without NVML")
    device = "/dev/nvidiactl"
    dressed.node.run("sh", "-c", f"touch {device} && chgrp video {device} && chmod 0660 {device}")
    dressed.node.run("usermod", "-G", "", "millhand")
    (problem, *_) = dressed.millhand("hw", "show", user="millhand")["problems"]
    assert f"may not open {device}" in problem["message"] and "'video'" in problem["hint"]
    dressed.node.run("usermod", "-aG", "video", "millhand")
    assert dressed.millhand("hw", "show", user="millhand")["problems"] == []
    dressed.node.run("rm", device)


def test_it_is_set_up_and_checks(dressed: Dressed) -> None:
    root = dressed.node.root / "root"
    (root / "machines.toml").write_text(MACHINES)
    (root / "answers.toml").write_text(f'node = "{dressed.board.name}-1"\nmachines = "machines.toml"\n')
    dressed.node.run("millhand", "setup", "--answers", "/root/answers.toml", timeout_s=900)
    found = dressed.millhand("check", codes=(0, 3))
    assert found["errors"] == 0
    assert {one["name"] for one in found["findings"] if one["level"] == "warning"} <= STARTS_WITH
    assert any(one["name"] == "profile" and dressed.board.profile in one["message"] for one in found["findings"])
    dressed.seen["check"] = {"errors": found["errors"], "warnings": found["warnings"]}


def test_the_pages_hold_on_it(dressed: Dressed) -> None:
    dressed.does("first-node.md", ASKING)
    if dressed.board is ORIN:
        dressed.does("hardware.md", place="jetson")


def test_it_starts_predicts_in_int8_and_stops(dressed: Dressed, built: Path, tmp_path: Path) -> None:
    node = dressed.node
    _lay_int8(node.root / "opt/models" / INT8, built)
    with (node.root / "etc/millhand/millhand.toml").open("a") as file:
        file.write(f'\n[models]\npaths = ["/opt/models"]\nload = ["rig-fault", "{INT8}"]\n')
    node.run("install", "-d", "-o", "millhand", "-g", "millhand", "/run/millhand")
    agent = node.start("millhand", "run", user="millhand", log=tmp_path / "agent.log")
    try:
        state = _ready(dressed, agent)
        assert {model["name"]: model["state"] for model in state["models"]}.items() >= {
            INT8: "ready",
            "rig-fault": "ready",
        }.items()
        said = dressed.millhand("predict", INT8, "--format", "json", text=json.dumps(_request()))
        logits = np.array(said["outputs"][0]["data"])
        np.testing.assert_allclose(logits, _here(built), atol=0.5)
        assert said["predictions"][0]["label"] == "healthy"
        dressed.seen["int8"] = {
            "label": said["predictions"][0]["label"],
            "certainty": round(said["predictions"][0]["certainty"], 3),
        }
        dressed.does("first-node.md", FIRST)
        dressed.does("operate.md", OPERATED)
        node.run("sh", "-c", f"kill -TERM {state['pid']}")
        assert agent.wait(600) == 0
        dressed.seen["stopped"] = 0
    finally:
        agent.kill()
        agent.wait()
        print((tmp_path / "agent.log").read_text())


def test_the_demo_does_its_main_job_once(dressed: Dressed) -> None:
    slow = max(SLOWEST_EMULATED, EMULATED_PACE * suitable_pace(machine_load()))
    pace = ["--scale", f"{slow:.3f}"] if dressed.board is ORIN else []  # elsewhere it chooses by the machine's load
    facts = dressed.millhand("demo", *pace, "--output", "/tmp", codes=(0, 1))
    assert facts["good"], facts["shortcomings"]
    assert facts["profile"] == dressed.board.profile
    assert facts["alerts"] and facts["work_orders"]
    assert (facts["telemetry"]["lost"], facts["telemetry"]["duplicates"]) == (0, 0)
    dressed.seen["demo"] = {"scale": facts["scale"], "produced": facts["telemetry"]["produced"], "lost": 0}


def test_nothing_left_the_node(dressed: Dressed) -> None:
    """Of everything above, installation included, not one packet; and one that is sent would have been counted."""
    assert dressed.node.packets_sent_out() == 0
    dressed.seen["packets_sent_out"] = 0
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.1', 9))"
    dressed.node.run("python3", "-c", code)
    assert dressed.node.packets_sent_out() > 0


def _lay_int8(folder: Path, built: Path) -> None:
    """The candidate as a model of the owner's."""
    (folder / "1").mkdir(parents=True)
    shutil.copy(built, folder / "1/model.onnx")
    toml = (ROOT / "plugins/millhand_plugins/rig/models/rig-wave/model.toml").read_text()
    (folder / "model.toml").write_text(toml.replace('name = "rig-wave"', f'name = "{INT8}"'))


def _waveform() -> np.ndarray[Any, Any]:
    return np.sin(np.arange(4096, dtype=np.float32) / 7).round(4).reshape(1, 2, 2048)


def _request() -> dict[str, Any]:
    data = _waveform()
    return {
        "inputs": [{"name": "waveform", "datatype": "FP32", "shape": list(data.shape), "data": data.ravel().tolist()}]
    }


def _here(built: Path) -> np.ndarray[Any, Any]:
    """What the same file says on this machine; the integer kernels of two architectures round differently."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(built), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"waveform": _waveform()})[0])[0]


def _ready(dressed: Dressed, agent: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The agent's state once it serves."""
    end = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < end:
        assert agent.poll() is None, f"the agent ended with {agent.returncode}"
        state: dict[str, Any] = dressed.millhand(codes=(0, 1))
        if state.get("ready"):
            return state
        time.sleep(1)
    raise AssertionError("the agent was not ready in time")
