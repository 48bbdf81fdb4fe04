"""The register map of the rig's Modbus server, shared by the server and the in-process adapter.

Unit 1, 16-bit registers, the high word first; the same map answers function 3 (holding) and 4 (input).

    0    uint32   sequence: the number of this answer, counted up whenever a read covers register 0
    2    uint32   the rig's clock, ms
    4..  process values, see PROCESS
    11   uint16   machine state: 0 idle, 1 running, 2 ramping up or down
    100  uint32   snapshot counter
    102  uint32   the rig's clock at the snapshot's last sample, ms
    104  float32  sample rate, Hz
    106  float32  scale, g per count; NaN: the transmitter could not take this snapshot
    108  uint16   samples in each channel
    109  uint16   channels
    200  int16    radial drive-end samples, oldest first
    5000 int16    axial samples

No register carries fault, health or time to failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from millhand.records import AssetState

SEQUENCE, CLOCK, STATE = 0, 2, 11
COUNTER, SNAPSHOT_TIME, SAMPLE_RATE, SCALE = 100, 102, 104, 106
PROCESS_LENGTH, HEAD_LENGTH = 12, 10
CHANNELS = {"vibration_de": 200, "vibration_axial": 5000}
"""Waveform name -> its first register."""

STATES = {0: AssetState.IDLE, 1: AssetState.RUNNING, 2: AssetState.SETUP}

OPEN_CIRCUIT = -32_768
"""What an int16 register holds while its sensor's wire is broken."""


@dataclass(frozen=True, slots=True)
class ProcessField:
    """A process value: reading = register * scale, in `unit`; `source` names the transmitter in `Measured`."""

    name: str
    address: int
    type: Literal["uint16", "int16"]
    scale: float
    unit: str
    source: str


PROCESS = (
    ProcessField("speed", 4, "uint16", 1.0, "rpm", "speed_rpm"),
    ProcessField("load", 5, "uint16", 0.1, "%", "load_percent"),
    ProcessField("current", 6, "uint16", 0.01, "A", "current_a"),
    ProcessField("bearing_temperature", 7, "int16", 0.1, "Cel", "bearing_cel"),
    ProcessField("ambient_temperature", 8, "int16", 0.1, "Cel", "ambient_cel"),
    ProcessField("flow", 9, "uint16", 0.1, "m3/h", "flow_m3_h"),
    ProcessField("pressure", 10, "uint16", 0.01, "bar", "pressure_bar"),
)


def encode(field: ProcessField, values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Register values of `values`, clipped to what the register can hold; NaN becomes OPEN_CIRCUIT."""
    low, high = (0, 65_535) if field.type == "uint16" else (-32_767, 32_767)
    counts = np.clip(np.rint(np.nan_to_num(values) / field.scale), low, high).astype(np.int64)
    return np.where(np.isnan(values), OPEN_CIRCUIT if field.type == "int16" else 0, counts)
