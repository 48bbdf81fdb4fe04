"""POSTs one record a request, signed; only a 2xx answer counts as delivered.

Signature: `X-Millhand-Signature: t=<unix seconds>,v1=<hex>`, the HMAC-SHA256 (RFC 2104) of `<t>.<body>` under the
shared secret. `Idempotency-Key` is the same whenever the same change of a record is sent again, so that the other side
can drop a repetition.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import logging
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec

from millhand import __version__
from millhand.errors import SinkError
from millhand.records import Alert, WorkOrder
from millhand_plugins.webhook.settings import WebhookConfig

log = logging.getLogger("millhand.webhook")

CANNOT_BE_TAKEN = frozenset({400, 409, 410, 413, 415, 422})
"""Answers that blame the record itself. Every other refusal (a wrong secret, a moved address, too many requests) is
mended on one side or the other, and no record may be lost over it."""


def sign(secret: bytes, body: bytes, unix_s: int) -> str:
    """The value of the signature header."""
    digest = hmac.new(secret, f"{unix_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={unix_s},v1={digest}"


class WebhookSink:
    """Sends alerts and work orders. `given_up` counts records that the other side refused for good."""

    name = "webhook"

    def __init__(self, config: WebhookConfig) -> None:
        """Raises ConfigError where the secret cannot be read."""
        self._config = config
        self._secret = config.secret()
        self._refusals: dict[str, int] = {}
        self.given_up = 0

    async def deliver(self, record: Alert | WorkOrder) -> None:
        """Raises SinkError to be offered the record again."""
        kind = "alert" if isinstance(record, Alert) else "order"
        if kind not in self._config.records:
            return
        key = _idempotency_key(record)
        body = msgspec.json.encode({"type": kind, "record": record})
        status = await self._request(body, self._headers(kind, key, body))
        if 200 <= status < 300:
            self._refusals.pop(key, None)
        elif status in CANNOT_BE_TAKEN:
            self._refuse(key, status)
        elif 300 <= status < 400:
            raise SinkError(f"'{self._config.url}' redirects ({status})", hint="set url to the final address")
        else:
            raise SinkError(f"'{self._config.url}' answered {status}", hint=_hint(status))

    async def close(self) -> None:
        """Nothing stays open between two requests."""

    def _refuse(self, key: str, status: int) -> None:
        """Count a refusal; give the record up at the cap, else raise to try again."""
        self._refusals[key] = self._refusals.get(key, 0) + 1
        if self._refusals[key] < self._config.refusals_cap:
            raise SinkError(
                f"'{self._config.url}' refused record {key} with {status}", hint="see what the other side expects"
            )
        del self._refusals[key]
        self.given_up += 1
        log.error("record %s was refused %d times (%d) and is given up", key, self._config.refusals_cap, status)

    def _headers(self, kind: str, key: str, body: bytes) -> dict[str, str]:
        return {
            "Content-Type": "application/json",
            "User-Agent": f"millhand/{__version__}",
            "Idempotency-Key": key,
            "X-Millhand-Event": kind,
            "X-Millhand-Signature": sign(self._secret, body, int(time.time())),
        }

    async def _request(self, body: bytes, headers: Mapping[str, str]) -> int:
        """POST `body`; the answer's status. The whole request has `timeout_s`, not each of its reads. Raises SinkError.

        A socket blocks in a thread; shutting it down ends that thread when the time is over or the sink is stopped.
        """
        try:
            connection = self._connection()
        except OSError as error:
            raise SinkError(
                f"ca_file = '{self._config.ca_file}' cannot be used: {error}", hint="give PEM certificates"
            ) from error
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await asyncio.to_thread(_post, connection, self._target, body, headers)
        except TimeoutError as error:
            raise SinkError(
                f"'{self._config.url}' did not answer within {self._config.timeout_s:g} s",
                hint="is the other side overloaded? the record waits",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise SinkError(
                f"'{self._config.url}' cannot be reached: {str(error) or type(error).__name__}",
                hint="check address, network and certificate; the record waits",
            ) from error
        finally:
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    @property
    def _target(self) -> str:
        parts = urlsplit(self._config.url)
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _connection(self) -> http.client.HTTPConnection:
        parts, timeout_s = urlsplit(self._config.url), self._config.timeout_s
        assert parts.hostname is not None
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        context = ssl.create_default_context(cafile=self._config.ca_file)
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context)


def _post(connection: http.client.HTTPConnection, target: str, body: bytes, headers: Mapping[str, str]) -> int:
    """One request, in a thread. Redirects are not followed; of the answer only the status is read."""
    try:
        connection.request("POST", target, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def _idempotency_key(record: Alert | WorkOrder) -> str:
    changed_ns = record.changed_ns if isinstance(record, Alert) else record.revised_ns or record.created_ns
    return f"{record.id}-{record.state}-{changed_ns}"


def _hint(status: int) -> str:
    if status in (401, 403):
        return "does the other side know the same secret, and is its clock right? the record waits"
    if status in (404, 405):
        return "check the path of url; the record waits"
    return "see the other side's log; the record waits"
