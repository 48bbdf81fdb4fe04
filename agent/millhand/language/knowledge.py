"""The node's knowledge: a plugin's knowledge base, the embedder, the pack's texts, and past work orders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import Field

from millhand.errors import InputError, MillhandError, ModelError, PluginError, SinkError
from millhand.language.embedding import Embedding, Infer
from millhand.language.pack import PackSettings, find_pack
from millhand.pipeline.sinks import SinkRunner, SinkStore
from millhand.records import TECHNICIAN, Alert, WorkOrder
from millhand.validation import StrictTable

if TYPE_CHECKING:
    from millhand.control import Handler
    from millhand.hookspecs import KnowledgeBase
    from millhand.language.passages import Passage
    from millhand.serving.repository import ModelFolder

log = logging.getLogger("millhand.knowledge")

FOLDER = "knowledge"
"""In [node] data_dir."""
PACK = "pack"
"""Kind of the passages that come with the pack; people add the others."""
KINDS = ("manual", "parts", "order")
SEARCH_LIMIT = 50


class FolderSettings(StrictTable):
    path: Path
    """A file or a folder: Markdown, text, PDF, CSV."""
    assets: tuple[str, ...] = ()
    """Assets that it is about; empty: all."""
    kind: str = Field(default="manual", pattern="^(manual|parts|order)$")
    """`manual`, `parts` or `order`; a CSV of a `manual` counts as `parts`."""


class KnowledgeSettings(StrictTable):
    """What the language model may know of this plant; the plugin `knowledge` keeps it."""

    embedder: str = "minilm"
    """The model of the repository that finds passages by meaning (`millhand knowledge setup` makes it); without it they
    are found by their words alone."""
    pack: bool = True
    """Take in the knowledge that the pack brings."""
    orders: bool = True
    """Take in work orders that a technician has edited: what was found and done stands there."""
    folders: tuple[FolderSettings, ...] = ()
    """What is taken in at each start; files that changed are read again, those that are gone are forgotten."""


class EditedOrders:
    """Takes work orders in that a technician has edited, as they come; a sink, so that none is missed or repeated."""

    name = "knowledge"

    def __init__(self, base: KnowledgeBase) -> None:
        self._base = base

    async def deliver(self, record: Alert | WorkOrder) -> None:
        """Raises SinkError where it must be offered again."""
        if not isinstance(record, WorkOrder) or not record.writer.startswith(TECHNICIAN):
            return
        text = "\n".join([record.symptom, record.likely_cause, *record.action, *record.parts])
        try:
            await self._base.add_text(f"order {record.id}", text, [record.asset], "order")
        except InputError as error:
            log.warning("order %s is not taken in: %s", record.id, error.text)
        except MillhandError as error:
            raise SinkError(error.message, hint=error.hint) from error

    async def close(self) -> None:
        """Nothing is held."""


class NodeKnowledge:
    """Opens the knowledge base, feeds it, and answers the calls `knowledge.*`."""

    def __init__(self, base: KnowledgeBase | None, settings: KnowledgeSettings, pack: PackSettings) -> None:
        """base: none where no plugin brings one. Starts nothing."""
        self._base = base
        self._settings = settings
        self._pack = pack
        self._opened = False
        self._embedded = False
        self._embed: Embedding | None = None
        self._error: MillhandError | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._problems: list[str] = []
        """What of the pack and the folders was not taken in, and why."""
        self._orders: SinkRunner | None = None

    async def start(self, data_dir: Path, find: Callable[[str], ModelFolder], infer: Infer, store: SinkStore) -> None:
        """Open, and begin to feed. What fails is logged and told by the calls: machines are watched without it.

        find: the repository's model by name, or ModelError.
        """
        if self._base is None:
            return
        self._find_embedder = partial(self._embedding, find, infer)
        embed = self._embed = await self._find_embedder()
        self._embedded = embed is not None
        try:
            await self._base.open(data_dir / FOLDER, embed)
        except Exception as error:  # of a plugin: it must not keep the node from its machines
            self._error = error if isinstance(error, MillhandError) else _fault(error)
            log.error("the knowledge base is not there: %s", self._error.text)
            return
        self._opened = True
        if self._settings.orders:
            self._orders = SinkRunner(EditedOrders(self._base), store)
            await self._orders.start()
        self._feeding = asyncio.create_task(self._feed(), name="knowledge")

    async def stop(self) -> None:
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)
        if self._orders is not None:
            await self._orders.stop()
        if self._base is not None and self._opened:
            await self._base.close()
            self._opened = False

    @property
    def opened(self) -> KnowledgeBase | None:
        """The open knowledge base; None where there is none."""
        return self._base if self._opened else None

    @property
    def base(self) -> KnowledgeBase:
        """The open knowledge base. Raises PluginError or what its opening raised."""
        if self._base is None:
            raise PluginError("no plugin brings a knowledge base", hint="add [plugins.knowledge] to the configuration")
        if self._error is not None:
            raise self._error
        if not self._opened:
            raise PluginError("the knowledge base is not open yet", hint="try again in a moment", retriable=True)
        return self._base

    async def search(self, query: str, asset: str = "", limit: int = 5, kinds: Sequence[str] = ()) -> Sequence[Passage]:
        """The best passages, best first; none where there is no knowledge base."""
        return [] if self.opened is None else await self.opened.search(query, asset, limit, kinds)

    async def _embedding(self, find: Callable[[str], ModelFolder], infer: Infer) -> Embedding | None:
        try:
            return await asyncio.to_thread(lambda: Embedding(find(self._settings.embedder), infer))
        except MillhandError as error:
            log.warning("knowledge is found by words alone: %s", error.text)
            return None

    async def _feed(self) -> None:
        """Take in what the pack and the settings name; forget another pack's."""
        try:
            pack = await asyncio.to_thread(find_pack, self._pack) if self._settings.pack else None
        except MillhandError as error:
            log.error("the pack's knowledge is not taken in: %s", error.text)
            self._problems.append(f"the pack: {error.text}")
            pack = None
        try:
            for source in await self.base.sources():
                if source["kind"] == PACK and (pack is None or source["path"] not in map(str, pack.knowledge)):
                    await self.base.remove(source["source"])
        except MillhandError as error:
            log.warning("another pack's knowledge stays: %s", error.text)
        wanted = [FolderSettings(path=pack.folder / FOLDER)] if pack is not None and pack.knowledge else []
        for folder in [*wanted, *self._settings.folders]:
            kind = PACK if folder in wanted else folder.kind
            try:
                counts = await self.base.add(folder.path, folder.assets, kind)
            except MillhandError as error:
                log.error("'%s' is not taken in: %s", folder.path, error.text)
                self._problems.append(f"'{folder.path}': {error.text}")
                continue
            for refused in counts["refused"]:
                log.warning("not taken in: %s (%s)", refused["error"], refused["hint"])
                self._problems.append(f"{refused['error']} ({refused['hint']})")

    # ---- control calls ----------------------------------------------------------------------------------------------

    async def _vectors(self, model: str, texts: list[str]) -> list[list[float]]:
        """The texts as vectors of length 1, for the gateway. Raises ModelError where the embedder has another name."""
        if self._embed is None or model != self._settings.embedder:
            raise ModelError(
                f"model '{model}' is not served",
                hint=f"the node's embedder is '{self._settings.embedder}' (millhand knowledge setup makes it)",
            )
        vectors: list[list[float]] = (await self._embed(texts)).tolist()
        return vectors

    async def _take_up(self) -> dict[str, Any]:
        """Use the embedder where it was not there at the start; its model must be loaded."""
        base = self.base
        if self._embed is None and (embed := await self._find_embedder()) is not None:
            await base.use(embed)
            self._embed, self._embedded = embed, True
        return {"by_meaning": self._embedded}

    def handlers(self) -> dict[str, Handler]:
        """The calls of the control socket."""
        return {
            "knowledge.add": self._add,
            "knowledge.embed": self._vectors,
            "knowledge.list": self._list,
            "knowledge.remove": self._remove,
            "knowledge.search": self._search,
            "knowledge.take_up": self._take_up,
        }

    async def _add(self, path: str, assets: Sequence[str] = (), kind: str = "manual") -> dict[str, Any]:
        if kind not in KINDS:
            raise InputError(f"kind '{kind}' is not known", hint=f"one of: {', '.join(KINDS)}")
        return dict(await self.base.add(Path(path), assets, kind))

    async def _list(self) -> dict[str, Any]:
        sources = list(await self.base.sources())
        orders = None if self._orders is None else self._orders.status()
        feeding = self._feeding is not None and not self._feeding.done()
        return {
            "by_meaning": self._embedded,
            "sources": sources,
            "feeding": feeding,
            "problems": list(self._problems),
            "orders": orders,
        }

    async def _remove(self, source: str) -> dict[str, Any]:
        return {"passages": await self.base.remove(source)}

    async def _search(
        self, query: str, asset: str = "", limit: int = 5, kinds: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        if not 1 <= limit <= SEARCH_LIMIT:
            raise InputError(f"limit = {limit} is not 1 to {SEARCH_LIMIT}", hint="give fewer")
        found = await self.base.search(query, asset, limit, kinds)
        return [{**msgspec.to_builtins(passage), "place": passage.place} for passage in found]


def _fault(error: Exception) -> PluginError:
    return PluginError(
        f"the knowledge base cannot be opened: {type(error).__name__}: {error}", hint="report this to its author"
    )
