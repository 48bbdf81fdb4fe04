"""The export: everything, in a file that any tool reads."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest

from millhand.errors import StoreError
from millhand.store.export import export


async def test_everything_is_in_the_file(kit, path, tmp_path, monkeypatch):
    monkeypatch.setattr("millhand.store.export.PAGE_ROWS", 4)
    target = tmp_path / "out.db"
    async with kit.opened(path) as store:
        for index in range(20):
            predictions = (kit.prediction(index), kit.prediction(index, model="faults"))
            alert = kit.alert(index, evidence={"rms": index})
            await store.commit(kit.step(index, predictions=predictions, alerts=(alert,), orders=(kit.order(index),)))
        counts = await export(store, target)
        assert counts == {"alerts": 20, "orders": 20, "rollups": 12, "predictions": 40, "readings": 240}
        with pytest.raises(StoreError, match="exists already"):
            await export(store, target)
        since, until = kit.START_NS + 5 * kit.SECOND_NS, kit.START_NS + 9 * kit.SECOND_NS
        part = await export(store, tmp_path / "part.db", since, until)
        assert (part["alerts"], part["predictions"], part["readings"]) == (5, 10, 60)
    with sqlite3.connect(target) as connection:
        values = connection.execute("SELECT value FROM readings WHERE name = 'm0' ORDER BY time_ns").fetchall()
        (evidence,) = connection.execute("SELECT evidence FROM alerts WHERE id = 'alert-7'").fetchone()
        rul = connection.execute("SELECT json_extract(\"values\", '$.rul') FROM predictions WHERE model = 'rul'")
        assert [value for (value,) in values] == sorted(value for (value,) in rul) == [float(n) for n in range(20)]
        assert json.loads(evidence) == {"rms": 7}
    connection.close()


async def test_a_target_that_cannot_be_written(kit, path, tmp_path):
    async with kit.opened(path) as store:
        with pytest.raises(StoreError, match="does not exist"):
            await export(store, tmp_path / "no" / "out.db")


def test_the_store_alone_does_not_load_sqlite_utils():
    code = "import sys, millhand.store; sys.exit('sqlite_utils' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
