"""What the owner says of the way to the hub: the table `[telemetry]`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from millhand.errors import ConfigError
from millhand.validation import StrictTable

SCHEMES = {"mqtt": 1883, "mqtts": 8883}


class TelemetrySettings(StrictTable):
    enabled: bool = False
    """Publish to a broker. Without it everything stays in the store."""
    brokers: tuple[str, ...] = ()
    """`mqtt://host:port` or `mqtts://host:port`; the next one is tried when one fails."""
    protocol: Literal["3.1.1", "5"] = "3.1.1"
    """MQTT version."""
    delivery: Literal["acknowledged", "session"] = "acknowledged"
    """acknowledged: millhand's hub acknowledges what it stored; session: for a host that never acknowledges, rows count
    as delivered once the broker has them while `primary_host` is online."""
    primary_host: str = ""
    """Sparkplug host id to wait for (`spBv1.0/STATE/<id>`); empty publishes without waiting."""
    username: str = ""
    password: str = Field(default="", repr=False)
    """Better: password_env or password_file."""
    password_env: str = ""
    """Environment variable that holds the password."""
    password_file: Path | None = None
    """File that holds the password (its first line)."""
    ca_file: Path | None = None
    """Certificates to trust instead of the system's (mqtts)."""
    cert_file: Path | None = None
    """This node's certificate (mqtts)."""
    key_file: Path | None = None
    """The certificate's key."""
    keepalive_s: int = Field(default=30, ge=5, le=600)
    """A connection that is silent for 1.5 times as long is dead."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    backoff_first_s: float = Field(default=0.5, gt=0)
    """Pause after a failed connection; doubled up to `backoff_last_s`."""
    backoff_last_s: float = Field(default=30.0, gt=0)
    ack_timeout_s: float = Field(default=15.0, gt=0)
    """Rows that the hub has not acknowledged after so long are sent again."""
    in_flight_rows: int = Field(default=2000, ge=1)
    """At most so many rows of a stream are sent beyond the last acknowledged one."""

    @field_validator("brokers")
    @classmethod
    def _known_schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in SCHEMES or not parts.hostname:
                raise ValueError(f"'{url}' must be mqtt://host[:port] or mqtts://host[:port]")
            if parts.username or parts.password:
                raise ValueError("must not hold a user name or a password; use username and password_env")
        return value

    @field_validator("primary_host")
    @classmethod
    def _topic_safe(cls, value: str) -> str:
        if any(character in value for character in "/+# "):
            raise ValueError("must not hold '/', '+', '#' or a space (it becomes part of an MQTT topic)")
        return value

    @model_validator(mode="after")
    def _complete(self) -> TelemetrySettings:
        if self.enabled and not self.brokers:
            raise ValueError("telemetry is enabled but brokers is empty; name one, such as mqtt://broker:1883")
        if self.delivery == "session" and not self.primary_host:
            raise ValueError("delivery 'session' trusts the primary host's STATE; name it in primary_host")
        if sum(map(bool, (self.password, self.password_env, self.password_file))) > 1:
            raise ValueError("give the password by one of password, password_env and password_file")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file belong together")
        return self

    def secret(self) -> str:
        """The password, from wherever it is. Raises ConfigError naming the place."""
        if self.password_env:
            if self.password_env not in os.environ:
                raise ConfigError(
                    f"[telemetry] password_env: environment variable '{self.password_env}' is not set",
                    hint="set it for the agent's service",
                )
            return os.environ[self.password_env]
        if self.password_file is not None:
            try:
                return self.password_file.read_text(encoding="utf-8").splitlines()[0]
            except (OSError, IndexError) as error:
                raise ConfigError(
                    f"[telemetry] password_file = '{self.password_file}' cannot be read: {error}",
                    hint="create it, readable for the agent's user alone",
                ) from error
        return self.password
