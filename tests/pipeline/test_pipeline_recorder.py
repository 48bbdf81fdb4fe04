"""Rows that a node keeps of a model's inputs: a fair sample within bounds, whole on disk whatever happens."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millhand.errors import InputError
from millhand.pipeline.recorded import Recorded, recorded_path, source_of
from millhand.pipeline.recorder import Recorder
from millhand.pipeline.reservoir import Reservoir
from millhand.pipeline.settings import RecordingSettings
from millhand.testing import wait_until

MIB = 1 << 20


def offer(reservoir: Any, numbers: Any, shape: tuple[int, ...] = (2,), asset: str = "pump") -> None:
    for number in numbers:
        reservoir.offer({"input": np.full(shape, number, np.float32)}, int(number), asset)


def numbers(reservoir: Reservoir) -> list[int]:
    recorded = reservoir.sample().recorded()
    found = recorded.inputs["input"]
    assert (found[:, 0] == recorded.window_end_ns).all(), "a row came apart"
    return sorted(recorded.window_end_ns.tolist())


def through_a_file(reservoir: Reservoir, folder: Path, rows_cap: int = 20, model: str = "again") -> Reservoir:
    path = folder / "rows.npz"
    path.write_bytes(reservoir.sample().recorded().encode())
    fresh = Reservoir(model, rows_cap, MIB, reservoir.source)
    fresh.restore(Recorded.read(path))
    return fresh


def test_few_rows_are_all_kept() -> None:
    reservoir = Reservoir("m", 20, MIB, "s")
    offer(reservoir, range(20))
    assert numbers(reservoir) == list(range(20))
    assert reservoir.sample().recorded().facts() == {
        "rows": 20,
        "seen": 20,
        "bytes": 160,
        "since_ns": 0,
        "until_ns": 19,
        "assets": {"pump": 20},
        "inputs": {"input": [2]},
    }


@pytest.mark.parametrize("restarts", [0, 3])
def test_every_row_has_the_same_chance(tmp_path: Path, restarts: int) -> None:
    """400 samples of 20 out of 500: each fifth of the rows holds a fifth of what was kept, within five deviations."""
    kept: list[int] = []
    for model in range(400):
        reservoir = Reservoir(f"model {model}", 20, MIB, "s")
        for part in np.array_split(np.arange(500), restarts + 1):
            offer(reservoir, part)
            if restarts:
                reservoir = through_a_file(reservoir, tmp_path, model=f"model {model}")
        kept += numbers(reservoir)
    counts, _ = np.histogram(kept, bins=5, range=(0, 500))
    expected = 400 * 20 / 5
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.8), counts


def test_the_same_rows_give_the_same_sample() -> None:
    one, two, other = (Reservoir(name, 20, MIB, "s") for name in ("m", "m", "n"))
    for reservoir in (one, two, other):
        offer(reservoir, range(1000))
    assert numbers(one) == numbers(two) != numbers(other)


def test_the_tensors_are_copied() -> None:
    reservoir, tensor = Reservoir("m", 20, MIB, "s"), np.zeros(2, np.float32)
    reservoir.offer({"input": tensor}, 0, "pump")
    tensor[:] = 9
    assert numbers(reservoir) == [0]


def test_bytes_are_bounded() -> None:
    reservoir = Reservoir("m", 512, 100, "s")
    offer(reservoir, range(1000))
    assert len(numbers(reservoir)) == 100 // 8
    none = Reservoir("m", 512, 7, "s")
    offer(none, range(1000))
    assert none.sample().recorded().rows == 0 and none.changes == 0


def test_less_room_after_a_restart_keeps_a_part(tmp_path: Path) -> None:
    reservoir = Reservoir("m", 20, MIB, "s")
    offer(reservoir, range(1000))
    smaller = through_a_file(reservoir, tmp_path, rows_cap=5)
    assert set(numbers(smaller)) < set(numbers(reservoir)) and len(numbers(smaller)) == 5
    assert smaller.seen == 1000
    larger = through_a_file(reservoir, tmp_path, rows_cap=30)
    offer(larger, range(1000, 1010))
    assert numbers(larger) == [*numbers(reservoir), *range(1000, 1010)]


def test_the_commonest_shape_is_kept() -> None:
    reservoir = Reservoir("m", 20, MIB, "s")
    offer(reservoir, range(3), (1,))
    offer(reservoir, range(10, 15), (2,))
    assert numbers(reservoir) == [12, 13, 14]
    for number in range(100):
        offer(reservoir, [100 + number], (2,) if number % 3 else (1,))
    assert reservoir.sample().recorded().inputs["input"].shape == (20, 2)
    offer(reservoir, range(200, 225), (3,))
    assert reservoir.sample().recorded().inputs["input"].shape[1:] == (3,)


def test_strings_are_not_kept() -> None:
    reservoir = Reservoir("m", 20, MIB, "s")
    reservoir.offer({"input": np.array(["a"], object)}, 0, "pump")
    assert reservoir.sample().recorded().rows == 0


def test_another_kind_of_rows_makes_way(kit, tmp_path: Path) -> None:
    reservoir = Reservoir("m", 20, MIB, source_of(kit.manifest()))
    offer(reservoir, range(5))
    assert numbers(through_a_file(reservoir, tmp_path)) == list(range(5))
    for changes in (
        {"inputs": [{"name": "input", "shape": [-1, 1, 3]}]},
        {"window": {"length": 3, "step": 1, "signals": ["x"]}},
        {"features": {"extractor": "raw", "options": {"length": 3}}},
    ):
        assert source_of(kit.manifest(**changes)) != reservoir.source
    assert source_of(kit.manifest(description="told anew", max_batch=3)) == reservoir.source
    other = Reservoir("m", 20, MIB, "other")
    other.restore(reservoir.sample().recorded())
    assert other.sample().recorded().rows == 0


def test_any_name_of_an_input_and_of_an_asset_comes_back(tmp_path: Path) -> None:
    reservoir = Reservoir("m", 20, MIB, "s")
    names = ["file", "allow_pickle", "../up", "größe 1"]
    reservoir.offer({**dict.fromkeys(names, np.ones(1, np.int64)), "b": np.ones((2, 0), np.float16)}, 1, "Presse-7")
    path = tmp_path / "rows.npz"
    path.write_bytes(reservoir.sample().recorded().encode())
    found = Recorded.read(path)
    assert list(found.inputs) == [*names, "b"]
    assert found.inputs["b"].shape == (1, 2, 0) and found.inputs["b"].dtype == np.float16
    assert list(found.assets) == ["Presse-7"]


@pytest.mark.parametrize("damage", [b"", b"PK", b"no zip at all", None])
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: bytes | None) -> None:
    reservoir = Reservoir("m", 20, MIB, "s")
    offer(reservoir, range(20))
    whole = reservoir.sample().recorded().encode()
    path = tmp_path / "rows.npz"
    path.write_bytes(
        whole[: len(whole) // 2] + b"\0" * 40 + whole[len(whole) // 2 + 40 :] if damage is None else damage
    )
    with pytest.raises(InputError, match=r"rows\.npz' cannot be read"):
        Recorded.read(path)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\nb"])
def test_only_models_have_a_file(name: str) -> None:
    with pytest.raises(InputError, match="no name of a model"):
        recorded_path(Path("/data"), name)


# ---- on disk --------------------------------------------------------------------------------------------------------


def recorder(folder: Path, **settings: Any) -> Recorder:
    return Recorder(folder, RecordingSettings(**{"rows": 20, **settings}))


async def recorded(folder: Path, kit: Any, ends: range, **settings: Any) -> Recorder:
    """A recorder that took these rows of the model `classifier`, and has stopped."""
    found = recorder(folder, **settings)
    found.start()
    await found.open(kit.manifest())
    for number in ends:
        found.offer("classifier", {"input": np.full((1, 2), number, np.float32)}, number, "pump")
    await found.stop()
    return found


async def test_what_was_recorded_outlives_the_process_and_stays_private(kit, tmp_path: Path) -> None:
    await recorded(tmp_path, kit, range(10))
    path = recorded_path(tmp_path, "classifier")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = await recorded(tmp_path, kit, range(10, 15))
    assert sorted(Recorded.read(path).window_end_ns) == list(range(15))
    facts = await again.facts("classifier")
    assert (facts["rows"], facts["seen"], facts["path"], facts["error"]) == (15, 15, str(path), "")


async def test_rows_of_an_unknown_model_and_with_recording_off_are_let_go(kit, tmp_path: Path) -> None:
    await recorded(tmp_path, kit, range(10), rows=0)
    found = recorder(tmp_path)
    found.offer("nobody", {"input": np.zeros(2, np.float32)}, 1, "pump")
    await found.stop()
    assert not recorded_path(tmp_path, "classifier").exists()
    assert (await found.facts("classifier"))["rows"] == 0


async def test_they_are_written_now_and_then(kit, tmp_path: Path) -> None:
    found = recorder(tmp_path, save_s=1)
    found.start()
    await found.open(kit.manifest())
    found.offer("classifier", {"input": np.zeros((1, 2), np.float32)}, 1, "pump")
    path = recorded_path(tmp_path, "classifier")
    await kit.until(path.exists, "the first file")
    written = path.stat().st_mtime_ns
    for number in range(19):
        found.offer("classifier", {"input": np.zeros((1, 2), np.float32)}, number, "pump")
    await kit.until(lambda: path.stat().st_mtime_ns > written, "the next file")
    await found.stop()
    assert Recorded.read(path).rows == 20


async def test_forgetting_deletes_and_begins_anew(kit, tmp_path: Path) -> None:
    await recorded(tmp_path, kit, range(10))
    found = recorder(tmp_path)
    await found.open(kit.manifest())
    assert (await found.facts("classifier"))["rows"] == 10
    await found.forget("classifier")
    assert (await found.facts("classifier"))["rows"] == 0 and not recorded_path(tmp_path, "classifier").exists()
    found.offer("classifier", {"input": np.zeros((1, 2), np.float32)}, 77, "pump")
    await found.stop()
    assert Recorded.read(recorded_path(tmp_path, "classifier")).window_end_ns.tolist() == [77]


async def test_a_changed_model_toml_begins_anew(kit, tmp_path: Path) -> None:
    found = recorder(tmp_path)
    await found.open(kit.manifest())
    found.offer("classifier", {"input": np.zeros((1, 2), np.float32)}, 1, "pump")
    changed = kit.manifest(inputs=[{"name": "input", "shape": [-1, 1, 3]}])
    await found.open(changed)
    await found.open(changed)
    found.offer("classifier", {"input": np.zeros((1, 3), np.float32)}, 2, "pump")
    await found.stop()
    assert Recorded.read(recorded_path(tmp_path, "classifier")).inputs["input"].shape == (1, 1, 3)


async def test_a_damaged_file_makes_way(kit, tmp_path: Path, caplog) -> None:
    path = recorded_path(tmp_path, "classifier")
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    (path.parent / ".classifier.npz-left").write_bytes(b"half")
    await recorded(tmp_path, kit, range(3))
    assert "begins anew" in caplog.text
    assert [one.name for one in path.parent.iterdir()] == ["classifier.npz"]
    assert Recorded.read(path).rows == 3


async def test_a_disk_that_takes_nothing_costs_no_row(kit, tmp_path: Path, caplog) -> None:
    (tmp_path / "recorded").write_text("in the way")
    found = await recorded(tmp_path, kit, range(3))
    await found.stop()
    assert caplog.text.count("cannot be written: File exists") == 1
    assert "File exists" in (await found.facts("classifier"))["error"]
    (tmp_path / "recorded").unlink()
    await found.stop()
    assert (await found.facts("classifier"))["error"] == ""
    assert Recorded.read(recorded_path(tmp_path, "classifier")).rows == 3


WRITER = """
import asyncio, sys, numpy
from pathlib import Path
from millhand.pipeline.recorder import _write
from millhand.pipeline.reservoir import Reservoir
number = 0
while True:
    number += 1
    reservoir = Reservoir("m", 20, 1 << 26, "s")
    for _ in range(20):
        reservoir.offer({"input": numpy.full(100_000, number, numpy.float32)}, number, "pump")
    _write(Path(sys.argv[1]), reservoir.sample())
"""


def test_kill_9_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, newest = tmp_path / "recorded" / "m.npz", 0
    for kill in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, os.fspath(path)])
        try:
            wait_until(path.exists, "the first file")
            before = path.stat().st_mtime_ns
            wait_until(lambda before=before: path.stat().st_mtime_ns > before, "another file", every_s=0.001)
            time.sleep(kill / 500)  # another moment of its work each time
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        found = Recorded.read(path)
        assert found.rows == 20 and (found.inputs["input"] == found.window_end_ns[:, None]).all()
        newest = max(newest, int(found.window_end_ns[0]))
    assert newest > 1
