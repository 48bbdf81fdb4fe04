"""Stale candidates are made anew in the background: one at a time, with growing pauses, and never in a loop."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from candidate_kit import Workshop, half
from serving_kit import KIT, scale, until, write_model

from millhand import metrics
from millhand.workshop import rebuilder as rebuilder_module
from millhand.workshop.background import Task
from millhand.workshop.rebuilder import Rebuilder, Stale

STALE = Stale("scale", 1, "cpu", "half", "half", ("driver was 535, is 550",))


class Builds:
    """How builds go, and what was asked of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.built: list[str] = []

    def go(self, words: str) -> None:
        self.path.write_text(words)

    @property
    def asked(self) -> list[dict]:
        log = self.path.with_suffix(".log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    async def take(self, model: str) -> None:
        self.built.append(model)


@pytest.fixture
def builds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(KIT), prepend=os.pathsep)
    monkeypatch.setenv("MILLHAND_TEST_BUILD", os.fspath(tmp_path / "builds.txt"))
    monkeypatch.setattr(rebuilder_module, "MODULE", "millhand_building")
    monkeypatch.setattr(rebuilder_module, "PAUSE_FIRST_S", 0.05)
    monkeypatch.setattr(rebuilder_module, "PAUSE_FACTOR", 1.5)
    found = Builds(tmp_path / "builds.txt")
    found.go("ok")
    return found


@pytest.fixture
async def rebuilder(builds):
    found = Rebuilder(Path("/etc/millhand.toml"))
    found.on_built = builds.take
    yield found
    await found.stop()


async def test_what_is_stale_is_built_once_and_taken_into_use(rebuilder, builds):
    rebuilder.ask(STALE)
    rebuilder.ask(STALE)
    assert rebuilder.told("scale", 1, "cpu") == "it will be made anew"
    await until(lambda: builds.built == ["scale"])
    (asked,) = builds.asked
    assert asked["task"] == {
        "agent": os.getpid(), "config": "/etc/millhand.toml", "model": "scale", "version": 1, "target": "cpu",
        "recipe": "half",
    }  # fmt: skip
    assert rebuilder.told("scale", 1, "cpu") == "" and rebuilder.states() == {"done": 1}
    assert rebuilder.counts == {("scale", "built"): 1}


async def test_one_at_a_time(rebuilder, builds):
    builds.go("hang ok")
    rebuilder.ask(STALE)
    rebuilder.ask(Stale("other", 2, "sm80", "engine", "engine", ("gpu was A30, is A100",)))
    await until(lambda: rebuilder.told("scale", 1, "cpu") == "it is being made anew" and builds.asked)
    assert rebuilder.told("other", 2, "sm80") == "it will be made anew"
    psutil.Process(builds.asked[0]["pid"]).kill()
    await until(lambda: builds.built == ["other"])
    await until(lambda: builds.built == ["other", "scale"])


@pytest.mark.parametrize(
    ("word", "why"),
    [("fail", "no space left on the device"), ("die", "the build died of SIGSEGV")],
)
async def test_a_build_that_fails_is_tried_again_later_and_not_for_ever(rebuilder, builds, word, why):
    builds.go(word)
    rebuilder.ask(STALE)
    await until(lambda: rebuilder.states()["failed"])
    told = rebuilder.told("scale", 1, "cpu")
    assert told == f"it could not be made anew 5 times, the last time: {why}"
    assert len(builds.asked) == 5 and rebuilder.counts == {("scale", "failed"): 5}
    rebuilder.ask(STALE)
    await asyncio.sleep(0.3)
    assert len(builds.asked) == 5, "it was given up"
    builds.go("ok")
    rebuilder.forgive("scale")
    assert rebuilder.told("scale", 1, "cpu") == ""
    rebuilder.ask(STALE)
    await until(lambda: builds.built == ["scale"])


async def test_a_build_that_cannot_be_started_is_a_failure(rebuilder, builds, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    rebuilder.ask(STALE)
    await until(lambda: rebuilder.states()["failed"])
    assert "No such file or directory: '/nowhere/python3'" in rebuilder.told("scale", 1, "cpu")


async def test_pauses_grow(rebuilder, builds, monkeypatch):
    monkeypatch.setattr(rebuilder_module, "PAUSE_FIRST_S", 30.0)
    builds.go("fail")
    rebuilder.ask(STALE)
    await until(lambda: rebuilder.counts)
    assert rebuilder.told("scale", 1, "cpu") == (
        "it could not be made anew: no space left on the device; tried again in 30 s"
    )
    (order,) = rebuilder._orders.values()
    rebuilder._fail(order, "again")
    assert "tried again in 45 s" in rebuilder.told("scale", 1, "cpu")


async def test_what_was_built_and_is_stale_all_the_same_is_a_failure(rebuilder, builds):
    async def ask_again(model):
        rebuilder.ask(STALE)

    rebuilder.on_built = ask_again
    rebuilder.ask(STALE)
    await until(lambda: rebuilder.states()["failed"])
    assert "what was made anew is stale as well" in rebuilder.told("scale", 1, "cpu")
    assert len(builds.asked) == 5


async def test_a_load_during_a_build_does_not_set_it_going_again(rebuilder, builds):
    builds.go("hang")
    rebuilder.ask(STALE)
    await until(lambda: builds.asked)
    rebuilder.forgive("scale")
    rebuilder.ask(STALE)
    assert rebuilder.states() == {"builds": 1}


async def test_a_stop_ends_the_build(rebuilder, builds):
    builds.go("hang")
    rebuilder.ask(STALE)
    await until(lambda: builds.asked)
    pid = builds.asked[0]["pid"]
    await rebuilder.stop()
    assert not psutil.pid_exists(pid)


async def test_a_build_that_never_ends_is_ended(rebuilder, builds, monkeypatch):
    monkeypatch.setattr(rebuilder_module, "DEADLINE_S", 5)
    builds.go("hang ok")
    rebuilder.ask(STALE)
    await until(lambda: builds.built)
    assert not psutil.pid_exists(builds.asked[0]["pid"])


# ---- with the pool --------------------------------------------------------------------------------------------------


async def test_a_stale_candidate_is_replaced_while_the_original_serves(make_pool, root, tmp_path, builds, monkeypatch):
    monkeypatch.setenv("MILLHAND_TEST_KEY", json.dumps({"driver": "550"}))
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    workshop = Workshop(root, tmp_path / "data")
    workshop.serve("scale", lambda path: half(path, 3), key={"driver": "535"})
    builds.go("hang")
    pool = await make_pool(rebuilder=Rebuilder(None))
    (choice,) = pool.metadata("scale")["choices"]
    assert choice["stale"] and choice["reason"] == "it is stale: driver was 535, is 550"
    await until(lambda: builds.asked)
    assert pool.index()[0]["reason"].endswith("it is stale: driver was 535, is 550; it is being made anew")
    assert 'millhand_rebuilds{state="builds"} 1' in metrics.DAEMON.render()
    assert 'target="cpu",candidate="half"} 0' in metrics.DAEMON.render()
    workshop.serve("scale", lambda path: half(path, 4), key={"driver": "550"})
    builds.go("ok")
    psutil.Process(builds.asked[0]["pid"]).kill()
    await until(lambda: pool.index()[0]["details"][0]["candidates"] == ["half"])
    assert pool.index()[0]["reason"] == ""
    assert 'millhand_rebuilds_total{model="scale",outcome="built"} 1' in metrics.DAEMON.render()


# ---- the process ----------------------------------------------------------------------------------------------------


def test_an_agent_that_is_gone_already_starts_nothing():
    task = Task(agent=1, model="scale", version=1, target="cpu", recipe="half")
    command = [sys.executable, "-m", rebuilder_module.MODULE, msgspec.json.encode(task).decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (1, "the agent is gone\n")
