"""One MQTT connection. paho's own reconnect is off: every connection needs a new will (its bdSeq differs)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from millhand.errors import TelemetryError
from millhand.telemetry.settings import SCHEMES, TelemetrySettings

CLOSE_DEADLINE_S = 3.0


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
    """A connection to one broker, usable from one event loop. `closed` is set when it is gone, `reason` says why."""

    def __init__(self, url: str, settings: TelemetrySettings, client_id: str, will: Will) -> None:
        parts = urlsplit(url)
        self.url = url
        self._host = str(parts.hostname)
        self._port = parts.port or SCHEMES[parts.scheme]
        self._settings = settings
        self._v5 = settings.protocol == "5"
        self._loop = asyncio.get_running_loop()
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._written: dict[int, asyncio.Future[None]] = {}
        self.closed = asyncio.Event()
        self.reason = ""
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._client = self._make_client(client_id, will, tls=parts.scheme == "mqtts")

    async def connect(self) -> None:
        """Raises TelemetryError naming broker and remedy."""
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await asyncio.to_thread(self._connect)
                self._client.loop_start()
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

    def subscribe(self, topics: Sequence[str], qos: int = 1) -> None:
        """Ask for topics; the broker's refusal closes the session."""
        self._client.subscribe([(topic, qos) for topic in topics])

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> mqtt.MQTTMessageInfo:
        """Queue a message. Raises TelemetryError once the session is closed."""
        if self.closed.is_set():
            raise TelemetryError(f"the connection to '{self.url}' is gone: {self.reason}")
        return self._client.publish(topic, payload, qos, retain)

    async def written(self, info: mqtt.MQTTMessageInfo) -> None:
        """Wait until a message is written to the socket (QoS 0) or acknowledged by the broker (QoS 1).

        Raises TelemetryError if the session closes first.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._written[info.mid] = future
        if info.rc == mqtt.MQTT_ERR_SUCCESS and info.is_published():
            self._written.pop(info.mid, None)
            return
        closed = asyncio.create_task(self.closed.wait())
        try:
            waits: set[asyncio.Future[Any]] = {future, closed}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
            self._written.pop(info.mid, None)
        if not future.done():
            raise TelemetryError(f"the connection to '{self.url}' is gone: {self.reason}")

    async def close(self, *, with_will: bool = False) -> None:
        """Disconnect. `with_will`: MQTT 5 lets the broker publish the will (reason code 0x04)."""
        with contextlib.suppress(ValueError, OSError):
            if with_will and self._v5:
                self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message"))
            else:
                self._client.disconnect()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await asyncio.to_thread(self._client.loop_stop)
        self._close("closed by us")

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
            context = ssl.create_default_context(cafile=settings.ca_file)
            if settings.cert_file is not None and settings.key_file is not None:
                context.load_cert_chain(settings.cert_file, settings.key_file)
            client.tls_set_context(context)
        client.max_inflight_messages_set(1000)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
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
        self._call(self.arrivals.put_nowait, Arrival(message.topic, bytes(message.payload), message.retain))

    def _on_publish(self, _: Any, __: Any, mid: int, ___: Any, ____: Any) -> None:
        self._call(self._mark_written, mid)

    def _mark_written(self, mid: int) -> None:
        future = self._written.get(mid)
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

    def _close(self, reason: str) -> None:
        if not self.closed.is_set():
            self.reason = reason
            self.closed.set()
        if not self._connected.done():
            self._connected.set_exception(
                TelemetryError(f"broker '{self.url}' closed the connection: {reason}", hint="see the broker's log")
            )
            self._connected.exception()  # whoever waits sees it; nobody may wait any more
