"""Language models on Jetson and x86 GPUs, served by NVIDIA's TensorRT Edge-LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import LanguageServer


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.edgellm.settings import EdgellmSettings

    return EdgellmSettings


@hookimpl
def millhand_language_servers(config: Any) -> Sequence[LanguageServer]:
    from millhand_plugins.edgellm.server import EdgellmServer

    return [EdgellmServer(config)]
