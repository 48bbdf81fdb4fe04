"""Makes models smaller and faster: int8, int4, float16 and mixed precision, with learned rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import Maker


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.quantize.settings import QuantizeSettings

    return QuantizeSettings


@hookimpl
def millhand_makers() -> Sequence[Maker]:
    from millhand_plugins.quantize.maker import QuantizeMaker

    return [QuantizeMaker()]
