"""POSTs one record a request, signed; only a 2xx answer counts as delivered.

Signature: `X-Millhand-Signature: t=<unix seconds>,v1=<hex>`, the HMAC-SHA256 (RFC 2104) of `<t>.<body>` under the
shared secret. `Idempotency-Key` is the record's id and state, so that the other side can drop a repetition.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import logging
import ssl
import time
from urllib.parse import urlsplit

import msgspec

from millhand import __version__
from millhand.errors import SinkError
from millhand.records import Alert, WorkOrder
from millhand_plugins.webhook.settings import WebhookConfig

log = logging.getLogger("millhand.webhook")

AGAIN = frozenset({408, 425, 429})
"""4xx answers that ask to come again later."""


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
        key = f"{record.id}-{record.state}"
        body = msgspec.json.encode({"type": kind, "record": record})
        status = await asyncio.to_thread(self._post, kind, key, body)
        if 200 <= status < 300:
            self._refusals.pop(key, None)
            return
        if 400 <= status < 500 and status not in AGAIN:
            self._refuse(key, status)
            return
        raise SinkError(f"'{self._config.url}' answered {status}", hint="see the other side's log")

    async def close(self) -> None:
        """Nothing stays open between two requests."""

    def _refuse(self, key: str, status: int) -> None:
        """Count a refusal; give the record up at the cap, else raise to try again."""
        self._refusals[key] = self._refusals.get(key, 0) + 1
        if self._refusals[key] < self._config.refusals_cap:
            raise SinkError(
                f"'{self._config.url}' refused record {key} with {status}",
                hint="check the secret and what the other side expects",
            )
        del self._refusals[key]
        self.given_up += 1
        log.error("record %s was refused %d times and is given up", key, self._config.refusals_cap)

    def _post(self, kind: str, key: str, body: bytes) -> int:
        """One request, in a thread; redirects are not followed. Raises SinkError."""
        parts = urlsplit(self._config.url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"millhand/{__version__}",
            "Idempotency-Key": key,
            "X-Millhand-Event": kind,
            "X-Millhand-Signature": sign(self._secret, body, int(time.time())),
        }
        connection = self._connection()
        try:
            connection.request("POST", target, body, headers)
            response = connection.getresponse()
            response.read(65_536)
            return response.status
        except (OSError, http.client.HTTPException) as error:
            raise SinkError(
                f"'{self._config.url}' cannot be reached: {error or type(error).__name__}",
                hint="check address, network and certificate; the record waits",
            ) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self._config.url)
        assert parts.hostname is not None
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=self._config.timeout_s)
        context = ssl.create_default_context(cafile=self._config.ca_file)
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=self._config.timeout_s, context=context)
