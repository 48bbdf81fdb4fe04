"""`[plugins.webhook]`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from millhand.errors import ConfigError
from millhand.validation import StrictTable


class WebhookConfig(StrictTable):
    url: str
    """Where to POST, https:// or http://."""
    secret_env: str = ""
    """Environment variable that holds the signing secret."""
    secret_file: Path | None = None
    """File that holds the signing secret (its first line)."""
    records: tuple[Literal["alert", "order"], ...] = ("alert", "order")
    """What to send."""
    timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Give up on one whole request after so long; the record is sent again later."""
    refusals_cap: int = Field(default=5, ge=1)
    """A record that the other side cannot take (400, 409, 410, 413, 415, 422) is given up after so many offers."""
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""

    @field_validator("url")
    @classmethod
    def _absolute(cls, value: str) -> str:
        parts = urlsplit(value)
        _ = parts.port  # raises ValueError for a port that is none
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an absolute http:// or https:// address")
        if parts.username or parts.password:
            raise ValueError("must not hold a user name or a password; the signature authenticates us")
        return value

    @model_validator(mode="after")
    def _one_secret(self) -> WebhookConfig:
        if bool(self.secret_env) == (self.secret_file is not None):
            raise ValueError("give the signing secret by exactly one of secret_env and secret_file")
        return self

    def secret(self) -> bytes:
        """Read the secret. Raises ConfigError naming where it should be."""
        if self.secret_env:
            text = os.environ.get(self.secret_env, "")
            place = f"environment variable '{self.secret_env}'"
        else:
            assert self.secret_file is not None
            try:
                text = (self.secret_file.read_text(encoding="utf-8").splitlines() or [""])[0]
            except OSError as error:
                raise ConfigError(
                    f"[plugins.webhook] secret_file = '{self.secret_file}' cannot be read: {error.strerror}",
                    hint="create it, readable for the agent's user alone",
                ) from error
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"[plugins.webhook] secret_file = '{self.secret_file}' is not UTF-8 text",
                    hint="put a random text there, for example of 'openssl rand -hex 32'",
                ) from error
            place = f"file '{self.secret_file}'"
        if not text.strip():
            raise ConfigError(f"[plugins.webhook]: {place} holds no secret", hint="put a random text there")
        return text.strip().encode()
