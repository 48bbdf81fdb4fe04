"""A node without assets, that serves models to others: what it says of itself, and what to do next."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_kit import identity, write_model

from millhand.config import Config
from millhand.daemon import Daemon
from millhand.errors import ConfigError
from millhand.testing import Agent

CONFIG = '[http]\nport = 0\n[models]\npaths = ["{root}"]\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model whose artifact is none."""
    root = tmp_path / "models"
    artifact = write_model(root, "press") / "1/model.onnx"
    artifact.parent.mkdir()
    artifact.write_text("no model")
    return root


@pytest.fixture
def run_dir() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as run_dir:
        yield run_dir


def says(config: Path, *words: str) -> str:
    """What a command prints, each word apart from the next by one blank."""
    command = [sys.executable, "-m", "millhand", "--config", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return " ".join((done.stdout + done.stderr).split())


def test_a_stopped_node_with_models_is_to_be_started(tmp_path: Path, root: Path, run_dir: str) -> None:
    config = tmp_path / "millhand.toml"
    config.write_text(f'[node]\nrun_dir = "{run_dir}"\n')
    assert says(config).endswith("Next step millhand demo")
    config.write_text(f'[node]\nrun_dir = "{run_dir}"\n{CONFIG.format(root=root)}')
    assert says(config).endswith("Next step millhand run")


def test_a_failed_model_is_told_with_its_remedy(root: Path, millhand_agent: Callable[..., Agent]) -> None:
    """Everywhere: the bare command, show, list, versions, check and the log."""
    agent = millhand_agent(CONFIG.format(root=root))
    config = agent.config_path
    assert says(config).endswith("Next step millhand model list")
    (model,) = agent.call("model.list")
    reason, hint = model["reason"], model["hint"]
    assert (model["state"], "cannot be loaded" in reason, bool(hint)) == ("failed", True, True)
    assert f"reason {reason} try {hint}" in says(config, "model", "show", "press")
    for command in ("list", "versions"):
        words = says(config, "model", command, *(["press"] if command == "versions" else []))
        assert f"{reason} ({hint})" in words, command
    assert f"FAIL model press: {reason} Try: {hint}" in says(config, "check")
    assert f"ERROR   millhand.serving: model 'press' is not served: {reason} ({hint})" in agent.log()

    identity(root / "press/1/model.onnx")
    assert says(config, "model", "load", "press") == "press serves version 1."
    assert "INFO    millhand.serving: model 'press' serves version 1, asked for by the command line" in agent.log()
    assert says(config).endswith("Next step millhand model show press")
    assert " try " not in says(config, "model", "show", "press")


def test_a_stop_is_told_in_the_log(millhand_agent: Callable[..., Agent]) -> None:
    agent = millhand_agent("[http]\nenabled = false\n")
    assert agent.stop() == 0
    assert [line.partition("millhand.daemon: ")[2] for line in agent.log().splitlines()[-2:]] == [
        "SIGTERM: stopping",
        "stopped",
    ]


async def test_what_cannot_start_is_found_before_models_are_loaded(
    tmp_path: Path, root: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    tables = {
        "node": {"data_dir": tmp_path / "data", "run_dir": run_dir},
        "models": {"paths": [root]},
        "tracing": {"enabled": True},
    }
    daemon = Daemon(Config.model_validate(tables))
    with pytest.raises(ConfigError, match="needs the Python package 'opentelemetry"):
        await daemon.start()
    assert not hasattr(daemon, "pool"), "no model was loaded"
    await daemon.stop()
