"""A real agent serves what was made of a model: exchanged under a running asset, tampered with, killed meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from candidate_kit import Workshop
from live_kit import HTTP_OFF, cli, cli_json, file_asset, state_of, write_engine
from onnxruntime.transformers.float16 import convert_float_to_float16

import millhand_plugins.turbofan as turbofan
from millhand.testing import Agent

MODEL = "turbofan-rul"
SHIPPED = Path(turbofan.__file__).parent / "models"
SEED = 20261125


def half_precision(path: Path) -> None:
    """The shipped model in half precision, inputs and outputs as they were."""
    onnx.save(convert_float_to_float16(onnx.load(SHIPPED / MODEL / "1/model.onnx"), keep_io_types=True), path)


def resaved(path: Path) -> None:
    """The same graph and weights, written anew."""
    onnx.save(onnx.load(SHIPPED / MODEL / "1/model.onnx"), path)


def serving(agent: Agent) -> list[str]:
    (model,) = [model for model in agent.call("model.list") if model["name"] == MODEL]
    (version,) = [detail for detail in model["details"] if detail["version"] in model["versions"]]
    return list(version["candidates"])


@pytest.fixture
def site(tmp_path: Path, millhand_agent: Callable[..., Agent]) -> tuple[Agent, Workshop]:
    """An agent whose engine is judged 50 times a second, for a minute; it does not run yet."""
    engine = write_engine(tmp_path / "engine.csv", 3000, rate_hz=50.0)
    asset = file_asset(engine, "engine", models=[MODEL], speed=1.0)
    agent = millhand_agent(HTTP_OFF + "[plugins.turbofan]\n" + asset, started=False)
    return agent, Workshop(SHIPPED, agent.folder / "data")


@pytest.mark.timeout(180)
def test_candidates_come_and_go_under_a_running_asset(site: tuple[Agent, Workshop]) -> None:
    agent, workshop = site
    workshop.serve(MODEL, half_precision, name="fp16")
    agent.start()
    assert serving(agent) == ["fp16"]
    agent.wait(lambda: state_of(agent, "engine")["counters"]["predictions"] > 20, "predictions")

    workshop.serve(MODEL, resaved, name="resaved")
    done = cli(agent, "model", "load", MODEL)
    assert (done.returncode, serving(agent)) == (0, ["resaved"]), done.stderr

    candidate = workshop.serve(MODEL, half_precision, name="fp16")
    data = candidate.artifact.read_bytes()
    candidate.artifact.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert (cli(agent, "model", "load", MODEL).returncode, serving(agent)) == (0, [])
    assert "is not what was proved" in " ".join(cli(agent, "model", "show", MODEL).stdout.split())

    before = state_of(agent, "engine")["counters"]["predictions"]
    agent.wait(lambda: state_of(agent, "engine")["counters"]["predictions"] > before + 20, "more predictions")
    status = state_of(agent, "engine")
    assert (status["counters"]["predictions_failed"], status["error"]) == (0, "")
    assert agent.call("model.stats")["workers"][0]["restarts"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.long)])
def test_kill_9_in_the_middle_of_a_swap(site: tuple[Agent, Workshop], kills: int) -> None:
    """After each kill the agent serves what was chosen, and neither a build folder nor a worker is left."""
    agent, workshop = site
    dice = random.Random(SEED)
    agent.start()
    for kill in range(kills):
        name = f"candidate-{kill}"
        shelving = threading.Thread(
            target=workshop.serve, args=(MODEL, (half_precision, resaved)[kill % 2]), kwargs={"name": name}
        )
        shelving.start()
        loading = threading.Thread(target=cli, args=(agent, "model", "load", MODEL))
        loading.start()
        time.sleep(dice.uniform(0.2, 1.5))
        agent.kill()
        loading.join()
        shelving.join()
        agent.start()
        assert serving(agent) == [name]
    code, shown = cli_json(agent, "model", "show", MODEL)
    assert (code, shown["choices"][0]["reason"]) == (0, "")
    assert not list(workshop.shelf.root.glob("*/*/*/.making-*"))
    agent.wait(lambda: state_of(agent, "engine")["counters"]["predictions"] > 5, "predictions after the last start")
