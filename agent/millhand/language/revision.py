"""Gives each new work order to the reviser, outside the step that wrote it; what comes back is judged, then stored.

A cursor over the alert stream says which orders were looked at, so that a restart neither skips nor repeats. One order
at a time, newest backlog only: nothing waits for a language model, and whatever goes wrong leaves the draft.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from millhand.errors import ConfigError, DeadlineError, LanguageError, MillhandError, RefusedError, suggestion
from millhand.language.grounding import ground
from millhand.language.screening import Judge, Material, restored, screened
from millhand.records import Alert, WorkOrder

if TYPE_CHECKING:
    from millhand.hookspecs import Complete, KnowledgeBase, OrderReviser
    from millhand.language.pack import Pack
    from millhand.language.passages import Passage
    from millhand.pipeline.settings import OrderSettings
    from millhand.store import Store

log = logging.getLogger("millhand.orders")

CURSOR = "(reviser)"
"""The place in the alert stream; no plugin's sink can be called so."""
OUTCOMES = ("revised", "unchanged", "overtaken", "backlog", "deadline", "refused", "failed")
PAGE, RETRY_FIRST_S, RETRY_LAST_S = 200, 1.0, 15.0
PASSAGES, QUERY_CHARACTERS = 5, 400
JUDGED = ("symptom", "likely_cause", "action", "parts", "tools", "skill", "minutes", "citations")
"""What makes a version another one."""


@dataclass(frozen=True)
class Sources:
    """What a revision is made with. Each is asked for anew for each order: servers and plugins come and go."""

    revisers: Callable[[], Sequence[OrderReviser]]
    complete: Callable[[], Complete]
    knowledge: Callable[[], KnowledgeBase | None]
    pack: Callable[[], Pack]
    assets: Callable[[], Collection[str]]
    judge: Judge
    """The guards, on texts that a prompt may hold."""


class Revision:
    """The task. `status` says what it did and why a draft stands."""

    def __init__(self, store: Store, settings: OrderSettings, sources: Sources) -> None:
        self._store = store
        self._settings = settings
        self._sources = sources
        self._outcomes: Counter[str] = Counter()
        self._struck = 0
        self._error: MillhandError | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, where a reviser is configured."""
        if self._settings.reviser:
            self._task = asyncio.create_task(self._run(), name="order revision")

    async def stop(self) -> None:
        """An order that is being revised is looked at again at the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def status(self) -> dict[str, Any]:
        return {
            "reviser": self._settings.reviser,
            "outcomes": {outcome: self._outcomes[outcome] for outcome in OUTCOMES},
            "struck": self._struck,
            "error": self._error.message if self._error else "",
            "hint": self._error.hint if self._error else "",
        }

    async def _run(self) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            seen = self._store.changed.count
            try:
                if not await self._look():
                    await self._store.changed.after(seen)
                delay_s = RETRY_FIRST_S
                continue
            except MillhandError as error:
                self._tell(error)
            except Exception as error:
                log.exception("revising work orders failed")
                self._tell(LanguageError(f"revising failed: {type(error).__name__}: {error}", hint="report a defect"))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_LAST_S)

    async def _look(self) -> bool:
        """Revise what came since the cursor, up to a page of the stream; return whether there was any."""
        reviser, epoch = self._reviser(), self._store.epoch
        records = await self._store.records_after(await self._store.sink_cursor(CURSOR), PAGE)
        drafts = [
            (place, record) for place, record in records if isinstance(record, WorkOrder) and record.revision == 1
        ]
        late, drafts = drafts[: -self._settings.revise_backlog], drafts[-self._settings.revise_backlog :]
        for _, draft in late:
            self._count("backlog", draft, f"more than {self._settings.revise_backlog} waited")
        for place, draft in drafts:
            await self._revise(reviser, draft)
            if self._store.epoch != epoch:
                return True  # the places are those of a file that was set aside meanwhile
            await self._store.advance_sink(CURSOR, place)
        if records:
            await self._store.advance_sink(CURSOR, records[-1][0])
        return bool(records)

    def _reviser(self) -> OrderReviser:
        """Raises ConfigError where no plugin brings it: orders wait then, for the plugin may come up yet."""
        revisers = {reviser.name: reviser for reviser in self._sources.revisers()}
        name = self._settings.reviser
        if name not in revisers:
            raise ConfigError(
                f"[orders] reviser = '{name}' is not known{suggestion(name, revisers)}",
                hint="'millhand plugin list' shows which revisers' plugins are loaded",
            )
        return revisers[name]

    async def _revise(self, reviser: OrderReviser, draft: WorkOrder) -> None:
        """One order; every failure is counted and told, and leaves the draft."""
        try:
            newest = await self._store.order(draft.id)
            alert = await self._store.alert(draft.alert_id)
            if newest is None or alert is None or newest.revision != draft.revision:
                self._count("overtaken", draft, "it has another version, or is gone")
                return
            async with asyncio.timeout(self._settings.revise_deadline_s):
                judged = await self._judged(reviser, draft, alert)
        except TimeoutError:
            why = f"no version within {self._settings.revise_deadline_s:g} s"
            waited = f"; the last error: {self._error.text}" if self._error else ""
            self._count("deadline", draft, why + waited)
            return
        except MillhandError as error:
            self._error = error
            outcome = {DeadlineError: "deadline", RefusedError: "refused"}.get(type(error), "failed")
            self._count(outcome, draft, error.text)
            return
        except Exception as error:
            log.exception("reviser %s failed", reviser.name)
            self._count("failed", draft, f"{type(error).__name__}: {error}")
            return
        await self._commit(judged, draft)

    async def _commit(self, judged: WorkOrder, draft: WorkOrder) -> None:
        self._error = None
        self._struck += len(judged.struck)
        if all(getattr(judged, name) == getattr(draft, name) for name in JUDGED):
            self._count("unchanged", draft, f"{len(judged.struck)} struck, nothing new was left")
        elif await self._store.revise_order(judged) is None:
            self._count("overtaken", draft, "a person was quicker")
        else:
            self._count("revised", draft, f"{len(judged.struck)} struck")

    async def _judged(self, reviser: OrderReviser, draft: WorkOrder, alert: Alert) -> WorkOrder:
        """Ask the reviser until it answers; the caller sets the time. Raises what will not go away."""
        history = await self._store.alerts(asset=draft.asset, limit=self._settings.history)
        earlier = [found for found in history if found.id != alert.id and found.raised_ns <= alert.raised_ns]
        pack = self._sources.pack()
        delay_s = RETRY_FIRST_S
        while True:
            try:
                found = Material(draft, alert, earlier, await self._passages(draft, alert))
                seen = await screened(found, self._sources.judge)
                version = await reviser.revise(
                    seen.draft, seen.alert, seen.history, seen.passages, pack, self._sources.complete()
                )
                break
            except LanguageError as error:
                if not error.retriable:
                    raise
                self._error = error
            await asyncio.sleep(delay_s)  # the server may be starting
            delay_s = min(2 * delay_s, RETRY_LAST_S)
        version = restored(version, seen.draft, draft)
        stamped = msgspec.structs.replace(version, writer=reviser.name, revised_ns=time.time_ns())
        known = fault_texts(pack, alert.kind, draft.language)
        # A long answer costs some milliseconds of regular expressions: not on the event loop.
        return await asyncio.to_thread(ground, stamped, draft, seen.passages, known, tuple(self._sources.assets()))

    async def _passages(self, draft: WorkOrder, alert: Alert) -> Sequence[Passage]:
        """What the knowledge base finds; an order is revised without it where it fails."""
        knowledge = self._sources.knowledge()
        if knowledge is None:
            return ()
        query = f"{alert.kind.replace('_', ' ')} {draft.likely_cause} {draft.symptom}"[:QUERY_CHARACTERS]
        try:
            return await knowledge.search(query, draft.asset, PASSAGES)
        except Exception as error:
            log.warning("the knowledge base found nothing for order %s: %s", draft.id[:8], error)
            return ()

    def _count(self, outcome: str, draft: WorkOrder, why: str) -> None:
        self._outcomes[outcome] += 1
        level = logging.INFO if outcome in ("revised", "unchanged") else logging.WARNING
        log.log(level, "work order %s of %s: %s (%s)", draft.id[:8], draft.asset, outcome, why)

    def _tell(self, error: MillhandError) -> None:
        if self._error is None or self._error.message != error.message:
            log.error("work orders are not revised: %s", error.text)
        self._error = error


def fault_texts(pack: Pack, kind: str, language: str) -> list[str]:
    """What the pack says of a kind of alert in one language; nothing of a kind that it does not know."""
    fault = pack.faults.get(kind)
    if fault is None:
        return []
    terms = [fault.component, *fault.tools, *fault.parts, *([fault.skill] if fault.skill else [])]
    terms += [cause.component for cause in fault.causes]
    return [
        pack.say(fault.symptom, language),
        *(pack.say(cause.text, language) for cause in fault.causes),
        *pack.steps(kind, language),
        *(pack.term(term, language) for term in dict.fromkeys(terms)),
        *([f"{fault.minutes} min"] if fault.minutes else []),
    ]
