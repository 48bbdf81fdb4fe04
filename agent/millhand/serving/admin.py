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

    def check(self, authorization: str) -> None:
        """Check what a request's `authorization` says. Raises PermissionDenied or TokenMissing, with the remedy."""
        if self._path is None:
            raise PermissionDenied(
                "models are not managed over this port",
                hint=f"use 'millhand model load', or set [{self._table}] admin_token_file",
            )
        try:
            token = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PermissionDenied(
                f"[{self._table}] admin_token_file = '{self._path}' cannot be read", hint="mend the file"
            ) from error
        if not token:
            raise PermissionDenied(f"[{self._table}] admin_token_file = '{self._path}' is empty", hint="mend the file")
        if not authorization:
            raise TokenMissing("managing models needs a token", hint="send 'authorization: Bearer <token>'")
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise PermissionDenied(
                "the token is not the right one", hint=f"send what stands in [{self._table}] admin_token_file"
            )
