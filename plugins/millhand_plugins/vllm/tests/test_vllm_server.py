"""vLLM's command line, held against the options of vLLM 0.23.0, and its page of figures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from millhand.errors import ConfigError, ModelError
from millhand.language.launch import Launch
from millhand_plugins.vllm import server as module
from millhand_plugins.vllm.server import VllmServer
from millhand_plugins.vllm.settings import VllmSettings

# Of `vllm serve` 0.23.0, those that we may give: with a value, and without.
VALUED = {
    "--model", "--served-model-name", "--host", "--port", "--max-model-len", "--max-num-seqs", "--tensor-parallel-size",
    "--gpu-memory-utilization", "--dtype", "--kv-cache-dtype", "--uvicorn-log-level", "--quantization",
    "--reasoning-parser", "--tool-call-parser", "--speculative-config", "--runner",
}  # fmt: skip
FLAGS = {"--disable-uvicorn-access-log", "--enable-auto-tool-choice"}
PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 1200.0
vllm:generation_tokens_total{engine="0",model_name="m"} 340.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 300.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 345.0
"""


@pytest.fixture
def launch(tmp_path: Path) -> Any:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")

    def make(**values: Any) -> Launch:
        usual = {"name": "m", "model": tmp_path / "m", "port": 9000, "context_tokens": 1024, "accelerators": ("3",)}
        return Launch(**{**usual, **values})

    return make


def options(argv: tuple[str, ...]) -> dict[str, str]:
    """Option -> value; fails on what vLLM 0.23 does not know."""
    found, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if word in FLAGS:
            found[word] = ""
        else:
            assert word in VALUED, word
            found[word] = words.pop(0)
    return found


def test_its_command_line(launch: Any) -> None:
    settings = VllmSettings(interpreter=Path(sys.executable), tool_parser="hermes", quantization="gptq")
    command = VllmServer(settings).command(
        launch(slots=64, accelerators=("0", "1"), kv_bits=8, speculation="ngram", reasoning=True)
    )
    assert command.argv[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    told = options(command.argv[3:])
    assert told["--model"].endswith("/m") and told["--served-model-name"] == "m"
    assert (told["--host"], told["--port"], told["--tensor-parallel-size"]) == ("127.0.0.1", "9000", "2")
    assert (told["--max-model-len"], told["--max-num-seqs"], told["--kv-cache-dtype"]) == ("1024", "64", "fp8")
    assert (told["--reasoning-parser"], told["--tool-call-parser"]) == ("deepseek_r1", "hermes")
    assert json.loads(told["--speculative-config"]) == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 4,
    }
    assert options(VllmServer(settings).command(launch(embeddings=True)).argv[3:])["--runner"] == "pooling"


def test_it_reports_to_nobody_and_sees_its_gpus_only(launch: Any) -> None:
    environment = VllmServer(VllmSettings()).command(launch(accelerators=("0", "2"))).environment
    silent = ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    assert {environment[name] for name in silent} == {"1"}
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    later = VllmServer(VllmSettings(device_uuids=True))
    assert later.command(launch(accelerators=("MIG-7",))).environment["CUDA_VISIBLE_DEVICES"] == "MIG-7"


def test_its_key_is_handed_on_unseen(launch: Any) -> None:
    command = VllmServer(VllmSettings()).command(launch(api_key="secret-key"))
    assert command.environment["VLLM_API_KEY"] == "secret-key" and "secret-key" not in " ".join(command.argv)


def test_a_program_on_path(launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    command = VllmServer(VllmSettings()).command(launch())
    assert command.argv[:3] == (str(program), "serve", str(tmp_path / "m"))
    options(command.argv[3:])


def test_a_uuid_becomes_a_number_and_a_slice_is_refused(launch: Any) -> None:
    """On a machine without the GPU it is said that it is not there."""
    with pytest.raises(ConfigError, match="GPU 'GPU-none' is not there"):
        VllmServer(VllmSettings()).command(launch(accelerators=("GPU-none",)))
    with pytest.raises(ConfigError, match=r"only vLLM after 0\.23 takes a MIG slice"):
        VllmServer(VllmSettings()).command(launch(accelerators=("MIG-7",)))


def test_what_it_does_not_have_is_refused(launch: Any, tmp_path: Path) -> None:
    server = VllmServer(VllmSettings())
    with pytest.raises(ConfigError, match="needs a GPU"):
        server.command(launch(accelerators=()))
    with pytest.raises(ConfigError, match=r"kv_bits = 4: vllm has 16 and 8"):
        server.command(launch(kv_bits=4))
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        server.command(launch(model=tmp_path))
    assert "tools" not in server.abilities
    assert "tools" in VllmServer(VllmSettings(tool_parser="hermes")).abilities


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRIVER", tmp_path / "nvidiactl")
    assert "needs an NVIDIA GPU" in VllmServer(VllmSettings()).missing()
    (tmp_path / "nvidiactl").touch()
    assert "cannot run" in VllmServer(VllmSettings(interpreter=tmp_path / "python")).missing()
    assert VllmServer(VllmSettings(interpreter=Path(sys.executable))).missing() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "set [plugins.vllm] interpreter" in VllmServer(VllmSettings()).missing()


def test_its_figures() -> None:
    figures = VllmServer(VllmSettings()).figures(PAGE)
    assert (figures.running, figures.waiting, figures.kv_used) == (3, 1, 0.25)
    assert (figures.prompt_tokens, figures.generated_tokens, figures.steps) == (1200, 340, 345)
