"""What is stored, what is acknowledged, and what a failed commit leaves behind."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from millhand.errors import StoreError
from millhand_hub import queries
from millhand_hub.database import Database
from millhand_hub.edge import Birth, Death


def rows(tmp_path, sql):
    with closing(sqlite3.connect(tmp_path / "hub.db")) as connection:
        return connection.execute(sql).fetchall()


def test_each_row_is_stored_once(kit, database, tmp_path):
    pair = kit.Pair()
    (ack,) = database.commit([*pair.birth(), *pair.say(kit.bulk(1, 1.5, True, "on", None), kit.bulk(2, 2.5))])
    assert (ack.group, ack.node, ack.epoch, ack.upto) == ("plant", "node-1", kit.EPOCH, {"alert": 0, "bulk": 2})
    (ack,) = database.commit(pair.say(kit.bulk(1, 1.5, True, "on", None), kit.bulk(2, 2.5), kit.bulk(3, 3.5)))
    assert ack.upto["bulk"] == 3 and database.duplicates == 2
    assert rows(tmp_path, "SELECT seq, name, value, unit, quality FROM readings ORDER BY rowid") == [
        (1, "m0", 1.5, "mm/s", 192),
        (1, "m1", 1, "mm/s", 192),
        (1, "m2", "on", "mm/s", 192),
        (1, "m3", None, "mm/s", 192),
        (2, "m0", 2.5, "mm/s", 192),
        (3, "m0", 3.5, "mm/s", 192),
    ]


def test_only_what_is_whole_is_acknowledged(kit, database, tmp_path):
    pair = kit.Pair()
    (ack,) = database.commit([*pair.birth(), *pair.say(kit.bulk(1, 1), kit.bulk(3, 3), kit.bulk(4, 4))])
    assert ack.upto["bulk"] == 1
    database.close()
    again = Database(tmp_path / "hub.db")
    (ack,) = again.commit(pair.say(kit.bulk(3, 3), kit.gap("bulk", 2, 2)))
    assert ack.upto["bulk"] == 4 and again.duplicates == 1
    again.close()
    assert rows(tmp_path, "SELECT stream, first, last, reason FROM gaps") == [("bulk", 2, 2, "byte cap")]
    assert rows(tmp_path, "SELECT count(*) FROM ahead") == [(0,)]


def test_the_base_is_of_its_own_epoch(kit, database):
    """A birth, a row, and the birth of another file in one page: each keeps its own count."""
    pair = kit.Pair()
    events = [*pair.birth("old"), *pair.say(kit.bulk(1, 1, epoch="old"))]
    events += [*pair.birth("new", bulk=70), *pair.say(kit.bulk(71, 2, epoch="new"))]
    acks = {ack.epoch: ack.upto["bulk"] for ack in database.commit(events)}
    assert acks == {"old": 1, "new": 71}


def test_predictions_of_one_millisecond_stay_apart(kit, database, tmp_path):
    pair = kit.Pair()
    predictions = (kit.prediction(1), kit.prediction(2), kit.prediction(3, "fault", "outer_race"))
    database.commit([*pair.birth(), *pair.say(kit.bulk(1, predictions=predictions))])
    found = rows(tmp_path, 'SELECT model, version, kind, "values" FROM predictions ORDER BY rowid')
    assert found == [
        ("rul", 4, "", '{"rul/h": 1.0}'),
        ("rul", 4, "", '{"rul/h": 2.0}'),
        ("fault", 4, "outer_race", '{"rul/h": 3.0}'),
    ]


def test_an_alert_is_as_it_was_changed_last(kit, database, tmp_path):
    """Rows that come again, or in another order, do not open a cleared alert."""
    pair = kit.Pair()
    database.commit([*pair.birth(), *pair.say(kit.alert(2, state="cleared"), kit.alert(1), kit.order(3))])
    assert rows(tmp_path, "SELECT id, state, severity FROM alerts") == [("alert-1", "cleared", "critical")]
    assert rows(tmp_path, "SELECT id, priority FROM orders") == [("order-1", 2)]


def test_an_order_is_its_newest_version(kit, database, tmp_path):
    """Versions that come again, or in another order, do not bring an old one back."""
    pair = kit.Pair()
    third = kit.order(3, revision=3, likely_cause="a dry bearing", priority=1)
    database.commit(pair.birth())
    database.commit(pair.say(kit.order(1), third, kit.order(2, revision=2), third))
    assert rows(tmp_path, "SELECT revision, priority FROM orders") == [(3, 1)]
    with queries.opened(tmp_path / "hub.db") as found:
        (order,) = queries.orders(found)
    assert (order["revision"], order["likely_cause"]) == (3, "a dry bearing")


def test_a_hub_of_before_keeps_its_orders(kit, tmp_path):
    """Its table has no revisions; an order of before gives way to any version."""
    with closing(sqlite3.connect(tmp_path / "hub.db", isolation_level=None)) as old:
        old.execute(
            "CREATE TABLE orders (id TEXT NOT NULL, node_id INTEGER NOT NULL, asset TEXT NOT NULL, priority INTEGER"
            " NOT NULL, created_ns INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (id, node_id)) WITHOUT ROWID"
        )
        old.execute("INSERT INTO orders VALUES ('order-1', 1, 'pump', 2, 1, '{}'), ('order-2', 1, 'pump', 3, 1, '{}')")
    for _ in range(2):
        database, pair = Database(tmp_path / "hub.db"), kit.Pair()
        database.commit([*pair.birth(), *pair.say(kit.order(1, revision=2))])
        database.close()
    assert rows(tmp_path, "SELECT id, priority, revision FROM orders") == [("order-1", 2, 2), ("order-2", 3, 0)]


def test_two_nodes_may_have_the_same_ids(kit, database, tmp_path):
    one, two = kit.Pair(node="a"), kit.Pair(node="b")
    database.commit([*one.birth(), *two.birth(), *one.say(kit.alert(1)), *two.say(kit.alert(1))])
    assert rows(tmp_path, "SELECT count(*) FROM alerts") == [(2,)]


def test_a_failed_commit_leaves_nothing_behind(kit, database, tmp_path):
    """Another process holds the file (like a full disk, SQLite refuses): nothing is acknowledged, all comes again."""
    pair = kit.Pair()
    database._connection.execute("PRAGMA busy_timeout = 50")
    events = [*pair.birth(), *pair.say(kit.bulk(1, 1), kit.alert(1))]
    with closing(sqlite3.connect(tmp_path / "hub.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="could not commit") as caught:
            database.commit(events)
        assert caught.value.retriable and caught.value.hint
    database._connection.execute("CREATE TRIGGER full BEFORE INSERT ON alerts BEGIN SELECT raise(FAIL, 'full'); END")
    with pytest.raises(StoreError, match="full"):
        database.commit(events)
    assert rows(tmp_path, "SELECT (SELECT count(*) FROM nodes), (SELECT count(*) FROM readings)") == [(0, 0)]
    database._connection.execute("DROP TRIGGER full")
    (ack,) = database.commit(events)
    assert ack.upto == {"alert": 1, "bulk": 1} and database.duplicates == 0


def test_births_and_deaths(kit, database, tmp_path):
    pair = kit.Pair()
    database.commit(pair.birth())
    assert rows(tmp_path, "SELECT online FROM nodes") == [(1,)]
    database.commit([Death("plant", "node-1")])
    assert rows(tmp_path, "SELECT online FROM nodes") == [(0,)]
    database.commit([Birth("plant", "node-1", "e", "9", 5, {})])
    assert rows(tmp_path, "SELECT online, version, born_ms FROM nodes") == [(1, "9", 5)]
    assert database.forget_online() == [("plant", "node-1")]
    assert rows(tmp_path, "SELECT online FROM nodes") == [(0,)]


def test_prune_keeps_what_is_young_and_alerts(kit, database, tmp_path, monkeypatch):
    monkeypatch.setattr("millhand_hub.database.PRUNE_ROWS", 7)
    pair = kit.Pair()
    old = [kit.bulk(seq, 1.0, 2.0, predictions=(kit.prediction(seq),)) for seq in range(1, 11)]
    database.commit([*pair.birth(), *pair.say(*old, kit.alert(1))])
    database._connection.execute("INSERT INTO readings SELECT node_id, asset, 'young', 9e15, value, unit, quality,"
                                 " historical, epoch, seq FROM readings LIMIT 3")  # fmt: skip
    assert database.prune(36_500)
    assert rows(tmp_path, "SELECT count(*) FROM readings") == [(23,)]
    passes = 1
    while not database.prune(30):
        passes += 1
    assert passes == 3
    assert rows(tmp_path, "SELECT name FROM readings") == [("young",)] * 3
    assert rows(tmp_path, "SELECT (SELECT count(*) FROM predictions), (SELECT count(*) FROM alerts)") == [(0, 1)]
    (ack,) = database.commit(pair.say(*old))
    assert ack.upto["bulk"] == 10 and rows(tmp_path, "SELECT count(*) FROM readings") == [(3,)], "stays deleted"


def test_a_database_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        Database(tmp_path / "file" / "hub.db")
    assert caught.value.hint
    (tmp_path / "hub.db").write_bytes(b"no database at all, and long enough to be read as one" * 30)
    with pytest.raises(StoreError, match="cannot be opened"):
        Database(tmp_path / "hub.db")


def test_queries(kit, database, tmp_path):
    one, two = kit.Pair(node="a"), kit.Pair(node="b")
    database.commit([*one.birth(), *two.birth(bulk=9), *one.say(kit.bulk(1, 5.0), kit.alert(1), kit.order(2))])
    database.commit(two.say(kit.bulk(10, 7.0), kit.bulk(11, 8.0), kit.gap("bulk", 12, 14), kit.alert(1, state="acked")))
    with queries.opened(tmp_path / "hub.db") as found:
        nodes = queries.nodes(found)
        assert [
            (n["node"], n["online"], n["assets"], n["rows"], n["open_alerts"], n["rows_dropped"]) for n in nodes
        ] == [
            ("a", True, 1, 3, 1, 0),
            ("b", True, 1, 6, 0, 3),
        ]
        assert all(n["seen_ms"] >= n["born_ms"] - 1 for n in nodes)
        assert [a["node"] for a in queries.alerts(found)] == ["a", "b"]
        assert [a["node"] for a in queries.alerts(found, "acked", 5)] == ["b"]
        assert queries.orders(found)[0]["likely_cause"] == "bearing"
        assert [value for _, value in queries.readings(found, "b", "pump", "m0")] == [7.0, 8.0]
        assert queries.rows_held(found) == 9
        with pytest.raises(sqlite3.OperationalError):
            found.execute("DELETE FROM nodes")


def test_a_second_hub_on_the_same_database_is_refused(tmp_path: Path) -> None:
    first = Database(tmp_path / "hub.db")
    with pytest.raises(StoreError, match="in use by another hub"):
        Database(tmp_path / "hub.db")
    first.close()
    Database(tmp_path / "hub.db").close()
