"""A library is updated under a real agent: what was made for the old one is made anew by real builds, then serves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from millhand.control import ControlClient
from millhand.errors import ControlError
from millhand.testing import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MODEL = "known"
OLD, NEW = "10.3", "10.16"


class Agent:
    """`millhand run` on the node."""

    def __init__(self, node: Any) -> None:
        self.process: subprocess.Popen[str] = node.start("run")
        self.control = ControlClient(node.run_dir / "control.sock")
        wait_until(self.answers, "the agent")

    def answers(self) -> bool:
        assert self.process.poll() is None
        try:
            return bool(self.control.call("state")["ready"])
        except ControlError:
            return False

    def choice(self) -> dict[str, Any]:
        (found,) = self.control.call("model.show", model=MODEL)["choices"]
        return dict(found)

    def serving(self) -> list[str]:
        return list(self.control.call("model.show", model=MODEL)["details"][0]["candidates"])

    def builds(self) -> list[psutil.Process]:
        """What is under way."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.is_running() and "worker" not in " ".join(child.cmdline())
                and "millhand.workshop" in " ".join(child.cmdline())]  # fmt: skip

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        assert self.process.returncode == 0


@pytest.fixture
def outdated(node):
    """A node whose model serves a candidate that was made with the old library; the new one is installed."""
    node.model(MODEL)
    node.model()  # whose weights `rows` takes for its truth: those of a model that is the same
    examples = str(node.rows())
    node.configure("slow", key=OLD, examples=examples)
    assert node.build(model=MODEL).data["chosen"] == "slow"
    node.configure("slow", key=NEW, examples=examples)
    return node


def record(node) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((node.place(MODEL) / "slow" / "made.json").read_text())
    return found


def test_what_is_stale_is_made_anew_while_the_original_serves(outdated):
    agent = Agent(outdated)
    choice = agent.choice()
    assert (agent.serving(), choice["stale"]) == ([], True)
    assert choice["reason"] == f"it is stale: library was {OLD}, is {NEW}"
    assert choice["rebuild"] in ("it will be made anew", "it is being made anew")
    builds = wait_until(agent.builds, "the build")
    assert {child.nice() for child in builds} == {19}
    assert {child.ionice().ioclass for child in builds} == {psutil.IOPRIO_CLASS_IDLE}
    wait_until(lambda: agent.serving() == ["slow"], "the new candidate", 150)
    assert record(outdated)["made"]["key"] == {"library": NEW}
    assert outdated.made == ["slow", "slow"]
    wait_until(lambda: 'millhand_rebuilds{state="done"} 1' in agent.control.call("metrics"), "the end of the build")
    assert (agent.choice()["reason"], agent.choice()["stale"]) == ("", False)
    agent.stop()


@pytest.mark.long
def test_kill_9_of_the_agent_ends_the_build_and_the_next_start_begins_it_again(outdated):
    agent = Agent(outdated)
    builds = wait_until(agent.builds, "the build")
    agent.process.kill()
    agent.process.wait()
    wait_until(lambda: not [one for one in builds if one.is_running() and one.status() != "zombie"], "the builds' end")
    again = Agent(outdated)
    wait_until(lambda: again.serving() == ["slow"], "the new candidate", 150)
    assert record(outdated)["made"]["key"] == {"library": NEW}
    again.stop()


def test_a_build_that_fails_says_why(outdated):
    """The maker has lost the recipe."""
    text = outdated.config_path.read_text()
    outdated.config_path.write_text(text.replace('recipes = ["slow"]', 'recipes = ["folded"]'))
    agent = Agent(outdated)
    wait_until(lambda: "could not be made anew" in agent.choice()["rebuild"], "the failure", 60)
    assert "'slow'" in agent.choice()["rebuild"] and "tried again in" in agent.choice()["rebuild"]
    assert agent.serving() == [] and not agent.builds()
    agent.stop()


@pytest.mark.long
def test_it_can_be_switched_off(outdated):
    text = outdated.config_path.read_text()
    outdated.config_path.write_text(text.replace("[models]\n", "[models]\nrebuild_stale = false\n"))
    agent = Agent(outdated)
    assert (agent.serving(), agent.choice()["rebuild"]) == ([], "")
    assert not agent.builds()
    agent.stop()
    assert Path(outdated.place(MODEL) / "slow").exists()
