"""Runs ONNX models with ONNX Runtime: on the CPU anywhere, on a GPU where its build and the driver allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import Backend


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.onnxruntime.settings import OnnxruntimeSettings

    return OnnxruntimeSettings


@hookimpl
def millhand_backends() -> Sequence[Backend]:
    from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend

    return [OnnxruntimeBackend()]
