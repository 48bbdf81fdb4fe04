"""The command lines of llama.cpp's server, and its page of figures as xllamacpp wrote it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from millhand.errors import ConfigError, ModelError
from millhand.language.launch import Launch
from millhand_plugins.llamacpp.server import LlamacppServer
from millhand_plugins.llamacpp.settings import LlamacppSettings

PAGE = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 33
llamacpp:tokens_predicted_total 8
llamacpp:n_decode_total 9
llamacpp:requests_processing 1
llamacpp:requests_deferred 2
llamacpp:n_busy_slots_per_decode nan
"""


@pytest.fixture
def launch(tmp_path: Path) -> Any:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF and so on")

    def make(**values: Any) -> Launch:
        return Launch(**{"name": "m", "model": model, "port": 9000, "context_tokens": 1024, "slots": 2, **values})

    return make


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-server on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "llama-server"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return path


def pairs(argv: tuple[str, ...]) -> dict[str, str]:
    return {word: argv[index + 1] for index, word in enumerate(argv[:-1]) if word.startswith("--")}


def test_a_native_server_is_preferred(launch: Any, native: Path) -> None:
    server = LlamacppServer(LlamacppSettings())
    assert server.missing() == ""
    command = server.command(launch(threads=3, kv_bits=8, speculation="ngram", accelerators=("GPU-1", "GPU-2")))
    told = pairs(command.argv)
    assert command.argv[0] == str(native) and command.note.endswith(str(native))
    assert (told["--ctx-size"], told["--parallel"], told["--port"]) == ("2048", "2", "9000")
    assert (told["--cache-type-k"], told["--cache-type-v"], told["--threads"]) == ("q8_0", "q8_0", "3")
    assert (told["--host"], told["--alias"], told["--spec-type"]) == ("127.0.0.1", "m", "ngram-map-k")
    assert {"--metrics", "--jinja", "--offline"} <= set(command.argv) and "--embeddings" not in command.argv
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"
    further = LlamacppServer(LlamacppSettings(arguments=("--ctx-size", "99")))
    assert further.command(launch(embeddings=True)).argv[-3:] == ("--embeddings", "--ctx-size", "99")


def test_else_xllamacpp_on_the_cpu(launch: Any, native: Path) -> None:
    server = LlamacppServer(LlamacppSettings(use="xllamacpp", prompt_cache_mib=7))
    command = server.command(launch(kv_bits=4, accelerators=("GPU-1",)))
    assert command.argv[:3] == (sys.executable, "-m", "millhand_plugins.llamacpp.serve")
    told = json.loads(command.argv[3])
    assert (told["context_tokens"], told["slots"], told["cache_type"], told["prompt_cache_mib"]) == (2048, 2, "q4_0", 7)
    assert command.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "on the CPU; a llama-server on PATH could use the GPU" in command.note
    with pytest.raises(ConfigError, match="tensor_parallel = 2, but xllamacpp computes on the CPU"):
        server.command(launch(accelerators=("GPU-1", "GPU-2")))


@pytest.mark.parametrize("use", ["native", "xllamacpp"])
def test_its_key_is_handed_on_unseen(launch: Any, native: Path, use: Any) -> None:
    command = LlamacppServer(LlamacppSettings(use=use, binary=native)).command(launch(api_key="secret-key"))
    assert command.environment["LLAMA_API_KEY"] == "secret-key"
    assert "secret-key" not in " ".join(command.argv)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    server = LlamacppServer(LlamacppSettings(use="native", binary=Path("no-such-server")))
    assert "no llama-server at 'no-such-server'" in server.missing()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = LlamacppServer(LlamacppSettings(binary=Path("no-such-server"))).missing()
    assert "pip install 'millhand[language]'" in missing


def test_what_is_no_gguf_is_refused(launch: Any, tmp_path: Path) -> None:
    server = LlamacppServer(LlamacppSettings(use="xllamacpp"))
    other = tmp_path / "m.bin"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is no GGUF file: it begins with b'PK"):
        server.command(launch(model=other))
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        server.command(launch(model=tmp_path / "none.gguf"))


def test_its_figures() -> None:
    figures = LlamacppServer(LlamacppSettings()).figures(PAGE)
    assert (figures.running, figures.waiting, figures.kv_used) == (1, 2, None)
    assert (figures.prompt_tokens, figures.generated_tokens, figures.steps) == (33, 8, 9)
    assert LlamacppServer(LlamacppSettings()).figures("nonsense").steps is None
