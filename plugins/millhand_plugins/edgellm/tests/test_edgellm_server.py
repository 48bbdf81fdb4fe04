"""TensorRT Edge-LLM's command line and answers, by a stand-in process: the real one needs a GPU with TensorRT."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from millhand.errors import ConfigError, ModelError
from millhand.language.launch import Launch
from millhand.language.replica import Replica
from millhand.language.settings import LanguageSettings
from millhand.testing import wait_until
from millhand_plugins.edgellm import server as module
from millhand_plugins.edgellm.server import EdgellmServer
from millhand_plugins.edgellm.settings import EdgellmSettings

STANDIN = Path(__file__).parent / "edgellm_standin.py"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in under the real one's name, on PATH."""
    path = tmp_path / "bin" / "tensorrt-edgellm-serve"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


@pytest.fixture
def launch(tmp_path: Path) -> Any:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")

    def make(**values: Any) -> Launch:
        usual = {"name": "m", "model": tmp_path / "m", "port": 9000, "context_tokens": 1024, "accelerators": ("GPU-1",)}
        return Launch(**{**usual, **values})

    return make


async def test_it_is_started_proved_and_stopped(program: Path, launch: Any, tmp_path: Path) -> None:
    settings = LanguageSettings(model="m", check_s=0.1, stop_s=5, start_timeout_s=60)
    server = EdgellmServer(EdgellmSettings(cache_dir=tmp_path / "engines"))
    replica = Replica("m", launch(slots=4, reasoning=True), server, settings, tmp_path / "m.log", lambda: None)
    replica.start()
    try:
        await asyncio.to_thread(wait_until, lambda: replica.state in ("ready", "failed"), "a verdict", 60)
        assert replica.state == "ready", replica.reason
        assert replica.proof is not None and (replica.proof.text, replica.proof.tokens) == ("I am ready.", 4)
    finally:
        await replica.stop()


def test_its_command_line(program: Path, launch: Any) -> None:
    command = EdgellmServer(EdgellmSettings()).command(launch(slots=4))
    assert command.argv[:2] == (str(program), str(launch().model))
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    words = command.argv
    assert words[words.index("--max-batch-size") + 1] == "4" and "--enable-in-flight-batching" in words
    assert words[words.index("--max-kv-cache-capacity") + 1] == "1024"
    assert "--enable-in-flight-batching" not in EdgellmServer(EdgellmSettings()).command(launch()).argv
    program.rename(program.with_name("trtedge"))
    assert EdgellmServer(EdgellmSettings()).command(launch()).argv[1] == "serve"


def test_what_it_does_not_have_is_refused(program: Path, launch: Any, tmp_path: Path) -> None:
    server = EdgellmServer(EdgellmSettings())
    for values, words in (
        ({"kv_bits": 8}, "kv_bits = 8"),
        ({"speculation": "ngram"}, "speculation"),
        ({"accelerators": ("GPU-1", "GPU-2")}, "tensor_parallel = 2"),
        ({"accelerators": ()}, "needs a GPU"),
    ):
        with pytest.raises(ConfigError, match=words):
            server.command(launch(**values))
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        server.command(launch(model=tmp_path))
    assert not {"completions", "embeddings"} & server.abilities


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRIVERS", (tmp_path / "nvgpu",))
    assert "needs an NVIDIA GPU" in EdgellmServer(EdgellmSettings()).missing()
    (tmp_path / "nvgpu").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip install 'tensorrt-edgellm[server]'" in EdgellmServer(EdgellmSettings()).missing()
