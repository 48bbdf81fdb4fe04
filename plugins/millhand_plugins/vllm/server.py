"""How vLLM's server is started, and what it tells. Held against vLLM 0.23."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from millhand.errors import ConfigError, ModelError
from millhand.language.launch import Ability, Command, Launch, ServerFigures
from millhand.language.samples import read_samples
from millhand_plugins.vllm.settings import VllmSettings

MODULE = "vllm.entrypoints.openai.api_server"
CACHE_TYPES = {16: "auto", 8: "fp8"}
PROMPT_LOOKUP_MAX = 4
API_KEY = "VLLM_API_KEY"
"""vLLM asks for it at every path under /v1 (vllm/envs.py)."""
DRIVER = Path("/dev/nvidiactl")
# It reports to its makers unless told otherwise, and looks for files at a hub.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class VllmServer:
    """Implements `LanguageServer`."""

    name = "vllm"
    formats: Sequence[str] = ("huggingface",)

    def __init__(self, settings: VllmSettings) -> None:
        self._settings = settings
        plain: frozenset[Ability] = frozenset(
            {"chat", "completions", "embeddings", "json_schema", "logprobs", "seed", "stop", "usage", "reasoning"}
        )
        # Tools need a parser that suits the model.
        self.abilities: frozenset[Ability] = plain | {"tools"} if settings.tool_parser else plain

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        if not DRIVER.exists():
            return "it needs an NVIDIA GPU with its driver"
        interpreter = self._settings.interpreter
        if interpreter is not None:
            return "" if os.access(interpreter, os.X_OK) else f"[plugins.vllm] interpreter = '{interpreter}' cannot run"
        if shutil.which("vllm") is None and importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed: put it into an environment of its own and set [plugins.vllm] interpreter"
        return ""

    def command(self, launch: Launch) -> Command:
        """Raises ConfigError for what it lacks and without a GPU, ModelError for what is no checkpoint."""
        if not launch.accelerators:
            raise ConfigError("vllm needs a GPU, and none may be used", hint="take llamacpp: [language] server")
        if launch.kv_bits not in CACHE_TYPES:
            raise ConfigError(f"[language] kv_bits = {launch.kv_bits}: vllm has 16 and 8", hint="set it to 8 or 16")
        if launch.speculation not in ("none", "ngram"):
            raise ConfigError(
                f"[language] speculation = '{launch.speculation}': vllm has 'ngram' here",
                hint="set it to ngram or none",
            )
        if not (launch.model / "config.json").is_file():
            raise ModelError(
                f"'{launch.model}' is no checkpoint: it has no config.json",
                hint="add the model again, from a folder of Hugging Face's form",
            )
        return Command((*self._program(launch), *self._arguments(launch)), self._environment(launch))

    def figures(self, metrics: str) -> ServerFigures:
        """From vLLM's page, whose counters end in `_total`."""
        found = read_samples(metrics)
        return ServerFigures(
            running=found.get("vllm:num_requests_running"),
            waiting=found.get("vllm:num_requests_waiting"),
            kv_used=found.get("vllm:kv_cache_usage_perc"),
            prompt_tokens=found.get("vllm:prompt_tokens_total"),
            generated_tokens=found.get("vllm:generation_tokens_total"),
            steps=found.get("vllm:iteration_tokens_total_count"),
        )

    def _program(self, launch: Launch) -> list[str]:
        interpreter = self._settings.interpreter
        if interpreter is None and (found := shutil.which("vllm")) is not None:
            return [found, "serve", os.fspath(launch.model)]
        return [os.fspath(interpreter or sys.executable), "-m", MODULE, "--model", os.fspath(launch.model)]

    def _arguments(self, launch: Launch) -> list[str]:
        settings = self._settings
        values: dict[str, object] = {
            "--served-model-name": launch.name,
            "--host": "127.0.0.1",
            "--port": launch.port,
            "--max-model-len": launch.context_tokens,
            "--max-num-seqs": launch.slots,
            "--tensor-parallel-size": len(launch.accelerators),
            "--gpu-memory-utilization": settings.gpu_memory_share,
            "--dtype": settings.dtype,
            "--kv-cache-dtype": CACHE_TYPES[launch.kv_bits],
            "--uvicorn-log-level": "warning",
        }
        if settings.quantization:
            values["--quantization"] = settings.quantization
        if launch.reasoning:
            values["--reasoning-parser"] = settings.reasoning_parser
        if settings.tool_parser:
            values["--tool-call-parser"] = settings.tool_parser
        if launch.speculation == "ngram":
            values["--speculative-config"] = json.dumps({
                "method": "ngram",
                "num_speculative_tokens": settings.draft_tokens,
                "prompt_lookup_max": PROMPT_LOOKUP_MAX,
            })  # fmt: skip
        if launch.embeddings:
            values["--runner"] = "pooling"
        flags = ["--disable-uvicorn-access-log"]
        if settings.tool_parser:
            flags.append("--enable-auto-tool-choice")
        return [*(str(word) for pair in values.items() for word in pair), *flags, *settings.arguments]

    def _environment(self, launch: Launch) -> Mapping[str, str]:
        names = launch.accelerators if self._settings.device_uuids else [*map(_number, launch.accelerators)]
        key = {API_KEY: launch.api_key} if launch.api_key else {}
        return {**ENVIRONMENT, **key, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}


def _number(name: str) -> str:
    """A GPU's number in PCI bus order, which is NVML's. Raises ConfigError for what has none."""
    if name.isdecimal():
        return name
    if not name.startswith("GPU-"):
        raise ConfigError(
            f"vllm is given '{name}', and only vLLM after 0.23 takes a MIG slice",
            hint="with such a version set [plugins.vllm] device_uuids = true, or take llamacpp",
        )
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(name)))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ConfigError(f"GPU '{name}' is not there: {error}", hint="millhand hw show") from error
