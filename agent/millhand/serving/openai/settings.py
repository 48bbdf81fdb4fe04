"""What the owner may say about the gateway: the table `[gateway]`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from millhand.validation import StrictTable


class RateSettings(StrictTable):
    requests_per_minute: int = Field(default=0, ge=0)
    """Requests that clients of this role may begin in a minute, together; 0 sets no limit."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Tokens, read and written, that they may use in a minute; counted when an answer ends, 0 sets no limit."""


class GatewaySettings(StrictTable):
    enabled: bool | Literal["auto"] = "auto"
    """Serve OpenAI's API; `auto` does where [language] names a model."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback until you say otherwise, which needs a tokens_file."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port (`millhand` shows it)."""
    processes: int = Field(default=0, ge=0, le=64)
    """Processes that accept on the port; 0 takes one for every two CPUs, 1 to 4. Rates are shared out among them."""
    tokens_file: Path | None = None
    """File with the hashes of clients' tokens (`millhand gateway token` writes it). None asks for no token."""
    rates: dict[str, RateSettings] = {}
    """Role of a token -> its limits; `default` holds for roles without an entry, and where no token is asked for."""
    streams_cap: int = Field(default=128, ge=1)
    """Requests that one process gives to language servers at once."""
    queue: int = Field(default=128, ge=0)
    """Requests that may wait in a process beyond that; more are answered 503 with Retry-After."""
    queue_wait_s: float = Field(default=30, gt=0)
    """A request that waits longer is answered 503 with Retry-After."""
    connections_cap: int = Field(default=1024, ge=1)
    """Connections of one process; more are closed."""
    body_bytes_cap: int = Field(default=4 << 20, ge=1024)
    """A larger request is refused with 413, before it is read."""
    request_timeout_s: float = Field(default=10, gt=0)
    """A request whose head or body takes longer to come ends with its connection."""
    first_token_s: float = Field(default=60, gt=0)
    """A streamed answer must begin within so long after the server got the request."""
    idle_s: float = Field(default=30, gt=0)
    """A streamed answer ends with an error where the server is silent, or the client does not read, for so long."""
    deadline_s: float = Field(default=600, gt=0)
    """No answer takes longer, from the request on."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may ask, as `https://host:port`; empty: none."""
    audit: Literal["findings", "all", "none"] = "findings"
    """What of the guards' decisions is written to `audit/guards.jsonl` in [node] data_dir: what was changed or refused,
    or what passed as well. Texts are never written, only their hashes."""
    audit_bytes_cap: int = Field(default=8 << 20, ge=1 << 16)
    """The file is begun anew at half of this; the one before is kept as `guards.jsonl.1`."""
    access_log: bool = False
    """Write a line to the log for each request: method, path, status, bytes, time, trace id."""
    access_log_per_minute: int = Field(default=600, ge=1)
    """At most so many of these lines a minute from each process; the rest is counted and said once."""

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> GatewaySettings:
        if self.tokens_file is None and not _loopback(self.host):
            raise ValueError(
                f"host = '{self.host}' is reached from outside, and no token is asked for; name a tokens_file "
                "(millhand gateway token NAME makes one), or listen on 127.0.0.1"
            )
        return self


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
