"""Many locations, few requests: neighbours are read together, and one bad address spoils no neighbour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millhand.errors import AdapterError
from millhand_plugins.modbus.client import SPLITTABLE, ModbusReader, NoAnswer, Refused
from millhand_plugins.modbus.options import Kind, Location, ModbusOptions
from millhand_plugins.modbus.values import Value, layout_of

_MAX_BITS = 2000  # Modbus Application Protocol V1.1b3, section 6.1


@dataclass(frozen=True, slots=True)
class Block:
    """One request. `keys` name the locations that it covers, in rising address."""

    kind: Kind
    address: int
    count: int
    keys: tuple[str, ...]


class BlockReader:
    """Reads a set of locations, each under a key.

    A block that the device refuses as too long or as holding an unknown address is cut in halves until the bad
    location stands alone; the cut stays. So a refused location is tried again in each round, and costs itself only.
    """

    def __init__(self, reader: ModbusReader, locations: Mapping[str, Location], options: ModbusOptions) -> None:
        self._reader = reader
        self._locations = locations
        self._layouts = {
            key: layout_of(location, options.word_order, options.byte_order) for key, location in locations.items()
        }
        self.blocks = plan(locations, options.gap, options.max_count)

    async def read(self) -> dict[str, Value | AdapterError]:
        """One round: key -> value, or the error that kept it away.

        Raises AdapterError if nothing could be read, two blocks in a row got no answer, or the connection is gone.
        """
        found: dict[str, Value | AdapterError] = {}
        waiting, done = list(reversed(self.blocks)), []
        unanswered = 0
        while waiting:
            block = waiting.pop()
            try:
                words = await read_words(self._reader, block.kind, block.address, block.count)
            except Refused as error:
                if error.exception in SPLITTABLE and len(block.keys) > 1:
                    waiting += reversed(self._halves(block))
                    continue
                found |= dict.fromkeys(block.keys, error)
                unanswered = 0
            except NoAnswer as error:
                found |= dict.fromkeys(block.keys, error)
                unanswered += 1
                if unanswered > 1:
                    raise
            else:
                found |= {key: self._value(key, block, words) for key in block.keys}
                unanswered = 0
            done.append(block)
        self.blocks = done
        errors = [value for value in found.values() if isinstance(value, AdapterError)]
        if errors and len(errors) == len(found):
            raise errors[0]
        return found

    def _value(self, key: str, block: Block, words: Sequence[int]) -> Value:
        location = self._locations[key]
        start = location.address - block.address
        return self._layouts[key].value(words[start : start + location.size])

    def _halves(self, block: Block) -> list[Block]:
        middle = len(block.keys) // 2
        return [_span(block.kind, keys, self._locations) for keys in (block.keys[:middle], block.keys[middle:])]


def plan(locations: Mapping[str, Location], gap: int, max_count: int) -> list[Block]:
    """Group `locations` into requests of at most `max_count` registers (2000 bits), across holes of up to `gap`."""
    blocks: list[Block] = []
    keys: list[str] = []
    for key in sorted(locations, key=lambda name: (locations[name].kind, locations[name].address)):
        if keys and not _joins(locations, keys, key, gap, max_count):
            blocks.append(_span(locations[keys[0]].kind, tuple(keys), locations))
            keys = []
        keys.append(key)
    if keys:
        blocks.append(_span(locations[keys[0]].kind, tuple(keys), locations))
    return blocks


async def read_words(reader: ModbusReader, kind: Kind, address: int, count: int) -> Sequence[int]:
    """Read `count` registers or bits of one table. Raises as ModbusReader does."""
    if kind == "coil":
        return await reader.coils(address, count)
    if kind == "discrete":
        return await reader.discrete(address, count)
    if kind == "holding":
        return await reader.holding(address, count)
    return await reader.input(address, count)


def _joins(locations: Mapping[str, Location], keys: Sequence[str], key: str, gap: int, max_count: int) -> bool:
    first, new = locations[keys[0]], locations[key]
    end = max(locations[item].address + locations[item].size for item in keys)
    limit = _MAX_BITS if new.bits else max_count
    return (
        new.kind == first.kind
        and new.address - end <= gap
        and max(end, new.address + new.size) - first.address <= limit
    )


def _span(kind: Kind, keys: tuple[str, ...], locations: Mapping[str, Location]) -> Block:
    first = locations[keys[0]].address
    end = max(locations[key].address + locations[key].size for key in keys)
    return Block(kind, first, end - first, keys)
