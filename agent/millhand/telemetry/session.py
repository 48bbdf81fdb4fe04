"""One MQTT connection. paho's own reconnect is off: every connection needs a new will (its bdSeq differs)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from millhand.errors import ConfigError, TelemetryError
from millhand.telemetry.settings import SCHEMES, LinkSettings

CLOSE_DEADLINE_S = 3.0
ECHO_TOPIC = "millhand/echo"
"""Nobody subscribes to it: an UNSUBSCRIBE from it changes nothing, and its answer proves a round trip."""


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes when this connection dies."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message that came in."""

    topic: str
    payload: bytes
    retained: bool = False


class Session:
    """A connection to one broker, used from one event loop.

    What comes in lies in `arrivals`; `wake` is called in the event loop whenever something came in or the connection
    is gone.
    """

    def __init__(self, url: str, settings: LinkSettings, client_id: str, will: Will, wake: Callable[[], None]) -> None:
        """Raises ConfigError where the password or a certificate cannot be read."""
        parts = urlsplit(url)
        self.url = url
        self.arrivals: deque[Arrival] = deque()
        self._host = str(parts.hostname)
        self._port = parts.port or SCHEMES[parts.scheme]
        self._settings = settings
        self._v5 = settings.protocol == "5"
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._closed_why: str | None = None
        self._client = self._make_client(client_id, will, tls=parts.scheme == "mqtts")

    @property
    def closed(self) -> bool:
        return self._closed_why is not None

    def check(self) -> None:
        """Raises TelemetryError once the connection is gone."""
        if self.closed:
            raise self._gone()

    async def connect(self) -> None:
        """Raises TelemetryError naming broker and remedy."""
        try:
            await asyncio.to_thread(self._connect)  # ends by itself: paho's own limit is the same
            self._client.loop_start()
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._connected
        except TimeoutError as error:
            await self.close()
            raise TelemetryError(
                f"broker '{self.url}' did not answer within {self._settings.connect_timeout_s:g} s",
                hint="check address, port and firewall",
            ) from error
        except TelemetryError:
            await self.close()
            raise
        except (OSError, ValueError) as error:
            await self.close()
            raise TelemetryError(
                f"broker '{self.url}' cannot be reached: {error}", hint="is it running? check address and certificate"
            ) from error

    async def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribe at QoS 1 and wait for the broker's consent; its refusal ends the session with TelemetryError."""
        await self._answer(self._client.subscribe([(topic, 1) for topic in topics])[1])

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> mqtt.MQTTMessageInfo:
        """Queue a message. Raises TelemetryError once the session is closed."""
        self.check()
        return self._client.publish(topic, payload, qos, retain)

    async def written(self, info: mqtt.MQTTMessageInfo) -> None:
        """Wait until a message is written to the socket (QoS 0) or acknowledged by the broker (QoS 1).

        Raises TelemetryError if the session closes first.
        """
        if info.rc != mqtt.MQTT_ERR_SUCCESS or not info.is_published():
            await self._answer(info.mid)

    async def confirmed(self) -> None:
        """Wait until the broker has taken everything that was published so far, QoS 0 too.

        A broker works off one connection's packets in order, so the answer to any request proves what went before.
        Raises TelemetryError if the session closes first.
        """
        await self._answer(self._client.unsubscribe(ECHO_TOPIC)[1])

    async def close(self, *, with_will: bool = False) -> None:
        """Disconnect. `with_will`: MQTT 5 lets the broker publish the will (reason code 0x04)."""
        with contextlib.suppress(ValueError, OSError):
            if with_will and self._v5:
                self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message"))
            else:
                self._client.disconnect()
        stopped = asyncio.create_task(asyncio.to_thread(self._client.loop_stop))
        if not (await asyncio.wait({stopped}, timeout=CLOSE_DEADLINE_S))[0]:
            self._sever()  # the peer takes nothing any more; paho's thread would wait for it
        await stopped
        self._release()
        self._close("closed by us")

    def _sever(self) -> None:
        connection: Any = self._client.socket()
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        """Break the circle between paho's client and us: it closes its wake-up sockets only when it is freed."""
        client = self._client
        client.on_connect = client.on_disconnect = client.on_message = None
        client.on_publish = client.on_subscribe = client.on_unsubscribe = None

    async def _answer(self, mid: int | None) -> None:
        """Wait for the broker's answer to packet `mid`; None is one that could not be sent."""
        self.check()
        if mid is None:
            raise TelemetryError(f"the connection to '{self.url}' broke", hint="it is opened again")
        future = self._answers[mid] = self._loop.create_future()
        try:
            await future
        finally:
            self._answers.pop(mid, None)

    def _gone(self) -> TelemetryError:
        return TelemetryError(f"the connection to '{self.url}' broke: {self._closed_why}", hint="it is opened again")

    # ---- paho's side; callbacks come from its thread ---------------------------------------------------------------

    def _make_client(self, client_id: str, will: Will, tls: bool) -> mqtt.Client:
        settings = self._settings
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if self._v5 else True,
            protocol=mqtt.MQTTv5 if self._v5 else mqtt.MQTTv311,
            reconnect_on_failure=False,
        )
        client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        if settings.username:
            client.username_pw_set(settings.username, settings.secret() or None)
        if tls:
            client.tls_set_context(_tls(settings))
        client.max_inflight_messages_set(1000)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_answer
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_answer
        client.connect_timeout = settings.connect_timeout_s
        return client

    def _connect(self) -> None:
        if self._v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0
            self._client.connect(
                self._host, self._port, self._settings.keepalive_s, clean_start=True, properties=properties
            )
        else:
            self._client.connect(self._host, self._port, self._settings.keepalive_s)

    def _call(self, function: Any, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_connect(self, _: Any, __: Any, ___: Any, code: ReasonCode, ____: Any) -> None:
        self._call(self._opened, code)

    def _on_disconnect(self, _: Any, __: Any, ___: Any, code: ReasonCode, ____: Any) -> None:
        self._call(self._close, str(code))

    def _on_message(self, _: Any, __: Any, message: mqtt.MQTTMessage) -> None:
        self.arrivals.append(Arrival(message.topic, bytes(message.payload), message.retain))
        self._call(self._wake)

    def _on_answer(self, _: Any, __: Any, mid: int, ___: Any, ____: Any) -> None:
        self._call(self._answered, mid)

    def _on_subscribe(self, _: Any, __: Any, mid: int, codes: list[ReasonCode], ____: Any) -> None:
        if any(code.is_failure for code in codes):
            self._call(self._close, "the broker refused a subscription; check this client's rights")
        else:
            self._call(self._answered, mid)

    def _answered(self, mid: int) -> None:
        future = self._answers.get(mid)
        if future is not None and not future.done():
            future.set_result(None)

    def _opened(self, code: ReasonCode) -> None:
        if self._connected.done():
            return
        if code.is_failure:
            self._connected.set_exception(
                TelemetryError(
                    f"broker '{self.url}' refused: {code}", hint="check username, password and client rights"
                )
            )
        else:
            self._connected.set_result(None)

    def _close(self, why: str) -> None:
        if not self.closed:
            self._closed_why = why
        if not self._connected.done():
            self._connected.set_exception(
                TelemetryError(f"broker '{self.url}' closed the connection: {why}", hint="see the broker's log")
            )
            self._connected.exception()  # whoever waits sees it; nobody may wait any more
        for future in self._answers.values():
            if not future.done():
                future.set_exception(self._gone())
        self._wake()


def _tls(settings: LinkSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.cert_file is not None and settings.key_file is not None:
            context.load_cert_chain(settings.cert_file, settings.key_file)
    except OSError as error:
        raise ConfigError(
            f"ca_file, cert_file or key_file cannot be used: {error}",
            hint="give PEM files that the service's user can read",
        ) from error
    return context
