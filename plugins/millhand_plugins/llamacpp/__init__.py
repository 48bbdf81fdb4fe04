"""Language models in GGUF files, served by llama.cpp: a native llama-server, else the one inside xllamacpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import LanguageServer


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.llamacpp.settings import LlamacppSettings

    return LlamacppSettings


@hookimpl
def millhand_language_servers(config: Any) -> Sequence[LanguageServer]:
    from millhand_plugins.llamacpp.server import LlamacppServer

    return [LlamacppServer(config)]
