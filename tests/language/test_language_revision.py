"""The background task on a real store: each draft once, across restarts; every failure leaves the draft and is told."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millhand.errors import DeadlineError, InputError, LanguageError, RefusedError
from millhand.language import revision
from millhand.language.guarding import Part
from millhand.language.pack import PackSettings, find_pack
from millhand.language.passages import Passage
from millhand.language.revision import Revision, Sources, fault_texts
from millhand.language.screening import Judge
from millhand.pipeline.settings import OrderSettings
from millhand.records import Alert, Batch, Citation, Severity, WorkOrder
from millhand.store import Step, Store, StoreSettings
from millhand_plugins.orders.writer import DeterministicWriter, read_knowledge

PACK = find_pack(PackSettings())
PASSAGE = Passage(id="p1", source="pump.pdf", page=3, text="Tighten the cover of the bearing to 45 Nm.")
STEP = "Tighten the cover of the bearing to 45 Nm."
SPACE = uuid.UUID(int=7)


def alert(number: int) -> Alert:
    return Alert(
        str(uuid.uuid5(SPACE, str(number))), "pump-3", "rig-fault", "fault", "bearing_outer", Severity.WARNING,
        "pump-3: bearing outer", 1_700_000_000_000_000_000 + number, evidence={"facts": {"bpfo_hz": 88.4}},
    )  # fmt: skip


def draft(number: int) -> WorkOrder:
    return DeterministicWriter(read_knowledge()).write(alert(number), [])


class Reviser:
    """Does what it is told, in order; at the end of the list the last one again."""

    name = "scripted"

    def __init__(self, *acts: Any) -> None:
        self._acts = list(acts)
        self.seen: list[tuple[str, Sequence[Alert], Sequence[Passage]]] = []

    async def revise(
        self, draft: WorkOrder, alert: Alert, history: Sequence[Alert], passages: Sequence[Passage], pack: Any, _: Any
    ) -> WorkOrder:
        self.seen.append((draft.id, history, passages))
        act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
        if isinstance(act, Exception):
            raise act
        made = act(draft)
        return await made if isinstance(made, Awaitable) else made


class Knowledge:
    name = "scripted"

    async def search(self, query: str, asset: str = "", limit: int = 5) -> Sequence[Passage]:
        assert "bearing outer" in query and asset == "pump-3"
        return [PASSAGE]


async def passing(parts: Sequence[Part]) -> list[str | None]:
    return [part.text for part in parts]


async def refusing(parts: Sequence[Part]) -> list[str | None]:
    return [None for _ in parts]


def better(order: WorkOrder) -> WorkOrder:
    """A good step of the manual, and an invented one."""
    steps = (*order.action, STEP, "Regrease the bearing with 99 g.")
    return msgspec.structs.replace(order, action=steps, citations=(Citation("p1", ""),), priority=4)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    store = await Store.open(path, StoreSettings())
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def revising(
    store: Store, reviser: Any, knowledge: Any = None, judged: Judge | None = None, **settings: Any
) -> AsyncIterator[Revision]:
    sources = Sources(
        revisers=lambda: [reviser] if reviser else [],
        complete=lambda: lambda: None,  # type: ignore[arg-type,return-value]
        knowledge=lambda: knowledge,
        pack=lambda: PACK,
        assets=lambda: ["pump-3", "press-a"],
        judge=judged or passing,
    )
    task = Revision(store, OrderSettings(reviser="scripted", **settings), sources)
    task.start()
    try:
        yield task
    finally:
        await task.stop()


async def add(store: Store, *numbers: int) -> None:
    for number in numbers:
        await store.commit(Step("pump-3", Batch(), b"", alerts=(alert(number),), orders=(draft(number),)))


def done(task: Revision, **outcomes: int) -> Callable[[], bool]:
    return lambda: {name: count for name, count in task.status()["outcomes"].items() if count} == outcomes


async def test_a_draft_becomes_a_validated_version(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        reviser = Reviser(better)
        async with revising(store, reviser, Knowledge()) as task:
            await add(store, 1, 2)
            await until(done(task, revised=2))
        order = await store.order(draft(1).id)
        assert order is not None
        assert order.action == (*draft(1).action, STEP, "Regrease the bearing with [?].")
        assert order.citations == (Citation("p1", "pump.pdf, page 3"),)
        assert (order.priority, order.revision, order.writer) == (draft(1).priority, 2, "scripted")
        assert {struck.field for struck in order.struck} == {"priority", f"action[{len(draft(1).action) + 1}]"}
        assert abs(order.revised_ns - time.time_ns()) < 600e9
        assert await store.order_versions(order.id) == [draft(1), order]
        assert task.status()["struck"] == 4
        assert [row.record() for row in await store.pending("alert", 0)][-1] == await store.order(draft(2).id)
        assert [(seen, len(history)) for seen, history, _ in reviser.seen] == [(draft(1).id, 0), (draft(2).id, 1)]


async def test_each_draft_is_looked_at_once_across_restarts(tmp_path: Path) -> None:
    reviser = Reviser(better)
    for run in (1, 2, 3):
        async with opened(tmp_path / "store.db") as store, revising(store, reviser) as task:
            await add(store, run)
            await until(done(task, revised=1))
    assert [seen for seen, _, _ in reviser.seen] == [draft(number).id for number in (1, 2, 3)]


async def test_an_order_that_was_cut_off_is_looked_at_again(tmp_path: Path) -> None:
    async def hang(order: WorkOrder) -> WorkOrder:
        await asyncio.Event().wait()
        return order

    async with opened(tmp_path / "store.db") as store:
        hanging = Reviser(hang)
        async with revising(store, hanging):
            await add(store, 1)
            await until(lambda: len(hanging.seen) == 1)
        async with revising(store, Reviser(better)) as task:
            await until(done(task, revised=1))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (LanguageError("no such model", retriable=False), "failed"),
        (DeadlineError("no answer"), "deadline"),
        (RefusedError("a guard said no"), "refused"),
        (InputError("bad"), "failed"),
        (RuntimeError("a defect"), "failed"),
    ],
    ids=["language", "deadline", "refused", "input", "defect"],
)
async def test_a_failure_leaves_the_draft_and_the_next_order_goes_on(
    tmp_path: Path, error: Exception, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "store.db") as store, revising(store, Reviser(error, better)) as task:
        await add(store, 1, 2)
        await until(done(task, **{outcome: 1}, revised=1))
        assert await store.order(draft(1).id) == draft(1)
    assert any(draft(1).id[:8] in record.message and outcome in record.message for record in caplog.records)


async def test_a_server_that_is_not_up_yet_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "RETRY_FIRST_S", 0.01)
    reviser = Reviser(LanguageError("it starts"), LanguageError("it starts"), better)
    async with opened(tmp_path / "store.db") as store, revising(store, reviser) as task:
        await add(store, 1)
        await until(done(task, revised=1))
    assert len(reviser.seen) == 3


async def test_the_deadline_passes(tmp_path: Path) -> None:
    down = Reviser(LanguageError("the server is down"))
    async with opened(tmp_path / "store.db") as store, revising(store, down, revise_deadline_s=0.2) as task:
        await add(store, 1)
        await until(done(task, deadline=1))
        assert await store.order(draft(1).id) == draft(1)
        assert task.status()["error"] == "the server is down"


async def test_a_person_is_quicker(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:

        async def slow(order: WorkOrder) -> WorkOrder:
            await store.revise_order(msgspec.structs.replace(order, minutes=5, writer="technician kim"), by_person=True)
            return better(order)

        async with revising(store, Reviser(slow)) as task:
            await add(store, 1)
            await until(done(task, overtaken=1))
        order = await store.order(draft(1).id)
        assert order is not None and (order.writer, order.minutes, order.revision) == ("technician kim", 5, 2)


async def test_only_the_newest_backlog_is_revised(tmp_path: Path) -> None:
    reviser = Reviser(better)
    async with opened(tmp_path / "store.db") as store:
        await store.sink_cursor(revision.CURSOR)
        await add(store, *range(5))
        async with revising(store, reviser, revise_backlog=2) as task:
            await until(done(task, backlog=3, revised=2))
    assert [seen for seen, _, _ in reviser.seen] == [draft(3).id, draft(4).id]


async def test_nothing_new_is_no_version(tmp_path: Path) -> None:
    def invents(order: WorkOrder) -> WorkOrder:
        return msgspec.structs.replace(order, action=(*order.action, "Paint the fence of the neighbour."), priority=1)

    async with opened(tmp_path / "store.db") as store, revising(store, Reviser(invents)) as task:
        await add(store, 1)
        await until(done(task, unchanged=1))
        assert await store.order_versions(draft(1).id) == [draft(1)]


async def test_a_reviser_whose_plugin_is_not_there_lets_orders_wait(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        async with revising(store, None) as task:
            await add(store, 1)
            await until(lambda: "'scripted' is not known" in task.status()["error"])
        async with revising(store, Reviser(better)) as task:
            await until(done(task, revised=1))


def test_what_the_pack_says_of_a_kind() -> None:
    texts = fault_texts(PACK, "bearing_outer", "zh")
    assert "轴承外圈疲劳剥落。" in texts
    assert fault_texts(PACK, "no such kind", "en") == []


async def test_a_draft_whose_words_are_refused_stays(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        reviser = Reviser(better)
        async with revising(store, reviser, judged=refusing) as task:
            await add(store, 1)
            await until(done(task, refused=1))
        assert await store.order(draft(1).id) == draft(1) and not reviser.seen
