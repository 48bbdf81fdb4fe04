"""`millhand hub …` and `python -m millhand_hub` as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def cli(*words, code=0):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def config(kit, database, tmp_path):
    pair = kit.Pair()
    rows = [kit.bulk(1, 1.0), kit.alert(1), kit.alert(2, number=2, state="cleared"), kit.order(3)]
    database.commit([*pair.birth(), *pair.say(*rows)])
    path = tmp_path / "hub.toml"
    path.write_text(f'data_dir = "{tmp_path}"\n')
    return str(path)


def test_nodes_alerts_orders(config):
    def ask(*words):
        return json.loads(cli("millhand", "hub", *words, "--hub-config", config, "--json").stdout)

    (node,) = ask("nodes")
    assert (node["group"], node["node"], node["online"], node["rows"]) == ("plant", "node-1", True, 4)
    assert [a["id"] for a in ask("alerts")] == ["alert-2", "alert-1"]
    assert [a["id"] for a in ask("alerts", "--state", "open")] == ["alert-1"]
    assert len(ask("alerts", "--limit", "1")) == 1
    assert ask("orders")[0]["action"] == ["replace it"]
    text = {word: cli("millhand", "hub", word, "--hub-config", config).stdout for word in ("nodes", "alerts", "orders")}
    assert "node-1" in text["nodes"] and "critical" in text["alerts"] and "it hums" in text["orders"]


def test_errors_say_what_to_do(tmp_path):
    path = tmp_path / "hub.toml"
    path.write_text(f'data_dir = "{tmp_path}/none"\n')
    done = cli("millhand", "hub", "nodes", "--hub-config", str(path), code=1)
    assert "no hub database" in done.stderr and "Try:" in done.stderr and "Traceback" not in done.stderr
    path.write_text("brokr = 1\n")
    for words in (["millhand", "hub", "run", "--hub-config"], ["millhand_hub", "--config"]):
        done = cli(*words, str(path), code=1)
        assert "did you mean 'broker'" in done.stderr and "Traceback" not in done.stderr
    path.write_text(f'data_dir = "{tmp_path}"\nusername = "hub"\npassword_env = "NOT_SET_ANYWHERE"\n')
    assert "NOT_SET_ANYWHERE" in cli("millhand_hub", "--config", str(path), code=1).stderr
