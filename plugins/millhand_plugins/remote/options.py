"""What a worker is told: the artifact, a TOML file that says where the upstream is, and the options.

Imported in workers: Python 3.10, no pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import msgspec

from millhand.errors import ModelError, suggestion

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Table = TypeVar("Table", bound=msgspec.Struct)

OWNERS_KEYS = ("hosts", "threads", "memory_bytes_cap")
"""Options that are not the model's to set, or not this backend's."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Fallback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `[fallback]`: a local artifact that answers while no upstream does."""

    backend: str
    artifact: str
    """Path, from the file's folder."""
    plugin: str = ""
    """The module that brings the backend; empty: the plugin of the same name."""
    options: dict[str, Any] = {}
    """As in `[plugins.<backend>]`."""


class UpstreamFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The artifact of a remote model. Paths are relative to its folder."""

    urls: tuple[str, ...]
    """`http://host:port` or `https://host:port`, with a path where the protocol lies below one; the first is asked
    first."""
    model: str
    """The model's name there."""
    version: str = ""
    """Its version there; empty: the upstream chooses."""
    token_file: str = ""
    """A file whose first line goes along as `Authorization: Bearer`; only over https, or to this machine."""
    token_header: str = "Authorization"  # noqa: S105 (a name)
    """The header for the token; another one than Authorization gets the token alone."""
    ca_file: str = ""
    """Certificates to trust in place of the system's (PEM)."""
    fallback: Fallback | None = None


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[plugins.remote]` with what model.toml says under `[options]`; settings.py has meanings and defaults."""

    require_upstream: bool
    connect_timeout_ms: Positive
    timeout_ms: Positive
    patience_ms: Positive
    answer_bytes_cap: Count
    failures: Count
    failure_rate: Share
    rate_window: Count
    retry_ms: Positive
    retry_cap_ms: Positive
    fallback_reserve_ms: Annotated[float, msgspec.Meta(ge=0)]
    fallback_lazy: bool


def read_upstream_file(path: Path) -> UpstreamFile:
    """Read and check the artifact. Raises ModelError naming file, key and value."""
    try:
        table = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}", hint="mend `artifact` in model.toml") from error
    except ImportError as error:
        raise ModelError(
            f"'{path}' cannot be read: this Python knows no TOML",
            hint="install tomli for the workers' interpreter",
        ) from error
    except msgspec.DecodeError as error:
        raise ModelError(f"'{path}' is no TOML: {error}", hint="mend the named line") from error
    file = _convert(table, UpstreamFile, f"'{path}'")
    if not file.urls or len(set(file.urls)) < len(file.urls):
        raise ModelError(f"'{path}': key 'urls' = {list(file.urls)}: give at least one URL, each once")
    for url in file.urls:
        _check_url(url, file, path)
    if file.fallback is not None and file.fallback.backend == "remote":
        raise ModelError(
            f"'{path}': key 'fallback.backend' = 'remote': a fallback is local",
            hint="add further upstreams to `urls`",
        )
    return file


def read_policy(options: Mapping[str, Any]) -> Policy:
    """Check the options. Raises ModelError naming the key."""
    own = {key: value for key, value in options.items() if key not in OWNERS_KEYS}
    return _convert(own, Policy, "options of backend 'remote'")


def check_hosts(urls: tuple[str, ...], hosts: tuple[str, ...]) -> None:
    """Raise ModelError for a URL that the owner has not listed in `hosts`."""
    for url in urls:
        parts = split(url)
        netloc = f"{parts.hostname}:{port_of(parts)}"
        if not {netloc, parts.hostname} & {host.lower().replace("[", "").replace("]", "") for host in hosts}:
            raise ModelError(
                f"tensors may not be sent to '{url}': '{netloc}' is not among [plugins.remote] hosts = {list(hosts)}",
                hint=f"if they may leave this node, add '{netloc}' to hosts and restart the agent",
            )


def read_token(file: UpstreamFile, folder: Path) -> tuple[str, str] | None:
    """(header, value) that authenticates us, read anew each time. Raises ModelError naming the file."""
    if not file.token_file:
        return None
    path = folder / file.token_file
    try:
        token = (path.read_text(encoding="ascii").splitlines() or [""])[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise ModelError(
            f"token_file = '{path}' cannot be read: {reason}", hint="create it, readable for the agent's user alone"
        ) from error
    if not token.isprintable() or not token:
        raise ModelError(f"token_file = '{path}' holds no token", hint="put the token into its first line")
    return file.token_header, f"Bearer {token}" if file.token_header.lower() == "authorization" else token


def split(url: str) -> SplitResult:
    """The parts of a URL that `read_upstream_file` has checked."""
    return urlsplit(url)


def port_of(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _check_url(url: str, file: UpstreamFile, path: Path) -> None:
    where = f"'{path}': key 'urls' = '{url}'"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
        raise ModelError(f"{where} is no URL", hint="write http://host:port or https://host:port")
    if parts.username or parts.password or parts.query or parts.fragment or " " in url:
        raise ModelError(f"{where}: only host, port and path may stand there", hint="give a token by token_file")
    if file.token_file and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ModelError(
            f"{where}: a token would go there for everyone on the way to read", hint="use https, or no token_file"
        )


def _convert(table: Any, model: type[Table], where: str) -> Table:
    try:
        return msgspec.convert(table, model)
    except msgspec.ValidationError as error:
        known = model.__struct_fields__
        unknown = [key for key in table if key not in known]
        guess = suggestion(unknown[0], known) if unknown else ""
        raise ModelError(f"{where}: {error}{guess}", hint="mend the key; the plugin's README has them all") from error
