"""Planning of requests, values, and the asset's clock, over inputs that no one wrote down."""

import csv
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millhand.validation import validate
from millhand_plugins.modbus.asset_clock import AssetClock
from millhand_plugins.modbus.blocks import plan
from millhand_plugins.modbus.options import NUMBERS, ModbusOptions, Register, TimeRegister
from millhand_plugins.modbus.values import Layout, layout_of

DATA = os.environ.get("MILLHAND_DATA", "")

REGISTERS = st.lists(
    st.builds(
        dict,
        address=st.integers(0, 600),
        kind=st.sampled_from(["input", "holding"]),
        type=st.sampled_from([*NUMBERS, "string(40)"]),
    ),
    min_size=1,
    max_size=40,
)


@given(registers=REGISTERS, gap=st.integers(0, 124), max_count=st.integers(20, 125))
def test_plans_cover_every_register_within_the_limits(registers, gap, max_count):
    locations = {f"r{index}": Register(name=f"r{index}", **item) for index, item in enumerate(registers)}
    blocks = plan(locations, gap, max_count)
    assert sorted(key for block in blocks for key in block.keys) == sorted(locations)
    for block in blocks:
        assert 1 <= block.count <= max_count
        covered = set()
        for key in block.keys:
            location = locations[key]
            assert location.kind == block.kind
            assert block.address <= location.address
            assert location.address + location.size <= block.address + block.count
            covered |= set(range(location.address, location.address + location.size))
        holes = [place for place in range(block.address, block.address + block.count) if place not in covered]
        runs = np.split(holes, np.where(np.diff(holes) != 1)[0] + 1) if holes else []
        assert all(len(run) <= gap for run in runs)


@given(
    form=st.sampled_from(list(NUMBERS)),
    raw=st.binary(min_size=8, max_size=8),
    words_swapped=st.booleans(),
    bytes_swapped=st.booleans(),
)
def test_values_in_any_order(form, raw, words_swapped, bytes_swapped):
    size, code = NUMBERS[form]
    (expected,) = struct.unpack(f">{code}", raw[: size * 2])
    pairs = [raw[place : place + 2] for place in range(0, size * 2, 2)]
    if words_swapped:
        pairs.reverse()
    words = [int.from_bytes(pair, "little" if bytes_swapped else "big") for pair in pairs]
    layout = Layout(
        form,
        word_order="little" if words_swapped else "big",
        byte_order="little" if bytes_swapped else "big",
    )
    value = layout.value(words)
    assert value == expected or (value != value and expected != expected)
    if code in "hHiIf":
        with np.errstate(over="ignore", invalid="ignore"):
            samples = layout.samples(words * 3, 0.5)
            np.testing.assert_array_equal(samples, np.full(3, np.float64(expected) * 0.5).astype("f4"))


@pytest.mark.parametrize(
    ("location", "orders", "words", "expected"),
    [
        ({"type": "string(6)"}, ("big", "big"), [0x4142, 0x4300, 0x5858], "ABC"),
        ({"type": "string(4)"}, ("little", "little"), [0x4241, 0x2043], "ABC"),
        ({"type": "string(3)"}, ("big", "big"), [0x4142, 0x4344], "ABC"),
        ({"bit": 15}, ("big", "big"), [0x8000], True),
        ({"bit": 0}, ("big", "little"), [0x0100], True),
        ({"kind": "coil"}, ("big", "big"), [1], True),
    ],
)
def test_strings_and_bits(location, orders, words, expected):
    assert layout_of(Register(name="a", address=0, **location), *orders).value(words) == expected


def clock(**options) -> AssetClock:
    return AssetClock(TimeRegister(address=0, **options))


@given(start=st.integers(0, 2**32 - 1), steps=st.lists(st.integers(0, 60_000), max_size=30))
def test_the_clock_goes_on_evenly_over_wraps(start, steps):
    asset = clock()
    wall_ns, monotonic_ns = 1_700_000_000 * 10**9, 5 * 10**9
    first_ns = asset.observe(start, wall_ns, monotonic_ns)
    assert first_ns == wall_ns
    total_ms = 0
    for step_ms in steps:
        total_ms += step_ms
        seen_ns = asset.observe((start + total_ms) % 2**32, 0, monotonic_ns + total_ms * 10**6)
        assert seen_ns == first_ns + total_ms * 10**6
    assert asset.restarts == 0


def test_a_restart_anchors_anew():
    asset = clock()
    asset.observe(3_900_000_000, 10**18, 10**12)
    assert asset.observe(500, 10**18 + 10**9, 10**12 + 10**9) == 10**18 + 10**9
    assert asset.restarts == 1
    assert asset.observe(1500, 0, 10**12 + 2 * 10**9) == 10**18 + 2 * 10**9


def test_a_restart_during_a_long_silence_is_seen():
    asset = clock(unit="s")
    asset.observe(100, 10**18, 0)
    hour_ns = 3600 * 10**9
    assert asset.observe(150, 10**18 + hour_ns, hour_ns) == 10**18 + hour_ns
    assert asset.restarts == 1


def test_an_earlier_count_is_placed_before_the_present_one():
    asset = clock()
    asset.observe(200, 10**18, 0)
    assert asset.at(150) == 10**18 - 50 * 10**6
    assert asset.at(2**32 - 100) == 10**18 - 300 * 10**6


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MILLHAND_DATA names no folder of data sets")
@pytest.mark.parametrize(
    "path", sorted(Path(DATA or ".").glob("protocols/modbus/telegraf_*.csv")), ids=lambda path: path.stem
)
def test_public_register_lists_fit_the_table(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    registers = [
        {
            "name": f"{row['measurement']}/{row['name']}/{row['address']}",
            "address": int(row["address"]),
            "kind": row["register"],
            "type": row["type"].lower(),
            "scale": float(row["scale"] or 1),
            "byte_order": {"A": "big"}[row["byte_order"][0]],
        }
        for row in rows
    ]
    options = validate(ModbusOptions, {"host": "10.0.0.9", "registers": registers}, "test")
    locations = {register.name: register for register in options.registers}
    blocks = plan(locations, options.gap, options.max_count)
    assert sum(len(block.keys) for block in blocks) == len(rows)
    widths = {"UINT16": 1, "INT16": 1, "UINT32": 2, "INT32": 2}
    assert [register.size for register in options.registers] == [widths[row["type"]] for row in rows]
    assert len(blocks) <= len(rows) / 3 or len(rows) < 10
