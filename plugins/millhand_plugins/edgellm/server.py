"""How TensorRT Edge-LLM's server is started. Held against the source and documentation of 0.11."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from millhand.errors import ConfigError, ModelError
from millhand.language.launch import Ability, Command, Launch, ServerFigures
from millhand_plugins.edgellm.settings import EdgellmSettings

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/nvgpu"), Path("/dev/nvhost-gpu"))
"""Of a card, and of a Jetson in either generation of its driver."""
UNIFIED = "trtedge"
"""The command that brings `serve` from 0.11.1 on."""


class EdgellmServer:
    """Implements `LanguageServer`."""

    name = "edgellm"
    formats: Sequence[str] = ("huggingface", "edgellm")
    abilities: frozenset[Ability] = frozenset(
        {"chat", "json_schema", "tools", "logprobs", "seed", "stop", "usage", "reasoning"}
    )

    def __init__(self, settings: EdgellmSettings) -> None:
        self._settings = settings

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        if not any(path.exists() for path in DRIVERS):
            return "it needs an NVIDIA GPU with its driver"
        if not self._program():
            return "TensorRT Edge-LLM is not installed: pip install 'tensorrt-edgellm[server]', beside TensorRT"
        return ""

    def command(self, launch: Launch) -> Command:
        """Raises ConfigError for what the server does not have, ModelError where the folder is no checkpoint."""
        _refuse_what_it_lacks(launch)
        if not (launch.model / "config.json").is_file():
            raise ModelError(
                f"'{launch.model}' is no checkpoint: it has no config.json",
                hint="add the model again, from a folder of Hugging Face's form",
            )
        program = self._program()
        if not program:
            raise ConfigError(f"[plugins.edgellm] binary = '{self._settings.binary}' is not there", hint=self.missing())
        environment = {
            "CUDA_VISIBLE_DEVICES": ",".join(launch.accelerators),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return Command((*program, os.fspath(launch.model), *self._arguments(launch)), environment)

    def figures(self, metrics: str) -> ServerFigures:
        """It has no page of metrics: nothing is known, and only /health tells that it hangs."""
        return ServerFigures()

    def _program(self) -> list[str]:
        own = shutil.which(os.fspath(self._settings.binary))
        if own is not None:
            return [own, "serve"] if Path(own).name == UNIFIED else [own]
        unified = shutil.which(UNIFIED)
        return [unified, "serve"] if unified else []

    def _arguments(self, launch: Launch) -> list[str]:
        settings = self._settings
        values: dict[str, object] = {
            "--served-model-name": launch.name,
            "--host": "127.0.0.1",
            "--port": launch.port,
            "--max-input-len": launch.context_tokens,
            "--max-kv-cache-capacity": launch.context_tokens,
            "--max-batch-size": launch.slots,
            "--max-queued-requests": launch.slots,  # the queue that counts is the gateway's
            "--engine-cache-max-size-gb": settings.cache_gb,
            "--reasoning-parser": "auto" if launch.reasoning else "none",
            "--tool-call-parser": settings.tool_parser,
            "--log-level": "warning",
        }
        if settings.cache_dir is not None:
            values["--cache-dir"] = settings.cache_dir
        flags = ["--enable-auto-tool-choice"]
        if settings.prefix_reuse:
            flags.append("--enable-context-reuse")
        if launch.slots > 1:
            flags.append("--enable-in-flight-batching")
        return [*(str(word) for pair in values.items() for word in pair), *flags, *settings.arguments]


def _refuse_what_it_lacks(launch: Launch) -> None:
    lacks = {
        f"tensor_parallel = {len(launch.accelerators)}": len(launch.accelerators) > 1,
        f"kv_bits = {launch.kv_bits}": launch.kv_bits != 16,
        f"speculation = '{launch.speculation}'": launch.speculation != "none",
    }
    for key, asked in lacks.items():
        if asked:
            raise ConfigError(
                f"[language] {key}: edgellm does not have this", hint="leave it out, or take another server"
            )
    if not launch.accelerators:
        raise ConfigError("edgellm needs a GPU, and none may be used", hint="take llamacpp: [language] server")
