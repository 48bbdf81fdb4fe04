"""Who may load and unload models over the network: who knows the token in a file of the owner's."""

from __future__ import annotations

import hmac
from pathlib import Path

from millhand.errors import MillhandError


class PermissionDenied(MillhandError):
    """The caller may not do this."""

    code = "permission"


class TokenMissing(PermissionDenied):
    """The caller did not say who it is."""


class AdminToken:
    """The token of one table of the configuration. The file is read at each check, so that it can be exchanged."""

    def __init__(self, path: Path | None, table: str) -> None:
        """`table` is the configuration's, such as `grpc`."""
        self._path = path
        self._table = table

    def read(self) -> str:
        """What stands in the file. Raises PermissionDenied where that is no token, or where none is set."""
        if self._path is None:
            raise PermissionDenied(
                "models are not managed over this port",
                hint=f"use 'millhand model load', or set [{self._table}] admin_token_file",
            )
        key = f"[{self._table}] admin_token_file = '{self._path}'"
        try:
            token = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise PermissionDenied(f"{key} cannot be read: {reason}", hint="mend the file or the key") from error
        if not token:
            raise PermissionDenied(f"{key} is empty", hint="put a token into it: openssl rand -hex 24")
        return token

    def check(self, authorization: str) -> None:
        """Check what a request's `authorization` says. Raises PermissionDenied or TokenMissing, with the remedy."""
        token = self.read()
        if not authorization:
            raise TokenMissing("managing models needs a token", hint="send 'authorization: Bearer <token>'")
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise PermissionDenied(
                "the token is not the right one", hint=f"send what stands in [{self._table}] admin_token_file"
            )
