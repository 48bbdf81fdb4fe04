"""The outbox: acknowledgement, gaps, and the promise that rows and gaps leave no hole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import StoreError
from millhand.store import Gap, StoreSettings
from millhand.store.database import Database
from millhand.store.writer import Writer, encode


async def test_acknowledgement_is_monotonic_clipped_and_kept(kit, path):
    async with kit.opened(path) as store:
        for index in range(5):
            await store.commit(kit.step(index))
        await store.acknowledge("bulk", 3)
        await store.acknowledge("bulk", 2)
        assert await store.acked("bulk") == 3
        await store.acknowledge("bulk", 4, epoch="of another file")
        assert await store.acked("bulk") == 3
        await store.acknowledge("bulk", 4, epoch=store.epoch)
        await store.acknowledge("bulk", 1000)
        await store.acknowledge("alert", 1000)
    async with kit.opened(path) as store:
        assert (await store.acked("bulk"), await store.acked("alert")) == (5, 0)
        assert [row.seq for row in await store.pending("bulk", 2, 2)] == [3, 4]
        with pytest.raises(StoreError, match="stream 'bluk' is not known"):
            await store.acked("bluk")


async def test_bdseq_counts_to_255_and_wraps(kit, path):
    async with kit.opened(path) as store:
        assert [await store.next_bdseq() for _ in range(3)] == [0, 1, 2]
    async with kit.opened(path) as store:
        assert [await store.next_bdseq() for _ in range(255)] == [*range(3, 256), 0, 1]


class Model:
    """A store without its thread, and a hub that believes what it is sent."""

    def __init__(self, kit, folder: Path) -> None:
        self.kit = kit
        self.path = folder / "store.db"
        self.index = 0
        self.hub: dict[str, list[tuple[int, int, str]]] = {"bulk": [], "alert": []}
        self.open()

    def open(self) -> None:
        self.database = Database(self.path, StoreSettings())
        self.database.open()
        self.writer = Writer(self.database, StoreSettings())

    def reopen(self) -> None:
        self.database.close()
        self.open()

    def commit(self, count: int) -> None:
        steps = []
        for _ in range(count):
            self.index += 1
            steps.append(encode(self.kit.step(self.index, readings=1, alerts=(self.kit.alert(self.index),))))
        self.writer.write(steps)

    def evict(self, stream: str, count: int, reason: str) -> None:
        rows = [row for row in self.pending(stream, 0) if row.kind != "gap"]
        if rows[:count]:
            with self.database.transaction():
                self.writer.outbox.drop_through(stream, rows[:count][-1].seq, reason)

    def acknowledge(self, stream: str, share: float) -> None:
        state = self.writer.outbox.state(stream)
        self.writer.outbox.acknowledge(stream, state.acked + round(share * (state.last - state.acked)), None)

    def deliver(self, stream: str, limit: int) -> None:
        """The hub takes what comes next and acknowledges it."""
        acked = self.writer.outbox.state(stream).acked
        rows = self.writer.outbox.pending(stream, acked, limit)
        self.hub[stream] += [covers(row) for row in rows]
        if rows:
            self.writer.outbox.acknowledge(stream, rows[-1].seq, None)

    def pending(self, stream: str, after: int):
        return self.writer.outbox.pending(stream, after, 10_000)

    def check(self, stream: str) -> None:
        """Beyond what is acknowledged, rows and gaps cover everything once."""
        state = self.writer.outbox.state(stream)
        rows = self.pending(stream, state.acked)
        assert_tiled([covers(row) for row in rows], state.acked, state.last)
        assert state.row_count == sum(row.kind != "gap" for row in self.pending(stream, 0))
        assert [row.seq for row in rows[:2]] == [row.seq for row in self.writer.outbox.pending(stream, state.acked, 2)]


def covers(row) -> tuple[int, int, str]:
    record = row.record()
    if isinstance(record, Gap):
        assert record.stream == row.stream
        return record.first, record.last, record.reason
    return row.seq, row.seq, "row"


def assert_tiled(pieces: list[tuple[int, int, str]], after: int, last: int) -> None:
    before = "row"
    for first, piece_last, kind in pieces:
        assert first == after + 1
        assert piece_last >= first
        assert kind == "row" or kind != before, "neighbours of one reason are one gap"
        after, before = piece_last, kind
    assert after == last


STREAM = st.sampled_from(["bulk", "alert"])
OPERATION = st.one_of(
    st.tuples(st.just("commit"), st.integers(1, 6)),
    st.tuples(st.just("evict"), STREAM, st.integers(1, 8), st.sampled_from(["bytes", "age"])),
    st.tuples(st.just("acknowledge"), STREAM, st.floats(0, 1)),
    st.tuples(st.just("reopen")),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(OPERATION, max_size=25))
def test_rows_and_gaps_cover_everything_once(kit, operations):
    with tempfile.TemporaryDirectory() as folder:
        model = Model(kit, Path(folder))
        try:
            for name, *arguments in operations:
                getattr(model, name)(*arguments)
                for stream in ("bulk", "alert"):
                    model.check(stream)
                    assert model.writer.outbox.state(stream).last == model.index, "no seq is used twice or skipped"
        finally:
            model.database.close()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("commit"), st.integers(1, 6)),
            st.tuples(st.just("evict"), STREAM, st.integers(1, 8), st.sampled_from(["bytes", "age"])),
            st.tuples(st.just("deliver"), STREAM, st.integers(1, 5)),
            st.tuples(st.just("reopen")),
        ),
        max_size=25,
    )
)
def test_the_hub_hears_of_every_seq_once(kit, operations):
    with tempfile.TemporaryDirectory() as folder:
        model = Model(kit, Path(folder))
        try:
            for name, *arguments in operations:
                getattr(model, name)(*arguments)
            for stream in ("bulk", "alert"):
                model.deliver(stream, 10_000)
                pieces = model.hub[stream]
                seqs = [seq for first, last, _ in pieces for seq in range(first, last + 1)]
                assert seqs == list(range(1, model.index + 1))
        finally:
            model.database.close()


async def test_a_gap_is_cut_to_what_the_reader_has(kit, path):
    async with kit.opened(path) as store:
        for index in range(10):
            await store.commit(kit.step(index))
        await store._thread.call(lambda parts: _drop(parts, 4, "bytes"))
        await store._thread.call(lambda parts: _drop(parts, 7, "bytes"))
        first = (await store.pending("bulk", 0))[0]
        assert (first.seq, first.record()) == (7, Gap("bulk", 1, 7, "bytes"))
        assert (await store.pending("bulk", 5))[0].record() == Gap("bulk", 6, 7, "bytes")
        await store.acknowledge("bulk", 6)
        assert (await store.pending("bulk", 0))[0].record() == Gap("bulk", 7, 7, "bytes")
        await store.acknowledge("bulk", 7)
        assert [row.seq for row in await store.pending("bulk", 0)] == [8, 9, 10]
        assert (await store.status())["streams"]["bulk"]["dropped"] == {"bytes": 7}


def _drop(parts: Writer, seq: int, reason: str) -> None:
    with parts.database.transaction():
        parts.outbox.drop_through("bulk", seq, reason)
