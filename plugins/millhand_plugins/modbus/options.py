"""What the owner says about a Modbus device: `[assets.options]` of `adapter = "modbus"`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from millhand.records import AssetState
from millhand.validation import StrictTable

Kind = Literal["input", "holding", "coil", "discrete"]
Order = Literal["", "big", "little"]

# Type -> (registers, struct code)
NUMBERS = {
    "uint16": (1, "H"), "int16": (1, "h"), "uint32": (2, "I"), "int32": (2, "i"), "uint64": (4, "Q"),
    "int64": (4, "q"), "float32": (2, "f"), "float64": (4, "d"),
}  # fmt: skip
_STRING = re.compile(r"string\(([1-9][0-9]*)\)")
_ADDRESSES = 65_536


class Location(StrictTable):
    """Where a value lies and how it is written."""

    address: int = Field(ge=0, lt=_ADDRESSES)
    """Address on the wire, from 0: what a manual calls 30001 is input 0, what it calls 40108 is holding 107."""
    kind: Kind = "input"
    """The table of the device: input or holding registers, coil or discrete bits."""
    type: str = ""
    """bool, uint16, int16, uint32, int32, uint64, int64, float32, float64 or string(n) with n bytes; empty: uint16, or
    bool for coil, discrete and `bit`."""
    word_order: Order = ""
    """Which register of a longer value comes first, the high one (big) or the low one; empty: the adapter's."""
    byte_order: Order = ""
    """Which byte of a register comes first; empty: the adapter's."""

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value not in ("", "bool", *NUMBERS) and not _STRING.fullmatch(value):
            raise ValueError(f"must be one of bool, {', '.join(NUMBERS)}, string(n)")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Location:
        if self.bits and self.type not in ("", "bool"):
            raise ValueError(f"kind = '{self.kind}' holds single bits; type must be bool")
        if self.address + self.size > _ADDRESSES:
            raise ValueError(f"address {self.address} with {self.size} registers reaches beyond 65535")
        return self

    @property
    def bits(self) -> bool:
        """Whether its table holds single bits."""
        return self.kind in ("coil", "discrete")

    @property
    def form(self) -> str:
        """The type, with its default settled."""
        return self.type or ("bool" if self.bits else "uint16")

    @property
    def length(self) -> int:
        """Bytes of a string, 0 for every other type."""
        match = _STRING.fullmatch(self.form)
        return int(match[1]) if match else 0

    @property
    def size(self) -> int:
        """How many registers (or bits) it takes."""
        return (self.length + 1) // 2 if self.length else NUMBERS.get(self.form, (1, ""))[0]


class NumberLocation(Location):
    """A location that holds a plain number."""

    @model_validator(mode="after")
    def _is_number(self) -> NumberLocation:
        if self.form not in NUMBERS:
            raise ValueError(f"type must be a number, one of {', '.join(NUMBERS)}")
        return self


class Register(Location):
    name: str = Field(min_length=1)
    """The reading's name."""
    unit: str = "1"
    """UCUM-like unit of the scaled value."""
    scale: float = 1.0
    """value = raw * scale + offset."""
    offset: float = 0.0
    bit: int = Field(default=-1, ge=-1, le=15)
    """Take this bit of the register (0 is the lowest) as a bool; -1: the whole register."""
    low: float = float("-inf")
    """A value below is absurd: quality BAD."""
    high: float = float("inf")
    """A value above is absurd: quality BAD."""

    @property
    def form(self) -> str:
        return self.type or ("bool" if self.bits or self.bit >= 0 else "uint16")

    @model_validator(mode="after")
    def _bit_fits(self) -> Register:
        if self.bit >= 0 and (self.bits or self.form != "bool"):
            raise ValueError("bit picks a bool out of an input or holding register; remove it or set type = 'bool'")
        if self.form == "bool" and not self.bits and self.bit < 0:
            raise ValueError("type = 'bool' in a register needs 'bit' (0 to 15)")
        return self


class TimeRegister(NumberLocation):
    type: str = "uint32"
    unit: Literal["ms", "s"] = "ms"
    """What one count of the asset's clock stands for."""


class StateRegister(NumberLocation):
    map: dict[int, AssetState]
    """Number -> running, idle, setup or service; a number that is not listed means unknown."""


class WaveformBlock(StrictTable):
    name: str = Field(min_length=1)
    """The waveform's name."""
    address: int = Field(ge=0, lt=_ADDRESSES)
    """Address of the first sample."""
    count: int = Field(ge=2, le=_ADDRESSES)
    """Samples in a snapshot."""
    kind: Literal["input", "holding"] = "input"
    type: Literal["int16", "uint16", "int32", "uint32", "float32"] = "int16"
    word_order: Order = ""
    byte_order: Order = ""
    unit: str = "1"
    """UCUM-like unit of the scaled samples."""
    scale: float = 1.0
    """sample = raw * scale."""
    scale_register: NumberLocation | None = None
    """Where the device tells the scale; it wins over `scale`."""
    sample_rate_hz: float = Field(default=0.0, ge=0)
    sample_rate_register: NumberLocation | None = None
    """Where the device tells the sample rate in Hz."""
    counter_register: NumberLocation | None = None
    """A number that the device changes with each snapshot: only then a new one is read, and it must be the same before
    and after. Without it a snapshot is read every `every_ms`, and a torn one cannot be told."""
    time_register: TimeRegister | None = None
    """When the snapshot was taken, on the clock that the adapter's `time_register` shows."""
    every_ms: int = Field(default=1000, ge=10)
    """How often to look for a new snapshot."""

    @model_validator(mode="after")
    def _fits(self) -> WaveformBlock:
        if self.address + self.size > _ADDRESSES:
            raise ValueError(f"address {self.address} with {self.size} registers reaches beyond 65535")
        if (self.sample_rate_hz > 0) == (self.sample_rate_register is not None):
            raise ValueError("give exactly one of sample_rate_hz and sample_rate_register")
        return self

    @property
    def size(self) -> int:
        """How many registers the samples take."""
        return self.count * NUMBERS[self.type][0]


class ModbusOptions(StrictTable):
    host: str = Field(min_length=1)
    """Address of the device or its gateway."""
    port: int = Field(default=502, ge=1, le=65_535)
    unit_id: int = Field(default=1, ge=0, le=255)
    """The device behind the address; often 1, 255 or 0 where there is only one."""
    timeout_ms: int = Field(default=1000, ge=10)
    """How long to wait for a connection and for each answer."""
    retries: int = Field(default=1, ge=0, le=10)
    """How often an unanswered request is sent again."""
    poll_ms: int = Field(default=1000, ge=10)
    """How often the registers are read."""
    gap: int = Field(default=8, ge=0, le=124)
    """Registers are read together across a hole of so many unused ones."""
    max_count: int = Field(default=125, ge=1, le=125)
    """The most registers in one request; some devices take fewer than the protocol's 125."""
    word_order: Literal["big", "little"] = "big"
    """The device's usual word order."""
    byte_order: Literal["big", "little"] = "big"
    """The device's usual byte order; big is the protocol's."""
    registers: tuple[Register, ...] = ()
    """The readings."""
    waveforms: tuple[WaveformBlock, ...] = ()
    """The snapshots."""
    time_register: TimeRegister | None = None
    """The asset's own running clock; without it the time of receipt counts."""
    state_register: StateRegister | None = None
    """Where the device tells what the machine is doing."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModbusOptions:
        if not self.registers and not self.waveforms:
            raise ValueError("nothing to read; add [[assets.options.registers]] or [[assets.options.waveforms]]")
        names = [*(item.name for item in self.registers), *(item.name for item in self.waveforms)]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"two entries are called '{doubled}'; give each its own name")
        long = next((item for item in self.registers if item.size > self.max_count), None)
        if long is not None:
            raise ValueError(f"register '{long.name}' takes {long.size} registers, but max_count = {self.max_count}")
        timed = next((item for item in self.waveforms if item.time_register is not None), None)
        if timed is not None and self.time_register is None:
            raise ValueError(f"waveform '{timed.name}' has a time_register, so the adapter needs one too")
        return self
