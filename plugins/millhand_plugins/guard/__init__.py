"""Guards around language models: what comes in, what the model is told and allowed, what goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import Guard


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.guard.settings import GuardSettings

    return GuardSettings


@hookimpl
def millhand_guards(config: Any) -> Sequence[Guard]:
    from millhand.language.pack import GuardTerms, PackSettings, find_pack
    from millhand_plugins.guard.input import InputGuard
    from millhand_plugins.guard.output import OutputGuard
    from millhand_plugins.guard.policy import PolicyGuard

    field = (
        find_pack(PackSettings(name=config.pack, folders=config.pack_folders)).guard if config.pack else GuardTerms()
    )
    return [InputGuard(config.input, field), PolicyGuard(config.model), OutputGuard(config.output)]
