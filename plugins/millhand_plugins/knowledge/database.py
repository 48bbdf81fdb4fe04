"""Sources, passages, their words (FTS5, BM25) and vectors in one SQLite file. Blocking; one thread uses it.

A source is taken in or forgotten in one transaction, words and vectors with it, so that a kill at any time leaves it
whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, StoreError
from millhand.language.passages import Passage
from millhand_plugins.knowledge.matrix import Matrix
from millhand_plugins.knowledge.reading import Piece

log = logging.getLogger("millhand.knowledge")

FORMAT = 1
BM25_WEIGHTS = (1.0, 0.5, 1.0)
"""Of text, title, and the text with its shorthand in full."""
NOTES = ("order", "parts")
"""Kinds whose texts are written in shorthand; manuals are prose."""
QUERY_WORDS_CAP = 64
CJK = re.compile(r"([\u3400-\u9fff])")
"""FTS5 takes a run of Chinese as one word; each character is made one here, and a run in a query a phrase."""

SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE source (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, path TEXT NOT NULL, kind TEXT NOT NULL, assets TEXT NOT NULL,
  digest TEXT NOT NULL, bytes INTEGER NOT NULL, added_ns INTEGER NOT NULL
);
CREATE TABLE source_asset (source_id INTEGER NOT NULL REFERENCES source ON DELETE CASCADE, asset TEXT NOT NULL);
CREATE INDEX source_asset_source ON source_asset (source_id);
CREATE TABLE passage (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL,
  source_id INTEGER NOT NULL REFERENCES source ON DELETE CASCADE,
  title TEXT NOT NULL, page INTEGER NOT NULL, line INTEGER NOT NULL, text TEXT NOT NULL, vector BLOB
);
CREATE INDEX passage_source ON passage (source_id);
CREATE VIRTUAL TABLE word USING fts5 (text, title, expanded, tokenize = 'porter unicode61 remove_diacritics 2');
"""


@dataclass(frozen=True)
class Source:
    """What a source is, beside its text."""

    name: str
    path: str
    """Absolute; empty for a text that is no file."""
    kind: str
    assets: tuple[str, ...]
    digest: str
    bytes: int


@dataclass(frozen=True)
class Filter:
    """Which passages may be found."""

    asset: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def sql(self) -> tuple[str, list[str]]:
        """A condition on `source`, and its values."""
        parts, values = ["1"], []
        if self.asset:
            parts.append(
                "(NOT EXISTS (SELECT 1 FROM source_asset WHERE source_id = source.id) OR "
                "EXISTS (SELECT 1 FROM source_asset WHERE source_id = source.id AND asset = ?))"
            )
            values.append(self.asset)
        if self.kinds:
            parts.append(f"kind IN ({', '.join('?' * len(self.kinds))})")
            values += self.kinds
        return " AND ".join(parts), values


class Database:
    """One open file. `expand` writes shorthand in full."""

    def __init__(self, path: Path, expand: Callable[[str], str], passages_cap: int) -> None:
        """Open or begin `path`; a damaged file is set aside. Raises StoreError where neither can be."""
        self._expand = expand
        self._passages_cap = passages_cap
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._set_aside(error)
                self._connection = self._open()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the knowledge base '{path}' cannot be opened: {error}", hint="check the disk and its permissions"
            ) from error
        self.matrix = Matrix()
        self._read_vectors()

    def close(self) -> None:
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise sqlite3.DatabaseError(f"its format {version} is not this version's {FORMAT}")
            if not version:
                connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            connection.execute("SELECT source_id FROM passage LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_aside(self, error: Exception) -> None:
        to = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        self._path.rename(to)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        log.error("the knowledge base was damaged (%s): it lies in '%s' now; add the sources again", error, to)

    # ---- sources ----------------------------------------------------------------------------------------------------

    def source(self, name: str = "", path: str = "") -> Source | None:
        """A source by name or by path."""
        row = self._connection.execute(
            "SELECT name, path, kind, assets, digest, bytes FROM source WHERE name = ? OR (path = ? AND path != '')",
            (name, path),
        ).fetchone()
        if row is None:
            return None
        name, path, kind, assets, digest, size = row
        return Source(name, path, kind, tuple(json.loads(assets)), digest, size)

    def sources(self) -> list[dict[str, Any]]:
        """All, by name."""
        rows = self._connection.execute(
            "SELECT name, path, kind, assets, bytes, added_ns, "
            "(SELECT count(*) FROM passage WHERE source_id = source.id) FROM source ORDER BY name"
        )
        return [
            {
                "source": name,
                "path": path,
                "kind": kind,
                "assets": json.loads(assets),
                "bytes": size,
                "added_ns": added_ns,
                "passages": passages,
            }
            for name, path, kind, assets, size, added_ns, passages in rows
        ]

    def names_under(self, folder: str) -> list[tuple[str, str]]:
        """(name, path) of the sources whose file lies in a folder."""
        prefix = folder.rstrip("/") + "/"
        rows = self._connection.execute(
            "SELECT name, path FROM source WHERE substr(path, 1, ?) = ?", (len(prefix), prefix)
        )
        return [(str(name), str(path)) for name, path in rows]

    def put(self, source: Source, pieces: Sequence[Piece], vectors: NDArray[np.float32] | None) -> None:
        """Take a source in; one of the same name is replaced. Raises InputError where no room is left, StoreError."""
        with self._writing():
            gone = self._delete(source.name)
            (held,) = self._connection.execute("SELECT count(*) FROM passage").fetchone()
            if held + len(pieces) > self._passages_cap:
                raise InputError(
                    f"'{source.name}': {len(pieces):,} passages more than the {held:,} that are here exceed "
                    f"{self._passages_cap:,}",
                    hint="remove a source, or raise [plugins.knowledge] passages_cap",
                )
            (source_id,) = self._connection.execute(
                "INSERT INTO source (name, path, kind, assets, digest, bytes, added_ns) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "RETURNING id",
                (source.name, source.path, source.kind, json.dumps(source.assets), source.digest, source.bytes,
                 time.time_ns()),
            ).fetchone()  # fmt: skip
            self._connection.executemany(
                "INSERT INTO source_asset VALUES (?, ?)", [(source_id, asset) for asset in source.assets]
            )
            ids = [self._put_piece(source_id, source, piece) for piece in pieces]
            if vectors is not None:
                self._store_vectors(ids, vectors)
        self.matrix.remove(gone)
        if vectors is not None:
            self.matrix.add(ids, vectors)

    def _put_piece(self, source_id: int, source: Source, piece: Piece) -> int:
        key = hashlib.sha256(f"{source.name}\0{piece.page}\0{piece.line}\0{piece.text}".encode()).hexdigest()[:12]
        (id,) = self._connection.execute(
            "INSERT INTO passage (key, source_id, title, page, line, text) VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
            (key, source_id, piece.title, piece.page, piece.line, piece.text),
        ).fetchone()
        expanded = self._expand(piece.text) if source.kind in NOTES else piece.text
        self._connection.execute(
            "INSERT INTO word (rowid, text, title, expanded) VALUES (?, ?, ?, ?)",
            (id, spaced(piece.text), spaced(piece.title), "" if expanded == piece.text else spaced(expanded)),
        )
        return int(id)

    def remove(self, name: str) -> int:
        """Forget a source; returns how many passages that were."""
        with self._writing():
            gone = self._delete(name)
        self.matrix.remove(gone)
        return len(gone)

    def _delete(self, name: str) -> list[int]:
        query = "SELECT passage.id FROM passage JOIN source ON source.id = source_id WHERE name = ?"
        ids = [int(id) for (id,) in self._connection.execute(query, (name,))]
        self._connection.executemany("DELETE FROM word WHERE rowid = ?", [(id,) for id in ids])
        self._connection.execute("DELETE FROM source WHERE name = ?", (name,))
        return ids

    def _writing(self) -> _Writing:
        return _Writing(self._connection, self._path)

    # ---- vectors ----------------------------------------------------------------------------------------------------

    def use_embedder(self, model: str) -> None:
        """Vectors of another model cannot be compared: they are dropped, to be made anew."""
        row = self._connection.execute("SELECT value FROM about WHERE key = 'embedder'").fetchone()
        if row is not None and row[0] == model:
            return
        with self._writing():
            self._connection.execute("UPDATE passage SET vector = NULL")
            self._connection.execute("INSERT OR REPLACE INTO about VALUES ('embedder', ?)", (model,))
        self.matrix = Matrix()

    def without_vectors(self, limit: int) -> list[tuple[int, str, str]]:
        """(id, title, text with its shorthand in full) of passages that wait for a vector."""
        rows = self._connection.execute(
            "SELECT id, passage.title, iif(word.expanded = '', passage.text, word.expanded) "
            "FROM passage JOIN word ON word.rowid = id WHERE vector IS NULL ORDER BY id LIMIT ?",
            (limit,),
        )
        return [(int(id), str(title), str(text)) for id, title, text in rows]

    def set_vectors(self, ids: Sequence[int], vectors: NDArray[np.float32]) -> None:
        """Give passages their vectors; those that are gone meanwhile stay gone, and no id is given twice."""
        with self._writing():
            marks = ", ".join("?" * len(ids))
            kept = {id for (id,) in self._connection.execute(f"SELECT id FROM passage WHERE id IN ({marks})", ids)}  # noqa: S608
            places = [at for at, id in enumerate(ids) if id in kept]
            self._store_vectors([ids[at] for at in places], vectors[places])
        self.matrix.add([ids[at] for at in places], vectors[places])

    def _store_vectors(self, ids: Sequence[int], vectors: NDArray[np.float32]) -> None:
        rows = [(row.astype("<f2").tobytes(), id) for id, row in zip(ids, vectors, strict=True)]
        self._connection.executemany("UPDATE passage SET vector = ? WHERE id = ?", rows)

    def _read_vectors(self) -> None:
        rows = self._connection.execute("SELECT id, vector FROM passage WHERE vector IS NOT NULL").fetchall()
        if rows:
            vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f2").reshape(len(rows), -1)
            self.matrix.add([id for id, _ in rows], vectors.astype(np.float32))

    # ---- search -----------------------------------------------------------------------------------------------------

    def by_words(self, query: str, chosen: Filter, limit: int) -> list[int]:
        """Ids of the passages that fit a query's words best by BM25 (Robertson and Zaragoza, 2009)."""
        match = match_of(query, self._expand(query))
        if not match:
            return []
        condition, values = chosen.sql
        weights = ", ".join(map(str, BM25_WEIGHTS))
        rows = self._connection.execute(
            f"SELECT passage.id FROM word JOIN passage ON passage.id = word.rowid JOIN source ON source.id = source_id "  # noqa: S608
            f"WHERE word MATCH ? AND {condition} ORDER BY bm25(word, {weights}), passage.id LIMIT ?",
            (match, *values, limit),
        )
        return [int(id) for (id,) in rows]

    def by_vector(self, vector: NDArray[np.float32], chosen: Filter, limit: int) -> list[int]:
        """Ids of the passages that lie nearest to a query's vector."""
        allowed: set[int] | None = None
        if chosen != Filter():
            condition, values = chosen.sql
            rows = self._connection.execute(
                f"SELECT passage.id FROM passage JOIN source ON source.id = source_id WHERE {condition}",  # noqa: S608
                values,
            )
            allowed = {int(id) for (id,) in rows}
        return self.matrix.nearest(vector, limit, allowed)

    def passages(self, scored: Sequence[tuple[int, float]]) -> list[Passage]:
        """The passages of (id, score), in that order."""
        found = []
        for id, score in scored:
            row = self._connection.execute(
                "SELECT key, name, title, page, line, kind, assets, text FROM passage "
                "JOIN source ON source.id = source_id WHERE passage.id = ?",
                (id,),
            ).fetchone()
            if row is not None:
                key, name, title, page, line, kind, assets, text = row
                found.append(
                    Passage(
                        id=key, source=name, title=title, page=page, line=line, kind=kind,
                        assets=tuple(json.loads(assets)), text=text, score=score,
                    )
                )  # fmt: skip
        return found


class _Writing:
    """One transaction, whole or not at all. Raises StoreError for what SQLite raises."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        failed = error
        if error is None:
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error as raised:
                failed = raised
        if failed is not None and self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        if isinstance(failed, sqlite3.Error):
            raise StoreError(
                f"the knowledge base '{self._path}' cannot be written: {failed}", hint="check the disk's free space"
            ) from failed


def spaced(text: str) -> str:
    """Each Chinese character a word of its own."""
    return CJK.sub(r" \1 ", text)


def match_of(*queries: str) -> str:
    """A query of FTS5 from people's words: any of them may fit; `6309-2RS` and Chinese runs count as phrases."""
    terms: dict[str, None] = {}
    for query in queries:
        for term in _terms(query):
            if len(terms) < QUERY_WORDS_CAP:
                terms[term] = None
    return " OR ".join(f'"{term}"' for term in terms)


def _terms(query: str) -> Iterator[str]:
    for run in re.findall(r"[\u3400-\u9fff]+", query):
        yield from (spaced(run[at : at + 2]).strip() for at in range(max(1, len(run) - 1)))
    for word in re.findall(r"[^\s\"\u3400-\u9fff]+", query):
        parts = re.findall(r"\w+", word)
        yield from parts
        if len(parts) > 1:
            yield " ".join(parts)
