"""What the owner says of the hub: `hub.toml`, overlaid by MILLHAND_HUB__<KEY>."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from millhand.log_settings import LogSettings
from millhand.telemetry.settings import LinkSettings, check_topic_level, check_url
from millhand.validation import read_toml, validate

PREFIX = "MILLHAND_HUB__"


class HubSettings(LinkSettings):
    broker: str = "mqtt://127.0.0.1:1883"
    """Where nodes publish: `mqtt://host:port` or `mqtts://host:port`."""
    host_id: str = "millhand-hub"
    """The Sparkplug host id: nodes find the hub's state at `spBv1.0/STATE/<id>`."""
    group: str = "+"
    """The group to receive; `+` for all."""
    data_dir: Path = Path("/var/lib/millhand-hub")
    """Where the database lives."""
    commit_ms: int = Field(default=50, ge=1, le=10_000)
    """Rows are committed, and then acknowledged, at least so often."""
    keep_days: int = Field(default=0, ge=0)
    """Readings and predictions older than this are deleted; 0 keeps all. Alerts and orders are kept."""
    log: LogSettings = LogSettings()

    @field_validator("broker")
    @classmethod
    def _broker_is_a_url(cls, value: str) -> str:
        return check_url(value)

    @field_validator("host_id", "group")
    @classmethod
    def _topic_safe(cls, value: str, info: ValidationInfo) -> str:
        if not value:
            raise ValueError("must not be empty (it becomes part of an MQTT topic)")
        return value if value == "+" and info.field_name == "group" else check_topic_level(value)

    @property
    def database_path(self) -> Path:
        return self.data_dir / "hub.db"


def load_settings(path: Path | None = None, environment: Mapping[str, str] | None = None) -> HubSettings:
    """Read and check the hub's configuration. Raises ConfigError naming file, key and value."""
    data: dict[str, Any] = read_toml(path) if path is not None else {}
    variables: dict[tuple[str, ...], str] = {}
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(PREFIX):
            key = name.removeprefix(PREFIX).lower()
            data[key], variables[(key,)] = text, name
    return validate(HubSettings, data, f"hub config '{path}'" if path else "hub config", variables)
