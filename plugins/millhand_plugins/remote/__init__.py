"""Models that another server answers: Open Inference Protocol v2 over HTTP, with a local artifact to fall back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millhand.hookspecs import hookimpl

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.hookspecs import Backend


@hookimpl
def millhand_config() -> type[BaseModel]:
    from millhand_plugins.remote.settings import RemoteSettings

    return RemoteSettings


@hookimpl
def millhand_backends(config: Any) -> Sequence[Backend]:
    from millhand_plugins.remote.backend import RemoteBackend

    return [RemoteBackend(tuple(config.hosts))]
