"""An agent with a language model: the draft is there at once, a judged version follows, a person has the last word."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import millhand_scripted_model as script
import pytest
from live_kit import HTTP_ANY, cli, cli_json, ended, http_url, rig_asset

from millhand.testing import Agent, millhand_agents

CONFIG = """
[language]
model = "scripted"
server = "scripted"
check_s = 0.2

[gateway]
port = 0

[orders]
reviser = "model"

[plugins.scripted]
"""
MANIFEST = 'format = "gguf"\nfile = "model.gguf"\nparameters = 7_000_000_000\ncontext_tokens = 8192\n'


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("orders")
    information = folder / "points" / "scripted-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[millhand]\nscripted = millhand_scripted_model\n")
    places = [os.fspath(information.parent), os.fspath(Path(script.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    with millhand_agents(folder) as start:
        running = start(HTTP_ANY + CONFIG + rig_asset("skid", speed="full"), environment=environment, started=False)
        model = running.folder / "data" / "language" / "scripted"
        model.mkdir(parents=True)
        (model / "language.toml").write_text(MANIFEST)
        (model / "model.gguf").write_bytes(b"GGUF" + bytes(64))
        running.start()
        running.wait(ended(running, "skid"), "the end of the rig's life", 60)
        yield running
        assert running.stop() == 0


def newest(agent: Agent) -> dict[str, Any]:
    (order,) = agent.call("order.list", asset="skid")
    return dict(order)


def test_the_models_order_is_judged_and_the_technician_has_the_last_word(agent: Agent) -> None:
    agent.wait(lambda: newest(agent)["revision"] == 2, "a version of the language model", 60)
    draft, order = agent.call("order.versions", order_id=newest(agent)["id"])
    assert (draft["revision"], draft["writer"], draft["struck"]) == (1, "deterministic", [])
    assert order["writer"] == "model"
    assert order["symptom"] == "Impacts from the outer race of the drive-end bearing, at [?]."
    assert order["likely_cause"] == script.ORDER["likely_cause"]
    assert order["action"][:2] == [script.ORDER["action"][0], "Regrease the drive-end bearing with [?] of [?]."]
    assert set(order["action"][2:]) < set(draft["action"])
    assert order["parts"] == ["drive-end bearing [?]"]
    assert order["priority"] == draft["priority"] != 4
    assert {struck["text"] for struck in order["struck"]} == {
        "612.5 Hz", "31 g", "KR-77", "6309-2RS", "4", "Bypass the interlock of the bearing.",
    }  # fmt: skip
    code, edited = cli_json(agent, "order", "edit", order["id"][:8], "--by", "kim", "--minutes", "50")
    assert (code, edited["revision"], edited["struck"]) == (0, 3, [])
    assert newest(agent) == edited
    (pair,) = agent.call("order.pairs")
    assert (pair["before"], pair["after"]) == (order, edited)
    with urllib.request.urlopen(http_url(agent) + "/metrics", timeout=30) as answer:
        page = answer.read().decode()
    assert 'millhand_order_revisions_total{outcome="revised"} 1' in page
    assert "millhand_order_struck_total 6" in page
    assert "1 work orders, 1 made better" in cli(agent).stdout
