"""A running agent and a tampered artifact: nothing that was tampered with is ever loaded, and what serves serves on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Done, run
from proof_kit import prove
from serving_kit import scale, write_model

from millhand.cli import EXIT_CODES
from millhand.serving.repository import Repository
from millhand.testing import Agent, millhand_agents


class Node:
    """An agent that serves one model, whose versions multiply by 2 and 3."""

    def __init__(self, folder: Path, start: Callable[..., Agent], **models: Any) -> None:
        self.root = folder / "models"
        for version, factor in ((1, 2.0), (2, 3.0)):
            scale(write_model(self.root, "press") / f"{version}/model.onnx", factor)
        keys = "".join(f"{key} = {value}\n" for key, value in models.items())
        config = f'[http]\nport = 0\n[models]\npaths = ["{self.root}"]\nrestart_delay_ms = 20\n{keys}'
        self.agent = start(config, started=False)
        for version in (1, 2):
            self.prove(version)
        self.agent.start()

    def prove(self, version: int) -> None:
        subject = Repository([self.root]).find("press").subject(version)
        prove(subject, self.agent.folder / "data")

    def tamper(self, version: int) -> None:
        scale(self.root / f"press/{version}/model.onnx", 7.0)

    def millhand(self, *words: str) -> Done:
        return run(self.agent.config_path, *words)

    def factor(self) -> float:
        request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}
        return float(self.agent.call("model.infer", model="press", request=request)["outputs"][0]["data"][0])

    def show(self) -> dict[str, Any]:
        found: dict[str, Any] = self.agent.call("model.show", model="press")
        return found

    def kill_worker(self) -> None:
        (worker,) = self.agent.call("model.stats")["workers"]
        os.kill(worker["pid"], signal.SIGKILL)


Make = Callable[..., Node]


@pytest.fixture
def make_node() -> Iterator[Make]:
    """Keys of [models] as keywords."""
    # A path of a length that nodes have.
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as folder, millhand_agents(Path(folder)) as start:
        yield lambda **models: Node(Path(folder), start, **models)


def test_a_tampered_artifact_is_refused_and_the_old_serves_on(make_node: Make) -> None:
    node = make_node(require_proof="true")
    assert (node.factor(), node.show()["proof"]) == (3.0, {"1": "proved", "2": "proved"})
    node.tamper(2)
    assert node.millhand("model", "verify", "--all").code == EXIT_CODES["error"]
    assert node.show()["proof"] == {"1": "proved", "2": "refused"} and node.factor() == 3.0
    done = node.millhand("model", "load", "press")
    assert done.code == EXIT_CODES["error"]
    for words in ("model 'press' version 2 is refused: '", "is not what was proved: its SHA-256 is",
                  "; version 2 serves on", "Try: restore it from where it was proved"):  # fmt: skip
        assert words in done.error, done.error
    assert node.factor() == 3.0
    text = " ".join(node.millhand("model", "show", "press").out.split())
    assert "reason model 'press' version 2 is refused" in text and "proof 1 proved, 2 refused; 2: '" in text
    node.prove(2)
    assert node.millhand("model", "load", "press").code == 0 and node.factor() == 7.0


def test_a_restarted_worker_does_not_load_what_was_tampered_with(make_node: Make) -> None:
    node = make_node()
    assert node.factor() == 3.0
    node.tamper(2)
    node.kill_worker()
    node.agent.wait(lambda: node.show()["versions"] == [1], "version 1, in the place of what was tampered with")
    assert node.factor() == 2.0
    reason = node.show()["reason"]
    assert "version 2 could not be loaded after a restart: model 'press' version 2 is refused" in reason
    assert "version 1 came back" in reason
    node.tamper(1)
    node.kill_worker()
    node.agent.wait(lambda: "model 'press' version 1 is refused" in node.agent.log(), "the refusal")
    assert node.show()["versions"] == []


@pytest.mark.parametrize("damage", ["artifact", "proof", "gate"])
def test_nothing_refused_is_loaded_at_the_start(make_node: Make, damage: str) -> None:
    node = make_node()
    node.agent.stop()
    if damage == "artifact":
        node.tamper(2)
    elif damage == "proof":
        path = node.root / "press/2/proof.json"
        path.write_text(path.read_text().replace('"drop_percent": 0.2', '"drop_percent": 0.1'))
    else:
        prove(Repository([node.root]).find("press").subject(2), node.agent.folder / "data", passed=False)
    node.agent.start()
    found = node.show()
    assert (found["versions"], found["state"]) == ([], "failed")
    words = {
        "artifact": "is not what was proved",
        "proof": "was changed after it was signed",
        "gate": "the gate failed",
    }
    assert words[damage] in found["reason"]
    assert node.agent.call("model.load", model="press", version=1)["versions"] == [1] and node.factor() == 2.0
