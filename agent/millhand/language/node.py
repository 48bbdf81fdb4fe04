"""The node's language side, put together: servers, gateway, knowledge, the revision of orders, people's questions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from millhand.errors import LanguageError
from millhand.language.asking import Asking
from millhand.language.client import LanguageClient, Place
from millhand.language.knowledge import NodeKnowledge
from millhand.language.library import open_library
from millhand.language.pack import find_pack
from millhand.language.plan import Plan, make_plan, servers_of
from millhand.language.revision import Revision, Sources
from millhand.language.servers import LanguageServers
from millhand.serving.front import FrontProcess, gateway_front
from millhand.serving.openai.tokens import hashed

if TYPE_CHECKING:
    from millhand.config import Config
    from millhand.hardware import Hardware
    from millhand.language.passages import Passage
    from millhand.profiles import Match
    from millhand.registry import Registry
    from millhand.serving.pool import ModelPool
    from millhand.serving.repository import Repository
    from millhand.store import Store


class NodeLanguage:
    """Nothing of it runs where no language model is named, but for the knowledge base, whose search needs none."""

    servers: LanguageServers
    knowledge: NodeKnowledge
    revision: Revision
    gateway: FrontProcess | None

    def __init__(self, config: Callable[[], Config], registry: Registry) -> None:
        """`config` is asked for anew: a reload changes it. Raises ConfigError where the gateway lacks its package."""
        self._config = config
        self._registry = registry
        self._agent_token = secrets.token_urlsafe(32)
        self.gateway = self._make_gateway()

    async def start(
        self, hardware: Hardware, match: Match, store: Store, repository: Repository, pool: ModelPool
    ) -> None:
        """Begin to start the servers, and open the knowledge base; the gateway listens when the daemon says so."""
        config = self._config()
        self._store = store

        def plan() -> Plan:
            now = self._config()
            return make_plan(now.language, open_library(now), servers_of(self._registry), match, hardware)

        self.servers = LanguageServers(config.language, plan, config.node.data_dir / "log")
        self.servers.start()
        self.knowledge = NodeKnowledge(self._registry.one("millhand_knowledge"), config.knowledge, config.pack)
        await self.knowledge.start(config.node.data_dir, repository.find, pool.infer, store)
        self.revision = self._make_revision()

    async def reload(self, old: Config) -> None:
        """Take over what the configuration says now; `old` is what it said."""
        config = self._config()
        await self.servers.exchange_settings(config.language)
        if config.orders != old.orders or config.pack != old.pack:
            await self.revision.stop()
            self.revision = self._make_revision()
            self.revision.start()

    @property
    def gateway_url(self) -> str:
        """Where the gateway listens; empty where it is switched off."""
        if self.gateway is None:
            return ""
        host = self._config().gateway.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.gateway.port}"

    def complete(self) -> LanguageClient:
        """Asks the language model as the agent itself: through the gateway, and so its guards, where there is one."""
        return self.servers.client(None if self.gateway is None else self._gateway_place)

    def asking(self) -> Asking:
        """Answers people's questions. Raises ConfigError where the pack is not there."""
        return Asking(self._store, self.complete(), self._search, find_pack(self._config().pack))

    async def _search(self, query: str, asset: str, limit: int) -> Sequence[Passage]:
        return await self.knowledge.search(query, asset, limit)

    def _gateway_place(self) -> Place:
        if self.gateway is None or not self.gateway.port:
            raise LanguageError("the gateway does not listen yet", hint="ask again later")
        return Place(self.gateway_url, {"Authorization": f"Bearer {self._agent_token}"}, guarded=True)

    def _make_gateway(self) -> FrontProcess | None:
        config = self._config()
        if not config.serves_gateway:
            return None
        tables = config.plugin_tables()
        guarding = [name for name, plugin in self._registry.plugins.items() if "millhand_guards" in plugin.hooks]
        return gateway_front(
            config.gateway,
            config.node.control_path,
            config.node.data_dir,
            agent_sha256=hashed(self._agent_token),
            plugins={name: tables[name] for name in guarding},
            tracing=config.tracing,
            log_settings=config.log,
        )

    def _make_revision(self) -> Revision:
        config = self._config()
        sources = Sources(
            revisers=lambda: [reviser for _, reviser in self._registry.collect("millhand_order_revisers")],
            complete=self.complete,
            knowledge=lambda: self.knowledge.opened,
            pack=cache(partial(find_pack, config.pack)),
            assets=lambda: {asset.name for asset in self._config().assets},
            judge=lambda parts: self.complete().judged(parts),
        )
        return Revision(self._store, config.orders, sources)
