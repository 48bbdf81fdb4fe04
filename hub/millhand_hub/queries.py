"""What `millhand hub nodes|alerts|orders` and the demo ask of the hub's database; read-only, beside a running hub."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millhand.errors import StoreError

if TYPE_CHECKING:
    from sqlite_utils import Database


@contextmanager
def opened(path: Path) -> Iterator[Database]:
    """Open the hub's database for reading. Raises StoreError where there is none."""
    from sqlite_utils import Database

    if not path.exists():
        raise StoreError(f"there is no hub database at '{path}'", hint="give the hub's configuration with --hub-config")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        yield Database(connection, execute_plugins=False)
    finally:
        connection.close()


def nodes(database: Database) -> list[dict[str, Any]]:
    """Every node, with what the hub holds of it."""
    # The recursion hops from asset to asset in the index; count(DISTINCT asset) would read every reading.
    sql = """
        SELECT n."group", n.node, n.online, n.version, n.born_ms, n.seen_ms,
          (WITH RECURSIVE hop (asset) AS (
             SELECT min(asset) FROM readings WHERE node_id = n.id
             UNION ALL
             SELECT (SELECT min(asset) FROM readings WHERE node_id = n.id AND asset > hop.asset) FROM hop
             WHERE hop.asset IS NOT NULL
           ) SELECT count(asset) FROM hop) AS assets,
          (SELECT coalesce(sum(held - first + 1), 0) FROM streams s WHERE s.node_id = n.id) AS rows,
          (SELECT count(*) FROM alerts a WHERE a.node_id = n.id AND a.state = 'open') AS open_alerts,
          (SELECT coalesce(sum(last - first + 1), 0) FROM gaps g WHERE g.node_id = n.id) AS rows_dropped
        FROM nodes n ORDER BY n."group", n.node
    """
    return [{**row, "online": bool(row["online"])} for row in database.query(sql)]


def alerts(database: Database, state: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """Newest first, each with its node."""
    where = "WHERE a.state = :state" if state else ""
    sql = f"""
        SELECT n."group", n.node, a.record FROM alerts a JOIN nodes n ON n.id = a.node_id {where}
        ORDER BY a.raised_ns DESC LIMIT :limit
    """  # noqa: S608 - `where` is one of two constants
    found = database.query(sql, {"state": state, "limit": limit})
    return [{"group": row["group"], "node": row["node"], **json.loads(row["record"])} for row in found]


def orders(database: Database, limit: int = 50) -> list[dict[str, Any]]:
    """Newest first, each with its node."""
    sql = """
        SELECT n."group", n.node, o.record FROM orders o JOIN nodes n ON n.id = o.node_id
        ORDER BY o.created_ns DESC LIMIT :limit
    """
    found = database.query(sql, {"limit": limit})
    return [{"group": row["group"], "node": row["node"], **json.loads(row["record"])} for row in found]


def readings(database: Database, node: str, asset: str, name: str) -> list[tuple[int, Any]]:
    """(time_ms, value) of one reading, as they are stored: a row that was stored twice shows twice."""
    sql = """
        SELECT r.time_ms, r.value FROM readings r JOIN nodes n ON n.id = r.node_id
        WHERE n.node = :node AND r.asset = :asset AND r.name = :name ORDER BY r.time_ms, r.rowid
    """
    found = database.query(sql, {"node": node, "asset": asset, "name": name})
    return [(row["time_ms"], row["value"]) for row in found]


def rows_held(database: Database) -> int:
    """How many outbox rows of all nodes the hub holds without a hole."""
    row = next(database.query("SELECT coalesce(sum(held - first + 1), 0) AS rows FROM streams"))
    return int(row["rows"])
