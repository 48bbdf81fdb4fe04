"""Builds TensorRT engines from ONNX models and runs them: TensorRT (JetPack, containers) and TensorRT-RTX (pip)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import Backend, Maker


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.tensorrt.settings import TensorrtSettings

    return TensorrtSettings


@hookimpl
def millhand_backends() -> Sequence[Backend]:
    from millhand_plugins.tensorrt.backend import TensorrtBackend

    return [TensorrtBackend()]


@hookimpl
def millhand_makers(config: Any) -> Sequence[Maker]:
    from millhand_plugins.tensorrt.maker import TensorrtMaker

    return [TensorrtMaker(config)]
