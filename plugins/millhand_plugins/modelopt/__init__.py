"""int8 by NVIDIA's Model Optimizer (ModelOpt), in a process and an interpreter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import Maker
    from millhand_plugins.modelopt.settings import ModeloptSettings


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.modelopt.settings import ModeloptSettings

    return ModeloptSettings


@hookimpl
def millhand_makers(config: ModeloptSettings) -> Sequence[Maker]:
    from millhand_plugins.modelopt.maker import ModeloptMaker

    return [ModeloptMaker(str(config.python))]
