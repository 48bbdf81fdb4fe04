"""The adapter against servers that it shares no code with: pymodbus's own, and the rig's."""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from millhand.records import Quality
from millhand.validation import read_toml, validate
from millhand_plugins.modbus.adapter import ModbusAdapter
from millhand_plugins.modbus.options import ModbusOptions


async def test_pymodbus_server():
    blocks = [
        SimData(0, values=3_000_000_000, datatype=DataType.UINT32),
        SimData(2, values=-12.5, datatype=DataType.FLOAT32),
        SimData(4, values=-7, datatype=DataType.INT16),
        SimData(5, values="PUMP", datatype=DataType.STRING),
    ]
    server = ModbusTcpServer(SimDevice(7, simdata=blocks), address=("127.0.0.1", 0))
    await server.serve_forever(background=True)
    try:
        port = server.transport.sockets[0].getsockname()[1]
        registers = [
            {"name": "count", "address": 0, "type": "uint32", "kind": "holding"},
            {"name": "level", "address": 2, "type": "float32"},
            {"name": "temperature", "address": 4, "type": "int16"},
            {"name": "tag", "address": 5, "type": "string(4)"},
        ]
        table = {"host": "127.0.0.1", "port": port, "unit_id": 7, "registers": registers}
        reader = ModbusAdapter("tank-1", validate(ModbusOptions, table, "test"))
        await reader.open(None)
        source = reader.batches()
        batch = await anext(source)
        assert {reading.name: reading.value for reading in batch.readings} == {
            "count": 3_000_000_000,
            "level": -12.5,
            "temperature": -7,
            "tag": "PUMP",
        }
        assert {reading.quality for reading in batch.readings} == {Quality.GOOD}
        await source.aclose()
        await reader.close()
    finally:
        await server.shutdown()


RIG_MAP = Path(__file__).parents[2] / "rig" / "modbus_map.toml"


async def test_rig(tmp_path: Path):
    """Every answer that the rig's own log counts arrives once, and both channels come whole."""
    arguments = ["-m", "millhand_plugins.rig", "--port", "0", "--seed", "3", "--fault", "none"]
    log = tmp_path / "rig.jsonl"
    rig = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, "--log", str(log), stdout=asyncio.subprocess.PIPE
    )
    try:
        port = json.loads(await asyncio.wait_for(rig.stdout.readline(), 30))["port"]
        table = read_toml(RIG_MAP)["assets"]["options"] | {"port": port, "poll_ms": 20}
        reader = ModbusAdapter("rig", validate(ModbusOptions, table, "test"))
        await reader.open(None)
        batches, channels = [], {}
        source = reader.batches()
        async with asyncio.timeout(30):
            async for batch in source:
                batches.append(batch)
                channels |= {waveform.name: waveform for waveform in batch.waveforms}
                if len(channels) == 2 and len(batches) >= 50:
                    break
        await source.aclose()
        await reader.close()
    finally:
        rig.terminate()
        await rig.wait()
        rig._transport.close()
    arrived = [reading.value for batch in batches for reading in batch.readings if reading.name == "sequence"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert arrived == [line["sequence"] for line in lines if line["kind"] == "served"]
    for waveform in channels.values():
        assert waveform.array.shape == (4096,)
        assert waveform.quality == Quality.GOOD
        assert 0 < np.abs(waveform.array).max() < 100
    times = [batch.readings[0].clock.source_ns for batch in batches if batch.readings]
    assert times == sorted(times)
    assert all(batch.state is not None for batch in batches)
