"""kill -9 in the middle of everything: nothing is lost, nothing is doubled, and the same is predicted."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_kit import HTTP_OFF, Site, drained, ended, file_asset, rig_asset, state_of, write_engine

from millhand.testing import Agent

SEED = 20240817
ROWS = 2000
RIG_STEPS = 741
"""Batches in a rig's life of 37 s, one each 50 ms."""
MODELS = {"engine": "turbofan-rul", "skid": "rig-fault"}


def config(recording: Path, telemetry: str, engine_speed: float | str, rig_speed: float | str) -> str:
    engine = file_asset(recording, "engine", models=["turbofan-rul"], speed=engine_speed, more="batch_rows = 20")
    return HTTP_OFF + telemetry + "[plugins.turbofan]\n" + engine + rig_asset("skid", speed=rig_speed)


def predictions(agent: Agent, asset: str) -> list[dict[str, Any]]:
    found = agent.call("prediction.list", asset=asset, limit=100_000)
    return [{key: value for key, value in one.items() if key != "latency_ms"} for one in found]


def alerts(agent: Agent) -> dict[str, dict[str, Any]]:
    return {alert["id"]: alert for alert in agent.call("alert.list", limit=1000)}


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.long)])
def test_kills_lose_and_double_nothing(
    tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent], kills: int
) -> None:
    recording = write_engine(tmp_path / "engine.csv", ROWS)
    calm = millhand_agent(config(recording, "", "full", "full"))
    calm.wait(ended(calm, "engine", "skid"), "the end of the undisturbed run", 60)
    expected = {asset: predictions(calm, asset) for asset in MODELS}
    expected_alerts = alerts(calm)
    calm.stop()
    assert min(len(found) for found in expected.values()) > 30
    assert {alert["asset"] for alert in expected_alerts.values()} == set(MODELS)

    # Paced, so that the replay outlasts the kills: ten times half a second at most of running before each.
    agent = millhand_agent(config(recording, site.telemetry, 2.5, 5.0))
    dice = random.Random(SEED)
    for kill in range(kills):
        # A random moment of a running agent; every third time of a starting one.
        time.sleep(dice.uniform(0.05, 0.7))
        agent.kill()
        agent.start(wait=kill % 3 != 2)
    agent.wait(agent.answers, "the agent after its last start")
    assert not [asset for asset in MODELS if state_of(agent, asset)["state"] == "ended"], "the kills came too late"
    agent.wait(ended(agent, "engine", "skid"), "the end of the replay", 60)
    agent.wait(lambda: drained(agent), "the hub's acknowledgement of every row", 60)

    engine, skid = Counter(site.readings("engine")), Counter(site.readings("skid"))
    assert (set(range(ROWS)) - set(engine), set(engine) - set(range(ROWS))) == (set(), set())
    served = set(range(1, RIG_STEPS + 1))
    assert (served - set(skid), set(skid) - served) == (set(), set())
    assert [number for counted in (engine, skid) for number, times in counted.items() if times > 1] == []

    for asset in MODELS:
        assert predictions(agent, asset) == expected[asset]
    assert alerts(agent) == expected_alerts
    told = {alert["id"] for alert in site.alerts()}
    assert told == set(expected_alerts)
    hub_side = site.query(
        "SELECT asset, count(*) AS n, count(DISTINCT time_ms) AS times FROM predictions GROUP BY asset"
    )
    assert {row["asset"]: (row["n"], row["times"]) for row in hub_side} == {
        asset: (len(found), len(found)) for asset, found in expected.items()
    }
