"""The in-process rig: the cursor, the pace, and that it says the same as the Modbus path."""

from __future__ import annotations

import asyncio
import struct
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from millhand.errors import AdapterError, ConfigError
from millhand.records import AssetState, Batch, Quality
from millhand.validation import validate
from millhand_plugins.modbus.options import ModbusOptions
from millhand_plugins.modbus.values import Layout
from millhand_plugins.rig.adapter import RigKind, RigOptions
from millhand_plugins.rig.registers import CHANNELS, PROCESS
from millhand_plugins.rig.server import RigLog, RigServer
from millhand_plugins.rig.simulator import Simulator

FOLDER = Path(__file__).parents[1]


async def play(options: RigOptions, cursor: bytes | None = None, stop_after: int | None = None) -> list[Batch]:
    adapter = RigKind().create("skid", options)
    await adapter.open(cursor)
    found = []
    async for batch in adapter.batches():
        found.append(batch)
        if len(found) == stop_after:
            break
    await adapter.close()
    return found


def content(batch: Batch) -> tuple[object, ...]:
    """A batch without the times of its receipt."""
    readings = [(item.name, item.value, item.unit, item.quality, item.clock.source_ns) for item in batch.readings]
    waves = [(item.name, item.samples, item.quality, item.clock.source_ns) for item in batch.waveforms]
    return readings, waves, batch.state, batch.cursor


FULL = RigOptions(seed=21, fault="bearing_inner", speed="full")


async def test_a_resumed_life_goes_on_exactly():
    whole = [content(batch) for batch in await play(FULL)]
    position = 0
    pieces: list[tuple[object, ...]] = []
    cursor = None
    for length in (1, 7, 200, 331, None):
        part = await play(FULL, cursor, length)
        pieces += [content(batch) for batch in part]
        cursor, position = part[-1].cursor, position + len(part)
    assert pieces == whole
    assert position == 741
    assert await play(FULL, cursor) == []


async def test_sequence_counts_every_step():
    batches = await play(FULL)
    assert [batch.readings[0].value for batch in batches] == list(range(1, 742))
    assert {batch.state for batch in batches} == {AssetState.IDLE, AssetState.SETUP, AssetState.RUNNING}
    sources = [batch.readings[0].clock.source_ns for batch in batches]
    assert set(np.diff(sources)) == {50_000_000}


async def test_each_snapshot_comes_once_with_its_own_time():
    batches = [batch for batch in await play(FULL) if batch.waveforms]
    assert len(batches) == 75
    assert all(tuple(wave.name for wave in batch.waveforms) == tuple(CHANNELS) for batch in batches)
    times = [batch.waveforms[0].clock.source_ns for batch in batches]
    assert set(np.diff(times)) == {500_000_000}
    bad = [wave for batch in batches for wave in batch.waveforms if wave.quality is Quality.BAD]
    assert all(not wave.array.any() for wave in bad)
    assert all(np.isfinite(wave.array).all() for batch in batches for wave in batch.waveforms)


async def test_a_period_that_does_not_divide_the_snapshots_loses_none():
    batches = await play(FULL.model_copy(update={"period_ms": 70}))
    assert sum(bool(batch.waveforms) for batch in batches) == 74


async def test_a_cursor_of_another_life_is_refused():
    cursor = (await play(FULL, stop_after=3))[-1].cursor
    for options in (FULL.model_copy(update={"seed": 22}), FULL.model_copy(update={"fault": "none"})):
        with pytest.raises(AdapterError, match="not of the life seed") as caught:
            await play(options, cursor)
        assert not caught.value.retriable
    with pytest.raises(AdapterError):
        await play(FULL, b"\x00rubbish")


async def test_the_pace_follows_speed():
    begin = time.monotonic()
    assert len(await play(RigOptions(speed=10.0), stop_after=101)) == 101
    elapsed_s = time.monotonic() - begin
    assert 0.5 <= elapsed_s < 3


async def test_a_closed_adapter_can_be_opened_again_and_closed_twice():
    adapter = RigKind().create("skid", FULL)
    await adapter.close()
    with pytest.raises(AdapterError):
        await anext(aiter(adapter.batches()))
    await adapter.open(None)
    await asyncio.wait_for(anext(aiter(adapter.batches())), 5)
    await adapter.close()
    await adapter.close()


async def test_values_and_samples_are_those_of_the_modbus_path():
    """Every reading and sample, computed from the registers by the map that the Modbus adapter uses."""
    options = _modbus_map()
    simulator = Simulator(21, "bearing_inner")
    now_ms = 0
    server = RigServer(simulator, lambda: now_ms, RigLog(None, {}))

    def read(address: int, count: int) -> list[int]:
        answer = server.answer(1, struct.pack(">BHH", 4, address, count))
        assert answer[0] == 4
        return list(struct.unpack(f">{count}H", answer[2:]))

    for batch in (await play(FULL))[::37]:
        now_ms = int((batch.readings[0].clock.source_ns // 1_000_000) % 60_000)
        values = {reading.name: reading for reading in batch.readings}
        for register in options.registers:
            if register.name == "sequence":
                continue
            layout = Layout(register.form, word_order="big", byte_order="big")
            value = layout.value(read(register.address, register.size)) * register.scale
            if values[register.name].quality is Quality.BAD:
                assert value < register.low
            else:
                assert values[register.name].value == value
            assert values[register.name].unit == register.unit
        for waveform in batch.waveforms:
            block = next(item for item in options.waveforms if item.name == waveform.name)
            parts = [read(block.address + at, min(125, 4096 - at)) for at in range(0, 4096, 125)]
            layout = Layout(block.type, word_order="big", byte_order="big")
            scale = struct.unpack(">f", struct.pack(">2H", *read(106, 2)))[0]
            samples = layout.samples([word for part in parts for word in part], scale)
            if waveform.quality is Quality.GOOD:
                assert waveform.array == pytest.approx(samples, abs=1e-7)
                assert (waveform.unit, waveform.sample_rate_hz) == (block.unit, 10_240)


def _modbus_map() -> ModbusOptions:
    table = tomllib.loads((FOLDER / "modbus_map.toml").read_text())
    return validate(ModbusOptions, table["assets"]["options"], "modbus_map.toml")


def test_the_modbus_map_names_every_process_value():
    options = _modbus_map()
    by_name = {register.name: register for register in options.registers}
    assert list(by_name) == ["sequence", *(field.name for field in PROCESS)]
    for field in PROCESS:
        register = by_name[field.name]
        assert (register.address, register.form, register.scale, register.unit) == (
            field.address, field.type, field.scale, field.unit,
        )  # fmt: skip
    assert {block.name: block.address for block in options.waveforms} == CHANNELS


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sped": 2}, "did you mean 'speed'"),
        ({"speed": 0.0}, "'full' or a factor above 0"),
        ({"seed": -1}, "seed"),
        ({"fault": "bearing"}, "fault"),
        ({"period_ms": 5}, "period_ms"),
        ({"start": "2026-01-01T00:00:00"}, "start"),
    ],
)
def test_wrong_options_are_named(table, message):
    with pytest.raises(ConfigError, match=message):
        validate(RigOptions, table, "config")


def test_sample_and_readme_hold_every_key_with_its_default():
    sample = (FOLDER / "sample.toml").read_text()
    bare = "\n".join(line.removeprefix("# ") if " = " in line else line for line in sample.splitlines())
    table = tomllib.loads(bare)["assets"][0]["options"]
    assert set(table) == set(RigOptions.model_fields)
    assert validate(RigOptions, table, "sample.toml") == RigOptions()
    readme = (FOLDER / "README.md").read_text()
    assert all(f"| `{key}` |" in readme for key in RigOptions.model_fields)
