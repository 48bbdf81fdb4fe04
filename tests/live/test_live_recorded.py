"""Real inputs that an agent keeps of its models: `millhand model recorded`, over restarts and kill -9."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from live_kit import HTTP_OFF, cli, cli_json, ended, file_asset, state_of, write_engine

from millhand.pipeline.recorded import Recorded
from millhand.testing import Agent

MODEL = "turbofan-rul"
ROWS = 120


def rows(agent: Agent) -> int:
    return int(agent.call("model.recorded", model=MODEL)["rows"])


def test_the_rows_of_an_asset_are_kept_shown_and_forgotten(
    tmp_path: Path, millhand_agent: Callable[..., Agent]
) -> None:
    engine = write_engine(tmp_path / "engine.csv", ROWS)
    asset = file_asset(engine, "engine", models=[MODEL], speed="full", more="batch_rows = 20")
    agent = millhand_agent(HTTP_OFF + "[recording]\nrows = 64\nsave_s = 1\n[plugins.turbofan]\n" + asset)
    agent.wait(ended(agent, "engine"), "the end of the recording")
    predictions = state_of(agent, "engine")["counters"]["predictions"]
    code, facts = cli_json(agent, "model", "recorded", MODEL)
    assert (code, facts["rows"], facts["seen"]) == (0, 64, predictions)
    assert facts["assets"] == {"engine": 64} and facts["error"] == ""
    shown = cli(agent, "model", "recorded", MODEL).stdout
    assert f"64, a sample of {predictions}" in shown and "2023-11-14" in shown, shown

    path = Path(facts["path"])
    agent.wait(path.exists, "the file")
    agent.kill()
    kept = Recorded.read(path)
    assert kept.rows == 64
    assert f"a sample of {kept.seen}" in cli(agent, "model", "recorded", MODEL).stdout, "read without a daemon"

    agent.start()
    assert rows(agent) == 64
    agent.stop()
    assert Recorded.read(path).seen == kept.seen, "the recording has ended: nothing came since"

    agent.start()
    assert cli(agent, "model", "recorded", MODEL, "--forget").stdout == f"What was recorded of {MODEL} is deleted.\n"
    assert not path.exists()
    assert "Nothing is recorded" in cli(agent, "model", "recorded", MODEL).stdout
    agent.stop()
    assert not path.exists()
    assert "Nothing is recorded" in cli(agent, "model", "recorded", MODEL).stdout
    for words in (("model", "recorded", "turbofan-ru"), ("model", "recorded", "../x", "--forget")):
        done = cli(agent, *words)
        assert done.returncode == 1 and "Try: " in done.stderr, done.stderr
