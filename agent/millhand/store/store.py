"""The store as the rest of the daemon sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any, Self

from millhand.language.conversation import Conversation, Turn
from millhand.records import Alert, Prediction, Reading, Waveform, WorkOrder
from millhand.store.changes import Changes
from millhand.store.database import Loss
from millhand.store.history import Place
from millhand.store.rollups import MINUTE_NS, Rollup
from millhand.store.rows import MetricSpec, Row, Step, Stream
from millhand.store.settings import StoreSettings
from millhand.store.thread import StoreThread
from millhand.store.writer import Writer, encode

# The largest time that SQLite's integers hold.
END_NS = 2**63 - 1
ROLLUP_SLICE = 2_000


class Store:
    """One SQLite file, opened by the daemon alone.

    Every call runs on the store's thread and raises StoreError; `retriable` is true where the disk is full or refuses,
    and nothing was half-committed then. A file found damaged, replaced or deleted is set aside (`set_aside`), and the
    call goes to a new file with a new `epoch`: whoever keeps a seq or a cursor in memory looks at `epoch` again.
    """

    def __init__(self, path: Path, settings: StoreSettings) -> None:
        self.changed = Changes()
        """Counts commits with new rows: `await store.changed.after(seen)`."""
        self._thread = StoreThread(path, settings, self.changed.notify)

    @classmethod
    async def open(cls, path: Path, settings: StoreSettings | None = None) -> Self:
        """Create, migrate or resume the file at `path`. Call from the event loop that will use the store.

        Raises StoreError for a file of a newer version, of another program, or in use by another process.
        """
        store = cls(path, settings or StoreSettings())
        await store._thread.start()
        return store

    async def close(self) -> None:
        """Finish what is queued, then close. The store takes no calls after this."""
        await self._thread.stop()

    @property
    def epoch(self) -> str:
        """UUID of the file: new for a new file and for a restored copy (see `Database` for what is noticed)."""
        return self._thread.database.epoch

    @property
    def set_aside(self) -> list[Path]:
        """Files that were set aside as damaged or replaced since `open`, oldest first."""
        return self._thread.database.set_aside

    @property
    def losses(self) -> list[Loss]:
        """Every file that was given up since `open`, also one of which nothing was left."""
        return list(self._thread.database.losses)

    # ---- steps ------------------------------------------------------------------------------------------------------

    async def commit(self, step: Step) -> None:
        """Store everything that one batch caused, whole or not at all; returns after the fsync.

        A step without readings and predictions leaves no bulk row. A prediction that is stored already is left out
        and counted. A batch without a cursor leaves the last cursor in place. A commit that is cancelled while it
        waits may still happen. Raises StoreError.
        """
        await self._thread.commit(encode(step))

    async def resume(self, asset: str) -> tuple[bytes | None, bytes | None]:
        """The last committed (cursor, state) of `asset`."""
        return await self._thread.call(lambda parts: parts.catalog.resume_point(asset))

    # ---- outbox -----------------------------------------------------------------------------------------------------

    async def pending(self, stream: Stream, after: int, limit: int = 500) -> list[Row]:
        """At most `limit` rows and gaps of `stream` that reach beyond `after`, by rising seq.

        From the acknowledged seq on they are without a hole: each row, or the first of each gap, follows the one
        before it.
        """
        return await self._thread.call(lambda parts: parts.outbox.pending(stream, after, limit))

    async def acknowledge(self, stream: Stream, upto: int, epoch: str | None = None) -> None:
        """The hub has everything up to `upto`. Never goes back, nor beyond the last row.

        Give the epoch that the hub named: an acknowledgement of a file that was set aside is then ignored.
        """
        await self._thread.call(lambda parts: parts.outbox.acknowledge(stream, upto, epoch))

    async def acked(self, stream: Stream) -> int:
        """The highest seq up to which the hub has everything; 0 at first."""
        return await self._thread.call(lambda parts: parts.outbox.state(stream).acked)

    async def last(self, stream: Stream) -> int:
        """The newest seq given out; 0 at first."""
        return await self._thread.call(lambda parts: parts.outbox.state(stream).last)

    async def next_bdseq(self) -> int:
        """Sparkplug's bdSeq for the next CONNECT: 0..255, then 0 again; stored before it is returned."""
        return await self._thread.call(lambda parts: parts.outbox.next_bdseq())

    async def metric_specs(self) -> list[MetricSpec]:
        """Every metric ever seen, in order of first sight, with its newest GOOD value (None before the first)."""
        return await self._thread.call(lambda parts: parts.catalog.metric_specs())

    # ---- alerts, orders, sinks --------------------------------------------------------------------------------------

    async def alerts(self, state: str | None = None, asset: str | None = None, limit: int = 100) -> list[Alert]:
        """Newest first."""
        return await self._thread.call(lambda parts: parts.alerts.alerts(state, asset, limit))

    async def alert(self, alert_id: str) -> Alert | None:
        return await self._thread.call(lambda parts: parts.alerts.alert(alert_id))

    async def ack_alert(self, alert_id: str, by: str, now_ns: int) -> Alert:
        """A person takes note: an open alert becomes acknowledged, a cleared one stays cleared; both tell by whom.

        Leaves a row on the alert stream; a second acknowledgement changes nothing. Raises StoreError for an unknown id.
        """
        alert = await self._thread.call(lambda parts: parts.alerts.acknowledge(alert_id, by, now_ns))
        self.changed.notify()
        return alert

    async def orders(self, asset: str | None = None, alert_id: str | None = None, limit: int = 100) -> list[WorkOrder]:
        """Newest first."""
        return await self._thread.call(lambda parts: parts.alerts.orders(asset, alert_id, limit))

    async def order(self, order_id: str) -> WorkOrder | None:
        return await self._thread.call(lambda parts: parts.alerts.order(order_id))

    async def revise_order(self, order: WorkOrder, by_person: bool = False) -> WorkOrder | None:
        """Commit a further version of an order; `order.revision` is that of the version it was made of.

        It is numbered, stored beside the older ones, and told on the alert stream. Returns it as stored, or None where
        that version is not the newest any more: nothing is stored then. What a person wrote is kept as a training pair
        too. Raises StoreError for an unknown id.
        """
        stored = await self._thread.call(lambda parts: parts.alerts.revise(order, by_person))
        if stored is not None:
            self.changed.notify()
        return stored

    async def order_versions(self, order_id: str) -> list[WorkOrder]:
        """Every version, oldest first."""
        return await self._thread.call(lambda parts: parts.alerts.versions(order_id))

    async def order_pairs(self, after: int = 0, limit: int = 100) -> list[tuple[int, WorkOrder, WorkOrder]]:
        """(place, a machine's version, what a person made of it), oldest first, behind place `after`."""
        return await self._thread.call(lambda parts: parts.alerts.pairs(after, limit))

    async def append_turns(self, conversation: Conversation, turns: Sequence[Turn]) -> None:
        """Insert or update a conversation and add turns behind its others; beyond a cap the oldest conversations go."""
        await self._thread.call(lambda parts: parts.conversations.append(conversation, turns))

    async def conversations(self, limit: int = 50) -> list[Conversation]:
        """Those that were changed last, newest first."""
        return await self._thread.call(lambda parts: parts.conversations.conversations(limit))

    async def turns(self, conversation_id: str) -> list[Turn]:
        """All that was said, in order; empty for an unknown id."""
        return await self._thread.call(lambda parts: parts.conversations.turns(conversation_id))

    async def delete_conversation(self, conversation_id: str) -> bool:
        """Forget a conversation and overwrite where its turns lay in the file; whether there was one."""
        return await self._thread.call(lambda parts: parts.conversations.delete(conversation_id))

    async def sink_cursor(self, name: str) -> int:
        """Where sink `name` stands on the alert stream; at its first call ever, where the stream was at `open`.

        So a new sink is not told the past, and after a file was set aside every sink is told all of the new one. Ask
        anew before each round: after a file was set aside, seqs begin again.
        """
        return await self._thread.call(lambda parts: parts.alerts.sink_cursor(name))

    async def records_after(self, cursor: int, limit: int = 100) -> Sequence[tuple[int, Alert | WorkOrder]]:
        """The next alerts and orders after `cursor`, in order, each with the cursor to advance to."""
        return await self._thread.call(lambda parts: parts.alerts.records_after(cursor, limit))

    async def advance_sink(self, name: str, cursor: int) -> None:
        """Sink `name` has everything up to `cursor`; never goes back. A cursor beyond the newest record is ignored."""
        await self._thread.call(lambda parts: parts.alerts.advance_sink(name, cursor))

    # ---- history ----------------------------------------------------------------------------------------------------

    async def assets(self) -> list[str]:
        """Names of all assets ever seen, in order of first sight."""
        return await self._thread.call(lambda parts: parts.catalog.assets())

    async def predictions(
        self, asset: str, model: str | None = None, since_ns: int = 0, until_ns: int = END_NS, limit: int = 1000
    ) -> list[Prediction]:
        """The newest `limit` predictions whose window ended in the given time, oldest first."""

        def read(parts: Writer) -> list[Prediction]:
            asset_id = parts.catalog.find_asset(asset)
            return [] if asset_id is None else parts.history.predictions(asset_id, model, since_ns, until_ns, limit)

        return await self._thread.call(read)

    async def readings(
        self, asset: str, names: Collection[str] | None = None, since_ns: int = 0, until_ns: int = END_NS
    ) -> AsyncIterator[list[Reading]]:
        """Yield the stored readings of `asset` in chunks, by the time of the batch that brought them.

        names: which ones; None for all. since_ns, until_ns: source time, both included. Commits go on between chunks.
        """

        def read(parts: Writer, place: Place | None) -> tuple[list[Reading], Place | None]:
            asset_id = parts.catalog.find_asset(asset)
            if asset_id is None:
                return [], None
            return parts.history.readings(asset_id, wanted, since_ns, until_ns, place)

        wanted = None if names is None else frozenset(names)
        found, place = await self._thread.call(lambda parts: read(parts, None))
        while True:
            if found:
                yield found
            if place is None:
                return
            start = place
            found, place = await self._thread.call(lambda parts: read(parts, start))  # noqa: B023

    async def rollups(self, asset: str, name: str, since_ns: int = 0, until_ns: int = END_NS) -> list[Rollup]:
        """Minutes of one metric, oldest first, from the one that holds `since_ns` to the one that holds `until_ns`."""

        def read(parts: Writer, start_ns: int) -> list[Rollup]:
            metric_id = parts.catalog.find_metric(asset, name)
            return [] if metric_id is None else parts.rollups.read(metric_id, start_ns, until_ns, ROLLUP_SLICE)

        found = part = await self._thread.call(lambda parts: read(parts, since_ns))
        while len(part) == ROLLUP_SLICE:
            start_ns = part[-1].minute_ns + MINUTE_NS
            part = await self._thread.call(lambda parts: read(parts, start_ns))  # noqa: B023
            found = found + part
        return found

    async def waveform(self, asset: str, name: str) -> Waveform | None:
        """The newest waveform of that name."""

        def read(parts: Writer) -> Waveform | None:
            asset_id = parts.catalog.find_asset(asset)
            return None if asset_id is None else parts.waveforms.newest(asset_id, name)

        return await self._thread.call(read)

    async def status(self) -> dict[str, Any]:
        """Bytes, rows a stream, what is unsent and was dropped, time until full, files set aside, last error."""
        return await self._thread.engine_call(lambda engine: engine.status())
