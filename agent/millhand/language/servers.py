"""The node's language model: chosen, served by one or several processes, and what others are told of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from millhand.errors import InputError, LanguageError, MillhandError
from millhand.language.client import LanguageClient, Place
from millhand.language.exchange import bearer
from millhand.language.launch import Ability
from millhand.language.plan import Plan
from millhand.language.replica import Replica
from millhand.language.settings import LanguageSettings

log = logging.getLogger("millhand.language")

EMBEDS: frozenset[Ability] = frozenset({"embeddings", "usage"})
"""All that a server does with a model that embeds."""
RANK = {"ready": 0, "starting": 1, "restarting": 2, "failed": 3}


class LanguageServers:
    """Every process of the model that `[language]` names; nothing runs where it names none."""

    def __init__(self, settings: LanguageSettings, make_plan: Callable[[], Plan], log_dir: Path) -> None:
        """`make_plan` runs in a thread, by the settings of then; it raises MillhandError where nothing can serve."""
        self.settings = settings
        self.plan: Plan | None = None
        self.replicas: list[Replica] = []
        self._make_plan = make_plan
        self._log_dir = log_dir
        self._task: asyncio.Task[None] | None = None
        self._fault: MillhandError | None = None
        self._changed = asyncio.Event()
        self._exchanging = asyncio.Lock()
        self._turn = 0

    def start(self) -> None:
        """Begin; returns at once, the model comes when it comes."""
        if self.settings.model:
            self._task = asyncio.create_task(self._begin(), name="language servers")

    async def stop(self) -> None:
        """End every process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        self.replicas = []
        self.plan = None
        self._tell()

    async def exchange_settings(self, settings: LanguageSettings) -> None:
        """Serve what `settings` say from now on; nothing happens where they are the same."""
        async with self._exchanging:
            if settings != self.settings:
                await self.stop()
                self.settings, self._fault = settings, None
                self.start()

    async def restart(self, replica: str = "") -> list[str]:
        """Start one process anew, or all of them with a new plan; returns their names. Raises InputError."""
        if not self.settings.model:
            raise InputError("no language model is configured", hint="name one as [language] model")
        async with self._exchanging:
            if replica:
                found = [one for one in self.replicas if one.name == replica]
                if not found:
                    names = ", ".join(one.name for one in self.replicas) or "none runs"
                    raise InputError(f"no language server is called '{replica}'", hint=f"one of: {names}")
                await found[0].restart()
                return [replica]
            await self.stop()
            self._fault = None
            self.start()
            return [self.settings.model]

    async def _begin(self) -> None:
        """Plan and start; a plan that cannot be is made again with back-off: a model may be added meanwhile."""
        delay_s = self.settings.restart_delay_s
        while (plan := await self._try_plan()) is None:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, self.settings.restart_delay_cap_s)
        self.plan = plan
        log.info("language model '%s': %s", plan.model.name, "; ".join(plan.reasons))
        names = [plan.model.name, *(f"{plan.model.name}-{number}" for number in range(2, len(plan.launches) + 1))]
        self.replicas = [
            Replica(name, launch, plan.server, self.settings, self._log_dir / f"{name}.log", self._tell)
            for name, launch in zip(names, plan.launches, strict=True)
        ]
        for replica in self.replicas:
            replica.start()
        self._tell()

    async def _try_plan(self) -> Plan | None:
        """A plan, or None: then the fault is told."""
        before = self._fault
        try:
            plan = await asyncio.to_thread(self._make_plan)
        except MillhandError as error:
            self._fault = error
        except Exception as error:
            log.exception("language model '%s': planning failed", self.settings.model)
            hint = "a file is gone, or a plugin is at fault: see the log"
            self._fault = LanguageError(f"it cannot be planned: {type(error).__name__}: {error}", hint=hint)
        else:
            self._fault = None
            return plan
        if before is None or before.message != self._fault.message:
            log.error("language model '%s': %s", self.settings.model, self._fault.text)
        self._tell()
        return None

    # ---- what others are told ---------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """`off`, or the best state of any process: starting, ready, restarting, failed."""
        if not self.settings.model:
            return "off"
        if not self.replicas:
            return "failed" if self._fault else "starting"
        return min((replica.state for replica in self.replicas), key=lambda state: RANK[state])

    def show(self) -> dict[str, Any]:
        """Everything, for `millhand language show`."""
        plan = self.plan
        return {
            **self._told(),
            "why": plan.reasons if plan else [],
            "path": str(plan.model.path) if plan else "",
            "precision": plan.model.manifest.precision if plan else "",
            "replicas": [replica.to_dict() for replica in self.replicas],
        }

    def routes(self) -> dict[str, Any]:
        """What another process needs to send requests itself, `keys` by URL included."""
        keys = {replica.url: replica.api_key for replica in self._ready()}
        return {"models": [{**self._told(), "keys": keys}] if self.settings.model else []}

    async def watch_routes(self) -> AsyncIterator[dict[str, Any]]:
        """Yield `routes` now and after every change."""
        while True:
            changed = self._changed
            yield self.routes()
            await changed.wait()

    def _told(self) -> dict[str, Any]:
        plan, worst = self.plan, max(self.replicas, key=lambda one: RANK[one.state], default=None)
        fault = self._fault
        return {
            "name": self.settings.model,
            "state": self.state,
            "reason": fault.message if fault else worst.reason if worst else "",
            "hint": fault.hint if fault else worst.hint if worst else "",
            "server": plan.server.name if plan else "",
            "abilities": sorted(_abilities(plan)) if plan else [],
            "context_tokens": plan.head.context_tokens if plan else 0,
            "slots": plan.head.slots if plan else 0,
            "reasoning": plan.head.reasoning if plan else False,
            "embeddings": plan.head.embeddings if plan else False,
            "parameters": plan.model.manifest.parameters if plan else 0,
            "urls": [replica.url for replica in self._ready()],
        }

    def _ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "ready" and replica.url]

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- the agent's own questions ----------------------------------------------------------------------------------

    def client(self, gateway: Callable[[], Place] | None = None) -> LanguageClient:
        """Asks the model: through `gateway` where there is one, so that its guards see it, else one process in turn."""
        return LanguageClient(gateway or self._next_place, lambda: self.routes()["models"])

    def _next_place(self) -> Place:
        ready = self._ready()
        if not ready:
            told = self._told()
            why = f": {told['reason']}" if told["reason"] else ""
            raise LanguageError(
                f"the language model is {told['state']}{why}", hint=told["hint"] or "millhand language show"
            )
        self._turn += 1
        chosen = ready[self._turn % len(ready)]
        return Place(chosen.url, bearer(chosen.api_key))


def _abilities(plan: Plan) -> frozenset[Ability]:
    """What the server can do with this model: it chats, or it embeds."""
    abilities = plan.server.abilities
    return abilities & EMBEDS if plan.head.embeddings else abilities - {"embeddings"}
