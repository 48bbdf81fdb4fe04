"""What the owner says of the way to the hub: the table `[telemetry]`, and what every MQTT connection needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from millhand.errors import ConfigError
from millhand.validation import StrictTable

SCHEMES = {"mqtt": 1883, "mqtts": 8883}


class LinkSettings(StrictTable):
    """How to connect to a broker; the node's and the hub's settings hold the same keys."""

    protocol: Literal["3.1.1", "5"] = "3.1.1"
    """MQTT version."""
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
    """Our own certificate (mqtts)."""
    key_file: Path | None = None
    """The certificate's key."""
    keepalive_s: int = Field(default=30, ge=5, le=600)
    """A connection that is silent for 1.5 times as long is dead."""
    connect_timeout_s: float = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _link_is_complete(self) -> Self:
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
                    f"password_env = '{self.password_env}': this environment variable is not set",
                    hint="set it for the service that connects",
                )
            return os.environ[self.password_env]
        if self.password_file is not None:
            return read_password(self.password_file)
        return self.password


def read_password(path: Path) -> str:
    """The first line of a password file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"password_file = '{path}' cannot be read: {error}",
            hint="name a file whose first line is the broker's password, and which nobody else may read",
        ) from error


def check_url(url: str) -> str:
    """Return a broker's URL if it is one. Raises ValueError with what is wrong."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError(f"'{url}' must be mqtt://host[:port] or mqtts://host[:port]")
    if parts.username or parts.password:
        raise ValueError("must not hold a user name or a password; use username and password_env")
    _ = parts.port  # urlsplit raises ValueError for a port out of range only when it is asked
    return url


def check_topic_level(text: str) -> str:
    """Return `text` if it can be one level of a topic. Raises ValueError."""
    if any(character in text for character in "/+# \0"):
        raise ValueError("must not hold '/', '+', '#' or a space (it becomes part of an MQTT topic)")
    return text


class TelemetrySettings(LinkSettings):
    enabled: bool = False
    """Publish to a broker. Without it everything stays in the store."""
    brokers: tuple[str, ...] = ()
    """`mqtt://host:port` or `mqtts://host:port`; the next one is tried when one fails."""
    delivery: Literal["acknowledged", "session"] = "acknowledged"
    """acknowledged: millhand's hub acknowledges what it stored; session: for a host that never acknowledges, rows count
    as delivered once the broker has them while `primary_host` is online."""
    primary_host: str = ""
    """Sparkplug host id to wait for (`spBv1.0/STATE/<id>`); empty publishes without waiting."""
    backoff_first_s: float = Field(default=0.5, gt=0)
    """Pause after a failed connection; doubled up to `backoff_last_s`."""
    backoff_last_s: float = Field(default=30.0, gt=0)
    ack_timeout_s: float = Field(default=15.0, gt=0)
    """Rows that the hub has not acknowledged after so long are sent again."""
    in_flight_rows: int = Field(default=2000, ge=1)
    """At most so many rows of a stream are sent beyond the last acknowledged one."""
    in_flight_bytes: int = Field(default=32 * 1024 * 1024, ge=1)
    """And about so many bytes, so that a hub that falls behind need not hold more for this node."""

    @field_validator("brokers")
    @classmethod
    def _brokers_are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_url, value))

    @field_validator("primary_host")
    @classmethod
    def _topic_safe(cls, value: str) -> str:
        return check_topic_level(value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.enabled and not self.brokers:
            raise ValueError("telemetry is enabled but brokers is empty; name one, such as mqtt://broker:1883")
        if self.delivery == "session" and not self.primary_host:
            raise ValueError("delivery 'session' trusts the primary host's STATE; name it in primary_host")
        return self
