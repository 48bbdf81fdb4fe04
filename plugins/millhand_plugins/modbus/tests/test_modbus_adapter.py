import asyncio
import itertools
import logging
import struct
import time

import numpy as np
import pytest

from millhand.errors import AdapterError, ConfigError
from millhand.records import AssetState, Batch, Quality
from millhand.validation import validate
from millhand_plugins.modbus.adapter import ModbusAdapter
from millhand_plugins.modbus.client import ModbusReader
from millhand_plugins.modbus.options import ModbusOptions


def adapter(device, **options) -> ModbusAdapter:
    table = {"host": "127.0.0.1", "port": device.port, "poll_ms": 10, "timeout_ms": 250, "retries": 0, **options}
    return ModbusAdapter("pump-1", validate(ModbusOptions, table, "test"))


async def collect(reader: ModbusAdapter, count: int = 1) -> list[Batch]:
    """The first `count` batches."""
    try:
        async with asyncio.timeout(30):
            await reader.open(None)
            batches = []
            source = reader.batches()
            async for batch in source:
                batches.append(batch)
                if len(batches) == count:
                    break
            await source.aclose()
            return batches
    finally:
        await reader.close()


def values(batch: Batch) -> dict:
    return {reading.name: reading.value for reading in batch.readings}


async def test_every_type_and_order(device):
    device.put(0, 65_535, "H")
    device.put(1, -5, "h")
    device.put(2, 4_000_000_000, "I")
    device.put(4, -4, "i")
    device.put(6, 2**63 + 1, "Q")
    device.put(10, -(2**60), "q")
    device.put(14, 1.5, "f")
    device.put(16, 2.25, "d")
    device.words["input"] |= {20: 0x5678, 21: 0x1234}  # 0x12345678, low word first
    device.words["input"] |= {22: 0x3412, 23: 0x7856}  # the same, bytes swapped
    device.words["input"] |= {24: int.from_bytes(b"Pu", "big"), 25: int.from_bytes(b"mp", "big"), 26: 0}
    device.words["input"][27] = 0b1000
    device.words["coil"] = {3: 1, 4: 0}
    device.words["discrete"] = {9: 1}
    device.put(100, 7, table="holding")
    types = ["uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
    addresses = [0, 1, 2, 4, 6, 10, 14, 16]
    registers = [{"name": form, "address": at, "type": form} for form, at in zip(types, addresses, strict=True)] + [
        {"name": "low_first", "address": 20, "type": "uint32", "word_order": "little"},
        {"name": "swapped", "address": 22, "type": "uint32", "byte_order": "little"},
        {"name": "model", "address": 24, "type": "string(5)"},
        {"name": "bit3", "address": 27, "bit": 3},
        {"name": "bit2", "address": 27, "bit": 2},
        {"name": "coil3", "address": 3, "kind": "coil"},
        {"name": "coil4", "address": 4, "kind": "coil"},
        {"name": "input9", "address": 9, "kind": "discrete"},
        {"name": "setpoint", "address": 100, "kind": "holding", "scale": 0.5, "offset": -1, "unit": "Cel"},
    ]
    (batch,) = await collect(adapter(device, registers=registers))
    assert values(batch) == {
        "uint16": 65_535, "int16": -5, "uint32": 4_000_000_000, "int32": -4, "uint64": 2**63 + 1, "int64": -(2**60),
        "float32": 1.5, "float64": 2.25, "low_first": 0x12345678, "swapped": 0x12345678, "model": "Pump", "bit3": True,
        "bit2": False, "coil3": True, "coil4": False, "input9": True, "setpoint": 2.5,
    }  # fmt: skip
    assert isinstance(values(batch)["coil3"], bool)
    assert batch.cursor is None
    assert batch.readings[-1].unit == "Cel"
    clock = batch.readings[0].clock
    assert not clock.synced
    assert clock.source_ns == clock.receive_ns
    assert sorted(device.requests) == [(1, 3, 2), (2, 9, 1), (3, 100, 1), (4, 0, 28)]


async def test_orders_of_the_device_hold_for_every_register(device):
    device.words["input"] = {0: 0x7856, 1: 0x3412}
    registers = [{"name": "a", "address": 0, "type": "uint32"}]
    (batch,) = await collect(adapter(device, registers=registers, word_order="little", byte_order="little"))
    assert values(batch) == {"a": 0x12345678}


async def test_absurd_values_are_bad(device):
    device.put(0, float("nan"), "f")
    device.put(2, float("inf"), "f")
    device.put(4, -32_768, "h")
    device.put(5, 20, "h")
    reader = adapter(
        device,
        registers=[
            {"name": "nan", "address": 0, "type": "float32"},
            {"name": "inf", "address": 2, "type": "float32"},
            {"name": "open_wire", "address": 4, "type": "int16", "scale": 0.1, "low": -40.0, "high": 200.0},
            {"name": "good", "address": 5, "type": "int16"},
        ],
    )
    (batch,) = await collect(reader)
    assert [(reading.value, reading.quality) for reading in batch.readings] == [
        *[(None, Quality.BAD)] * 3,
        (20, Quality.GOOD),
    ]
    assert reader.counts["bad_values"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"registers": []}, "nothing to read"),
        ({"registers": [{"name": "a", "address": 0}] * 2}, "two entries are called 'a'"),
        ({"registers": [{"name": "a", "address": 70_000}]}, "address"),
        ({"registers": [{"name": "a", "address": 65_535, "type": "uint32"}]}, "beyond 65535"),
        ({"registers": [{"name": "a", "address": 0, "type": "uint24"}]}, "must be one of bool, uint16"),
        ({"registers": [{"name": "a", "address": 0, "kind": "coil", "type": "int16"}]}, "single bits"),
        ({"registers": [{"name": "a", "address": 0, "type": "bool"}]}, "needs 'bit'"),
        ({"registers": [{"name": "a", "address": 0, "type": "int32", "bit": 1}]}, "bit picks a bool"),
        ({"registers": [{"name": "a", "address": 0, "type": "string(300)"}]}, "150 registers"),
        ({"registers": [{"name": "a", "address": 0, "kind": "inputs"}]}, "kind"),
        ({"registers": [{"name": "a", "adress": 0}]}, "did you mean 'address'"),
        ({"registers": [{"name": "a", "address": 0}], "port": 0}, "port"),
        ({"waveforms": [{"name": "v", "address": 0, "count": 10}]}, "exactly one of sample_rate_hz"),
        (
            {
                "waveforms": [
                    {"name": "v", "address": 0, "count": 9, "sample_rate_hz": 1.0, "time_register": {"address": 1}}
                ]
            },
            "the adapter needs one too",
        ),
        ({"state_register": {"address": 0, "type": "bool", "map": {}}, "registers": []}, "number"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        validate(ModbusOptions, {"host": "10.0.0.9", **options}, "test")


async def test_one_refused_address_costs_only_its_own_register(device, caplog):
    for address in range(10):
        device.put(address, address)
    del device.words["input"][6]
    registers = [{"name": f"r{address}", "address": address} for address in range(10)]
    reader = adapter(device, registers=registers)
    first, second = await collect(reader, 2)
    for batch in (first, second):
        assert [reading.name for reading in batch.readings if reading.quality == Quality.BAD] == ["r6"]
        assert sum(reading.value == int(reading.name[1:]) for reading in batch.readings) == 9
    assert reader.counts["refused"] >= 2
    assert "127.0.0.1" in caplog.text
    assert "unit 1: input 6: illegal data address (exception 2)" in caplog.text
    assert device.requests.count((4, 0, 10)) == 1, "the cut must stay"


async def test_a_refused_register_comes_back(device):
    device.put(0, 1)
    device.put(50, 2)
    device.refuse[("input", 50)] = 6
    reader = adapter(device, registers=[{"name": "a", "address": 0}, {"name": "b", "address": 50}])
    await reader.open(None)
    source = reader.batches()
    assert values(await anext(source)) == {"a": 1, "b": None}
    device.refuse.clear()
    async with asyncio.timeout(30):
        async for batch in source:
            if values(batch)["b"] == 2:
                break
    await source.aclose()
    await reader.close()


@pytest.mark.parametrize(
    ("code", "words", "remedy"),
    [
        (1, "illegal function", "kind"),
        (2, "illegal data address", "from 0"),
        (3, "illegal data value", "max_count"),
        (4, "device failure", "display"),
        (6, "device busy", "poll_ms"),
        (10, "gateway path unavailable", "unit_id"),
        (11, "gateway target failed to respond", "unit_id"),
        (77, "unknown exception", "manual"),
    ],
)
async def test_a_device_that_refuses_everything_is_an_error(device, code, words, remedy):
    device.put(4, 1)
    device.refuse[("input", 4)] = code
    with pytest.raises(AdapterError, match=words) as caught:
        await collect(adapter(device, registers=[{"name": "a", "address": 4}]))
    assert f"127.0.0.1:{device.port} unit 1: input 4" in caught.value.message
    assert remedy in caught.value.hint
    assert caught.value.retriable


async def test_one_silent_block_is_bad_and_two_are_an_error(device):
    for address in (0, 50, 100):
        device.put(address, address)
    registers = [{"name": f"r{address}", "address": address} for address in (0, 50, 100)]
    device.silent = {("input", 50)}
    reader = adapter(device, registers=registers)
    (batch,) = await collect(reader)
    assert values(batch) == {"r0": 0, "r50": None, "r100": 100}
    assert reader.counts == {"unanswered": 1}
    device.silent = {("input", 50), ("input", 100)}
    with pytest.raises(AdapterError, match="input 100: no answer within 250 ms, 1 times"):
        await collect(adapter(device, registers=registers))


async def test_a_late_answer_is_no_answer_to_the_next_request(device):
    device.words["coil"] = {0: 1}
    device.put(50, 2)
    held: list[bytes] = []

    def late(frame: bytes) -> bytes:
        if not held:
            held.append(frame)
            return b""
        return (held[0] if len(held) == 1 else b"") + frame

    device.mangle = late
    reader = adapter(
        device, registers=[{"name": "a", "address": 0, "kind": "coil"}, {"name": "b", "address": 50}], timeout_ms=100
    )
    (batch,) = await collect(reader)
    assert values(batch) == {"a": None, "b": 2}


@pytest.mark.parametrize(
    ("mangle", "words"),
    [
        (lambda frame: b"HTTP/1.1 400 Bad Request\r\n\r\n", "no Modbus TCP frame"),
        (lambda frame: bytes(range(200, 240)), "no Modbus TCP frame"),
        (lambda frame: frame[:6] + b"\x09" + frame[7:], "unit 9 answered instead"),
        (lambda frame: frame[:7] + b"\x03" + frame[8:], "garbled frame"),
        (lambda frame: frame[:8] + b"\xff" + frame[9:], "garbled frame"),
        (lambda frame: frame[:4] + b"\x00\x05" + frame[6:7] + b"\x04\x02\x00\x01", "holds 1 values instead of 4"),
        (lambda frame: None, "the connection is gone"),
        (lambda frame: frame[:7], "no answer within"),
        (lambda frame: b"", "no answer within"),
    ],
)
async def test_bad_answers_are_clear_errors_and_quick(device, mangle, words, caplog):
    device.put(0, 1, "Q")
    device.mangle = mangle
    reader = adapter(device, registers=[{"name": "a", "address": 0, "type": "uint64"}])
    start = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(AdapterError, match=words) as caught:
        await collect(reader)
    assert time.monotonic() - start < 3
    assert f"127.0.0.1:{device.port} unit 1" in caught.value.message
    assert caught.value.hint
    noise = [record for record in caplog.records if not record.name.startswith("millhand")]
    assert not [record for record in noise if record.levelno >= logging.WARNING]


async def test_refused_connection_names_the_reason(device):
    await device.stop()
    reader = adapter(device, registers=[{"name": "a", "address": 0}])
    with pytest.raises(AdapterError, match="cannot connect: Connection refused"):
        await collect(reader)
    await reader.close()


async def test_unknown_host_is_an_error():
    table = {"host": "no-such-host.invalid", "registers": [{"name": "a", "address": 0}]}
    with pytest.raises(AdapterError, match=r"modbus no-such-host.invalid:502 unit 1: cannot connect: ."):
        await collect(ModbusAdapter("a", validate(ModbusOptions, table, "test")))


async def test_a_lost_device_gives_bad_readings_then_an_error_and_comes_back(device):
    device.put(0, 5)
    reader = adapter(device, registers=[{"name": "a", "address": 0}])
    await reader.open(None)
    source = reader.batches()
    assert values(await anext(source)) == {"a": 5}
    last = None
    await device.stop()
    with pytest.raises(AdapterError, match="the connection is gone"):
        async for batch in source:
            last = batch
    assert last.readings[0].quality == Quality.BAD
    await reader.close()
    await device.start()
    (batch,) = await collect(reader)
    assert values(batch) == {"a": 5}


async def test_source_time_follows_the_assets_clock(device):
    device.put(0, 2**32 - 1500, "I")
    device.put(2, 7)
    device.put(3, 1)
    ticks = itertools.count()

    def tick(table: str, address: int) -> None:
        device.put(0, (2**32 - 1500 + 1000 * next(ticks)) % 2**32, "I")

    device.before = tick
    reader = adapter(
        device,
        registers=[{"name": "a", "address": 2}],
        time_register={"address": 0},
        state_register={"address": 3, "map": {"0": "idle", "1": "running"}},
    )
    batches = await collect(reader, 5)
    clocks = [batch.readings[0].clock for batch in batches]
    assert all(clock.synced for clock in clocks)
    steps = [after.source_ns - before.source_ns for before, after in itertools.pairwise(clocks)]
    assert steps == [10**9] * 4
    assert abs(clocks[0].source_ns - clocks[0].receive_ns) < 10**6
    assert {batch.state for batch in batches} == {AssetState.RUNNING}


async def test_an_unchanged_device_is_not_reported_again(device):
    device.put(0, 1000, "I")
    device.put(2, 7)
    reader = adapter(device, registers=[{"name": "a", "address": 2}], time_register={"address": 0})
    await reader.open(None)
    source = reader.batches()
    assert values(await anext(source)) == {"a": 7}
    polls = len(device.requests)
    pending = asyncio.ensure_future(anext(source))
    async with asyncio.timeout(30):
        while len(device.requests) < polls + 3:
            await asyncio.wait({pending}, timeout=0.01)
    assert not pending.done()
    device.put(2, 8)
    assert values(await asyncio.wait_for(pending, 30)) == {"a": 8}
    assert reader.counts["repeated"] >= 3
    await source.aclose()
    await reader.close()


WAVEFORM = {
    "name": "vibration",
    "address": 200,
    "count": 512,
    "unit": "m/s2",
    "counter_register": {"address": 100, "type": "uint32"},
    "time_register": {"address": 102},
    "sample_rate_register": {"address": 104, "type": "float32"},
    "scale_register": {"address": 106, "type": "float32"},
    "every_ms": 10,
}


def put_snapshot(device, counter: int, scale: float = 0.5) -> np.ndarray:
    samples = (np.arange(512) * (counter + 1)) % 3001 - 1500
    for index, sample in enumerate(samples):
        device.put(200 + index, int(sample), "h")
    device.put(100, counter, "I")
    device.put(102, 5000 + counter, "I")
    device.put(104, 12_800.0, "f")
    device.put(106, scale, "f")
    return samples * scale


async def until_waveform(source) -> Batch:
    async with asyncio.timeout(30):
        async for batch in source:
            if batch.waveforms:
                return batch
    raise AssertionError("the source ended")


async def test_a_snapshot_is_read_once_per_counter(device):
    expected = put_snapshot(device, 1)
    device.put(0, 6000, "I")
    device.put(2, 1)
    options = {"registers": [{"name": "a", "address": 2}], "time_register": {"address": 0}, "waveforms": [WAVEFORM]}
    reader = adapter(device, **options)
    await reader.open(None)
    source = reader.batches()
    anchor_ns = (await anext(source)).readings[0].clock.source_ns
    (waveform,) = (await until_waveform(source)).waveforms
    np.testing.assert_array_equal(waveform.array, expected.astype("f4"))
    assert (waveform.sample_rate_hz, waveform.unit, waveform.quality) == (12_800.0, "m/s2", Quality.GOOD)
    assert waveform.clock.source_ns == anchor_ns - 999 * 10**6
    assert waveform.clock.synced
    polls = len(device.requests)
    pending = asyncio.ensure_future(until_waveform(source))
    async with asyncio.timeout(30):
        while len(device.requests) < polls + 20:
            await asyncio.wait({pending}, timeout=0.01)
    assert not pending.done()
    expected = put_snapshot(device, 2)
    (waveform,) = (await asyncio.wait_for(pending, 30)).waveforms
    np.testing.assert_array_equal(waveform.array, expected.astype("f4"))
    await source.aclose()
    await reader.close()


async def test_a_torn_snapshot_is_read_again_and_counted(device):
    put_snapshot(device, 1)
    reads = itertools.count()

    def change_meanwhile(table: str, address: int) -> None:
        if address == 325 and next(reads) == 0:
            put_snapshot(device, 2)

    device.before = change_meanwhile
    reader = adapter(device, waveforms=[{**WAVEFORM, "time_register": None}])
    (batch,) = await collect(reader)
    np.testing.assert_array_equal(batch.waveforms[0].array, put_snapshot(device, 2).astype("f4"))
    assert reader.counts == {"torn": 1}


async def test_a_snapshot_that_never_holds_still_is_given_up_for_this_turn(device):
    counter = itertools.count(1)
    put_snapshot(device, 0)
    calm = asyncio.Event()

    def restless(table: str, address: int) -> None:
        if address == 325 and not calm.is_set():
            put_snapshot(device, next(counter))

    device.before = restless
    reader = adapter(device, waveforms=[{**WAVEFORM, "time_register": None}])
    await reader.open(None)
    source = reader.batches()
    pending = asyncio.ensure_future(anext(source))
    async with asyncio.timeout(30):
        while reader.counts.get("torn", 0) < 6:
            await asyncio.wait({pending}, timeout=0.01)
    assert not pending.done()
    calm.set()
    assert (await asyncio.wait_for(pending, 30)).waveforms
    await source.aclose()
    await reader.close()


async def test_a_missing_or_meaningless_snapshot_is_bad_and_spoils_no_register(device):
    put_snapshot(device, 1, scale=float("nan"))
    device.put(0, 3)
    second = {**WAVEFORM, "name": "gone", "address": 9000, "time_register": None, "scale_register": None}
    options = {"registers": [{"name": "a", "address": 0}], "waveforms": [{**WAVEFORM, "time_register": None}, second]}
    reader = adapter(device, **options)
    await reader.open(None)
    source = reader.batches()
    seen = []
    async with asyncio.timeout(30):
        async for batch in source:
            seen += batch.waveforms
            assert not batch.readings or values(batch) == {"a": 3}
            if len(seen) >= 10:
                break
    assert {waveform.quality for waveform in seen} == {Quality.BAD}
    names = [waveform.name for waveform in seen]
    assert names.count("vibration") == 1, "a snapshot without a scale is passed over once and for all"
    assert names.count("gone") == len(names) - 1, "one that cannot be read is tried again"
    assert len(seen[0].array) == 0
    expected = put_snapshot(device, 2)
    (waveform,) = (await until_waveform(source)).waveforms
    while waveform.quality == Quality.BAD:
        (waveform,) = (await until_waveform(source)).waveforms
    np.testing.assert_array_equal(waveform.array, expected.astype("f4"))
    await source.aclose()
    await reader.close()


async def test_registers_keep_their_pace_while_a_slow_snapshot_is_read(device):
    put_snapshot(device, 1)
    device.put(0, 3)
    block = {**WAVEFORM, "time_register": None, "count": 512}
    reader = adapter(device, registers=[{"name": "a", "address": 0}], waveforms=[block], poll_ms=10, max_count=4)
    batches = await collect(reader, 12)
    assert sum(bool(batch.readings) for batch in batches) >= 5
    longest = max(len(list(group)) for key, group in itertools.groupby(device.requests, lambda item: item[1] >= 200))
    assert longest < 130, "polls come between the parts of a snapshot"


async def test_snapshots_come_although_the_polls_take_longer_than_their_period(device):
    expected = put_snapshot(device, 1)
    registers = [{"name": f"r{at}", "address": at, "kind": "holding"} for at in range(0, 40, 2)]
    device.words["holding"] = dict.fromkeys(range(40), 1)
    device.before = lambda table, address: time.sleep(0.001)  # a slow device: 20 requests take 20 ms
    waveform = {**WAVEFORM, "time_register": None}
    reader = adapter(device, registers=registers, waveforms=[waveform], poll_ms=10, gap=0, max_count=16)
    await reader.open(None)
    source = reader.batches()
    (found,) = (await until_waveform(source)).waveforms
    np.testing.assert_array_equal(found.array, expected.astype("f4"))
    await source.aclose()
    await reader.close()


async def test_only_read_functions_cross_the_wire(device):
    """Everything that the adapter can be told to do, through a proxy that records each byte to the device."""
    put_snapshot(device, 1)
    device.put(0, 1, "I")
    for table in ("coil", "discrete", "holding"):
        device.words[table] = dict.fromkeys(range(8), 1)
    device.refuse[("holding", 5)] = 2
    sent = bytearray()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", device.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, record: bool) -> None:
            while data := await source.read(4096):
                if record:
                    sent.extend(data)
                sink.write(data)
            sink.close()

        await asyncio.gather(
            pump(reader, there_writer, True), pump(there_reader, writer, False), return_exceptions=True
        )

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    kinds = ("coil", "discrete", "holding", "input")
    registers = [{"name": f"{kind}{at}", "address": at, "kind": kind} for kind in kinds for at in (0, 1)]
    registers.append({"name": "refused", "address": 5, "kind": "holding"})
    options = {"registers": registers, "time_register": {"address": 0}, "waveforms": [WAVEFORM]}
    reader = adapter(device, port=proxy.sockets[0].getsockname()[1], **options)
    await reader.open(None)
    source = reader.batches()
    await until_waveform(source)
    await source.aclose()
    await reader.close()
    proxy.close()
    functions = set()
    while sent:
        (length,) = struct.unpack(">H", sent[4:6])
        functions.add(sent[7])
        del sent[: 6 + length]
    assert functions == {1, 2, 3, 4}


async def test_the_client_has_no_way_to_write(device):
    device.words["holding"] = {0: 1}
    reader = ModbusReader("127.0.0.1", device.port, 1, 500, 0)
    public = {name for name in dir(reader) if not name.startswith("_")}
    assert public == {"coils", "discrete", "holding", "input", "connect", "close", "label"}
    await reader.connect()
    with pytest.raises(AdapterError, match="function 6 does not read and was not sent"):
        await reader._client.write_register(0, 99)
    assert await reader.holding(0, 1) == [1]
    assert {function for function, _, _ in device.requests} == {3}
    reader.close()
