"""Tokens of clients: the file holds their hashes only, one a line: `name role sha256`.

A token is 32 random bytes, so a plain SHA-256 cannot be guessed backwards; passwords would need a slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from millhand.durable import write_durably
from millhand.errors import ConfigError, InputError
from millhand.owner import reading_group

TOKEN_PREFIX = "mh-"  # noqa: S105 - helps people and scanners to know one when they see it
AGENT_ROLE = "agent"
"""The role of the agent's own questions; no client's token may have it."""
LOOK_EVERY_S = 1.0
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Token(NamedTuple):
    """One line of the file."""

    name: str
    """Whose token it is."""
    role: str
    sha256: str


def hashed(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: Path) -> list[Token]:
    """Read the file. Raises ConfigError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        writable = path.stat().st_mode & 0o022
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"[gateway] tokens_file = '{path}' cannot be read: {error}", hint="millhand gateway token NAME makes it"
        ) from error
    if writable:
        raise ConfigError(
            f"[gateway] tokens_file = '{path}' can be written by others than its owner", hint=f"chmod 600 {path}"
        )
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 3 or not _HASH.fullmatch(words[2]) or words[1] == AGENT_ROLE:
            raise ConfigError(
                f"'{path}', line {number} is not 'name role sha256'", hint="mend it, or delete it and make a new token"
            )
        found.append(Token(*words))
    return found


def add_token(path: Path, name: str, role: str) -> str:
    """Write a new token's hash to the file and return the token, which is kept nowhere.

    Raises InputError for a name that is there or cannot be, ConfigError where the file is broken or cannot be written.
    """
    for key, word in (("name", name), ("role", role)):
        if not _WORD.fullmatch(word):
            raise InputError(f"{key} '{word}' cannot be", hint="use letters, digits, '_', '.' or '-', at most 64")
    if role == AGENT_ROLE:
        raise InputError(f"role '{role}' is the node's own", hint="choose another, such as operator")
    tokens = read_tokens(path) if path.exists() else []
    if any(token.name == name for token in tokens):
        raise InputError(f"'{name}' has a token already", hint=f"take it back first: millhand gateway revoke {name}")
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    write_tokens(path, [*tokens, Token(name, role, hashed(token))])
    return token


def write_tokens(path: Path, tokens: Sequence[Token]) -> None:
    """Write the whole file, for its owner's eyes, and where root writes for the agent's. Raises ConfigError."""
    text = "".join(f"{' '.join(token)}\n" for token in tokens)
    try:
        group = reading_group(path)
        write_durably(path, text.encode(), 0o600 if group is None else 0o640, group)
    except OSError as error:
        raise ConfigError(
            f"[gateway] tokens_file = '{path}' cannot be written: {error.strerror}", hint="name another file"
        ) from error


class TokenKeeper:
    """Knows the tokens that hold now; the file is read again when it changes, so that a token can be taken back."""

    def __init__(self, path: Path | None, agent_sha256: str = "") -> None:
        """`agent_sha256`: the hash of the agent's own token. Raises ConfigError where the file is broken."""
        self._path = path
        self._agent = agent_sha256
        self._tokens = [] if path is None else read_tokens(path)
        self._stamp = self._stamped()
        self._looked_s = time.monotonic()

    @property
    def asks(self) -> bool:
        """Whether clients need a token."""
        return self._path is not None

    def caller(self, authorization: str) -> Token | None:
        """Whose token stands in an `Authorization` header; None where it is nobody's.

        Each hash is compared in full, in constant time.
        """
        scheme, _, shown = authorization.partition(" ")
        if scheme.lower() != "bearer" or not shown:
            return None
        digest = hashed(shown.strip())
        self._look()
        found = None
        if self._agent and hmac.compare_digest(digest, self._agent):
            found = Token(AGENT_ROLE, AGENT_ROLE, self._agent)
        for token in self._tokens:
            if hmac.compare_digest(digest, token.sha256):
                found = token
        return found

    def _look(self) -> None:
        """Read the file again where it has changed. One that is broken now lets nobody in."""
        now_s = time.monotonic()
        if self._path is None or now_s < self._looked_s + LOOK_EVERY_S:
            return
        self._looked_s = now_s
        stamp = self._stamped()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = read_tokens(self._path)
        except ConfigError:
            self._tokens = []

    def _stamped(self) -> tuple[int, ...]:
        if self._path is None:
            return ()
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino
