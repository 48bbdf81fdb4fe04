"""What the owner says of the hub: `hub.toml`, overlaid by MILLHAND_HUB__<KEY>."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from millhand.logs import LogSettings
from millhand.telemetry.settings import TelemetrySettings
from millhand.validation import StrictTable, read_toml, validate

PREFIX = "MILLHAND_HUB__"


class HubSettings(StrictTable):
    broker: str = "mqtt://127.0.0.1:1883"
    """Where nodes publish: `mqtt://host:port` or `mqtts://host:port`."""
    protocol: str = Field(default="3.1.1", pattern=r"^(3\.1\.1|5)$")
    """MQTT version."""
    host_id: str = "millhand-hub"
    """The Sparkplug host id: nodes find the hub's state at `spBv1.0/STATE/<id>`."""
    group: str = "+"
    """The group to receive; `+` for all."""
    data_dir: Path = Path("/var/lib/millhand-hub")
    """Where the database lives."""
    username: str = ""
    password_env: str = ""
    """Environment variable that holds the password."""
    password_file: Path | None = None
    """File that holds the password (its first line)."""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    commit_ms: int = Field(default=50, ge=1, le=10_000)
    """Rows are committed, and then acknowledged, at least so often."""
    keep_days: int = Field(default=0, ge=0)
    """Readings and predictions older than this are deleted; 0 keeps all. Alerts and orders are kept."""
    log: LogSettings = LogSettings()

    @field_validator("host_id", "group")
    @classmethod
    def _topic_safe(cls, value: str) -> str:
        if value != "+" and any(character in value for character in "/+# "):
            raise ValueError("must not hold '/', '+', '#' or a space (it becomes part of an MQTT topic)")
        return value

    @property
    def database_path(self) -> Path:
        return self.data_dir / "hub.db"

    def link(self) -> TelemetrySettings:
        """The same, as the settings of an MQTT session."""
        keys = ("username", "password_env", "password_file", "ca_file", "cert_file", "key_file", "protocol")
        shared = {key: getattr(self, key) for key in keys}
        return TelemetrySettings.model_validate({"enabled": True, "brokers": (self.broker,), **shared})


def load_settings(path: Path | None = None, environment: Mapping[str, str] | None = None) -> HubSettings:
    """Read and check the hub's configuration. Raises ConfigError naming file, key and value."""
    data: dict[str, Any] = read_toml(path) if path is not None else {}
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(PREFIX):
            data[name.removeprefix(PREFIX).lower()] = int(text) if text.isdecimal() else text
    return validate(HubSettings, data, f"hub config '{path}'" if path else "hub config")
