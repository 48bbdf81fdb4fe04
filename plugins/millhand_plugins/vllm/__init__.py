"""Language models of Hugging Face's form on NVIDIA GPUs, served by vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import LanguageServer


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.vllm.settings import VllmSettings

    return VllmSettings


@hookimpl
def millhand_language_servers(config: Any) -> Sequence[LanguageServer]:
    from millhand_plugins.vllm.server import VllmServer

    return [VllmServer(config)]
