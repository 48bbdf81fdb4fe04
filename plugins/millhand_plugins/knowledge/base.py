"""The knowledge base as the core uses it: asynchronous, all blocking work in threads."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millhand.errors import InputError, MillhandError, StoreError
from millhand_plugins.knowledge.database import Database, Filter, Source
from millhand_plugins.knowledge.folders import files_of
from millhand_plugins.knowledge.fusion import fuse
from millhand_plugins.knowledge.reading import TABLE, Piece, pieces_of_text, read_bytes, read_pieces
from millhand_plugins.knowledge.settings import KnowledgeConfig
from millhand_plugins.knowledge.shorthand import Lexicon, Shorthand

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from millhand.hookspecs import Embed
    from millhand.language.passages import Passage

log = logging.getLogger("millhand.knowledge")

FILE = "knowledge.db"
EMBED_AT_ONCE = 32
RANKED = 50
"""How many passages of each ranking are fused."""
QUERY_CHARACTERS_CAP = 2000
RETRY_FIRST_S, RETRY_LAST_S = 2.0, 300.0

Result = TypeVar("Result")


class Knowledge:
    """Words by BM25, meaning by vectors, fused. Where no vector can be had, words alone; vectors come later."""

    name = "knowledge"

    def __init__(self, config: KnowledgeConfig) -> None:
        self._config = config
        self._database: Database | None = None
        self._shorthand: Shorthand
        self._embed: Embed | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="knowledge")
        self._adding = asyncio.Lock()
        self._behind = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None

    async def open(self, folder: Path, embed: Embed | None) -> None:
        """As in the protocol. Raises StoreError."""
        await self._do(lambda: self._open(folder))
        if embed is not None:
            await self.use(embed)

    async def use(self, embed: Embed) -> None:
        """As in the protocol. Raises StoreError."""
        await self._do(lambda: self._opened.use_embedder(embed.model))
        self._embed = embed
        self._behind.set()
        if self._filling is None:
            self._filling = asyncio.create_task(self._fill(), name="knowledge vectors")

    def _open(self, folder: Path) -> None:
        self._shorthand = Shorthand(Lexicon.read())
        self._database = Database(folder / FILE, self._shorthand.expand, self._config.passages_cap)

    @property
    def _opened(self) -> Database:
        if self._database is None:
            raise StoreError("the knowledge base is not open", hint="look at the daemon's log")
        return self._database

    async def close(self) -> None:
        """Release everything; may be called twice."""
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
            self._filling = None
        if self._database is not None:
            await self._do(self._database.close)
            self._database = None
        self._thread.shutdown(wait=False)

    # ---- taking in --------------------------------------------------------------------------------------------------

    async def add(self, path: Path, assets: Sequence[str] = (), kind: str = "manual") -> Mapping[str, Any]:
        """As in the protocol: `added`, `unchanged`, `removed` (files that are gone from a folder), `passages`, `bytes`,
        and `refused`: source, error and hint of each file that cannot be taken in. A single file that cannot is an
        InputError.
        """
        path, files, refused = await asyncio.to_thread(files_of, path, self._config.files_cap)
        counts: dict[str, Any] = {"added": 0, "unchanged": 0, "removed": 0, "passages": 0, "bytes": 0}
        counts["refused"] = [
            {"source": str(file), "error": why, "hint": "copy the file into the folder"} for file, why in refused
        ]
        async with self._adding:
            if files != [path]:
                counts["removed"] = await self._forget_gone(path, files)
            for file in files:
                try:
                    await self._add_file(file, path, tuple(assets), kind, counts)
                except InputError as error:
                    if file == path:
                        raise
                    counts["refused"].append({"source": str(file), "error": error.message, "hint": error.hint})
        return counts

    async def add_text(self, source: str, text: str, assets: Sequence[str] = (), kind: str = "order") -> int:
        """As in the protocol. An empty text removes the source."""
        if not text.strip():
            return await self.remove(source) and 0
        data = text.encode("utf-8", "replace")
        if len(data) > self._config.text_characters_cap:
            raise InputError(f"'{source}' has {len(data):,} bytes of text", hint="shorten it")
        taken = Source(source, "", kind, tuple(assets), hashlib.sha256(data).hexdigest(), len(data))
        async with self._adding:
            known = await self._do(lambda: self._opened.source(name=source))
            if known == taken:
                return 0
            pieces = await asyncio.to_thread(pieces_of_text, data.decode(), self._config)
            await self._put(taken, pieces)
        return len(pieces)

    async def remove(self, source: str) -> int:
        """As in the protocol; a path names a source too. Raises InputError where it is not known."""
        known = await self._do(lambda: self._opened.source(name=source, path=source))
        if known is None:
            raise InputError(f"source '{source}' is not known", hint="millhand knowledge list shows the sources")
        return await self._do(lambda: self._opened.remove(known.name))

    async def sources(self) -> Sequence[Mapping[str, Any]]:
        """As in the protocol, by name."""
        return await self._do(self._opened.sources)

    async def _add_file(
        self, file: Path, given: Path, assets: tuple[str, ...], kind: str, counts: dict[str, Any]
    ) -> None:
        data = await asyncio.to_thread(read_bytes, file, self._config)
        digest = f"{hashlib.sha256(data).hexdigest()} {self._config.passage_characters}"
        if kind == "manual" and file.suffix.lower() in TABLE:
            kind = "parts"
        known = await self._do(lambda: self._opened.source(path=str(file)))
        name = known.name if known else await self._name(file, given)
        source = Source(name, str(file), kind, assets, digest, len(data))
        if known == source:
            counts["unchanged"] += 1
            return
        pieces = await asyncio.to_thread(read_pieces, file, data, self._config)
        await self._put(source, pieces)
        counts["added"] += 1
        counts["passages"] += len(pieces)
        counts["bytes"] += len(data)

    async def _name(self, file: Path, given: Path) -> str:
        """The shortest name that is free: in its folder, else its path."""
        short = file.name if file == given else str(file.relative_to(given))
        taken = await self._do(lambda: self._opened.source(name=short))
        return short if taken is None else str(file)

    async def _forget_gone(self, folder: Path, files: Sequence[Path]) -> int:
        there = {str(file) for file in files}
        under = await self._do(lambda: self._opened.names_under(str(folder)))
        gone = [name for name, path in under if path not in there]
        for name in gone:
            await self._do(lambda name=name: self._opened.remove(name))  # type: ignore[misc]
        return len(gone)

    async def _put(self, source: Source, pieces: Sequence[Piece]) -> None:
        """Words are found from the commit on; vectors follow."""
        await self._do(lambda: self._opened.put(source, pieces, None))
        self._behind.set()

    # ---- vectors ----------------------------------------------------------------------------------------------------

    async def _fill(self) -> None:
        """Give passages their vectors as they come; where the embedder fails, try again later."""
        delay_s = RETRY_FIRST_S
        while True:
            await self._behind.wait()
            self._behind.clear()
            try:
                while waiting := await self._do(lambda: self._opened.without_vectors(EMBED_AT_ONCE)):
                    ids = [id for id, _, _ in waiting]
                    vectors = await self._embedding([f"{title}\n{text}".lstrip() for _, title, text in waiting])
                    await self._do(lambda ids=ids, vectors=vectors: self._opened.set_vectors(ids, vectors))  # type: ignore[misc]
                delay_s = RETRY_FIRST_S
            except MillhandError as error:
                log.warning("passages wait for their vectors: %s", error.text)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_LAST_S)
                self._behind.set()

    async def _embedding(self, texts: Sequence[str]) -> NDArray[np.float32]:
        assert self._embed is not None
        return await self._embed(texts)

    # ---- search -----------------------------------------------------------------------------------------------------

    async def search(self, query: str, asset: str = "", limit: int = 5, kinds: Sequence[str] = ()) -> Sequence[Passage]:
        """As in the protocol. Where the embedder fails, by words alone."""
        query = query[:QUERY_CHARACTERS_CAP].encode("utf-8", "replace").decode()
        if not query.strip() or limit < 1:
            return []
        chosen = Filter(asset, tuple(kinds))
        rankings = [await self._do(lambda: self._opened.by_words(query, chosen, RANKED))]
        if self._embed is not None:
            try:
                full = await asyncio.to_thread(self._shorthand.expand, query)
                (vector,) = await self._embedding([full])
                rankings.append(await self._do(lambda: self._opened.by_vector(vector, chosen, RANKED)))
            except MillhandError as error:
                log.warning("searched by words alone: %s", error.text)
        fused = fuse(rankings)[:limit]
        return await self._do(lambda: self._opened.passages(fused))

    async def _do(self, work: Callable[[], Result]) -> Result:
        """Run in the database's thread. Raises what `work` does; what SQLite raises as StoreError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(
                f"the knowledge base cannot be read: {error}",
                hint="check the disk; delete `knowledge` in [node] data_dir to begin anew",
            ) from error
