"""Header compression of HTTP/2 (RFC 7541): reads every form, writes literals only.

A client that repeats a call sends the same few bytes: what a block that leaves the table as it was came to is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Fields = tuple[tuple[bytes, bytes], ...]
Head = TypeVar("Head")

TABLE_BYTES = 4096
ENTRY_BYTES = 32
INTEGER_CAP = 1 << 28
KNOWN_CAP = 64

_STATIC_TEXT = (
    ":authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https :status=200 :status=204 "
    ":status=206 :status=304 :status=400 :status=404 :status=500 accept-charset accept-encoding=gzip,_deflate "
    "accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
    "content-disposition content-encoding content-language content-length content-location content-range content-type "
    "cookie date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since "
    "last-modified link location max-forwards proxy-authenticate proxy-authorization range referer refresh retry-after "
    "server set-cookie strict-transport-security transfer-encoding user-agent vary via www-authenticate"
)


def _static_field(text: str) -> tuple[bytes, bytes]:
    name, _, value = text.replace("_", " ").partition("=")
    return name.encode(), value.encode()


STATIC: Fields = tuple(_static_field(text) for text in _STATIC_TEXT.split())
"""Appendix A; index 1 is the first."""

# Appendix B is a canonical code: it follows from how many symbols have each length, and from their order.
_SYMBOLS_OF_LENGTH = {
    5: 10, 6: 26, 7: 32, 8: 6, 10: 5, 11: 3, 12: 2, 13: 6, 14: 2, 15: 3, 19: 3, 20: 8, 21: 13, 22: 26, 23: 29, 24: 12,
    25: 4, 26: 15, 27: 19, 28: 29, 30: 4,
}  # fmt: skip
_SYMBOLS = bytes.fromhex(
    "303132616365696f737420252d2e2f333435363738393d415f62646667686c6d6e7072753a42434445464748494a4b4c4d4e4f505152"
    "5354555657596a6b71767778797a262a2c3b585a212228293f272b7c233e0024405b5d7e5e7d3c607b5cc3d0808283a2b8c2e0e299a1"
    "a7acb0b1b3d1d8d9e3e5e68184858688929a9ca0a3a4a9aaadb2b5b9babbbdbec4c6e4e8e90187898a8b8c8d8f93959697989b9d9ea5"
    "a6a8aeafb4b6b7bcbfc5e7ef098e9091949fabced7e1ecedc7cfeaebc0c1c8c9cacdd2d5dadbeef0f2f3ffcbccd3d4d6dddedff1f4f5"
    "f6f7f8fafbfcfdfe020304050607080b0c0e0f1011121314151718191a1b1c1d1e1f7fdcf90a0d16"
)  # the last code of 30 bits, which ends a string, is no symbol
_LONGEST = 30


def _code() -> tuple[list[int], list[int], list[int]]:
    """For each length of a code: where it ends among all numbers of 30 bits, itself, and code minus symbol number."""
    ends, lengths, shifts = [], [], []
    code = number = 0
    previous = 0
    for length, count in _SYMBOLS_OF_LENGTH.items():
        code <<= length - previous
        shifts.append(code - number)
        code += count
        number += count
        ends.append(code << (_LONGEST - length))
        lengths.append(length)
        previous = length
    return ends, lengths, shifts


_ENDS, _LENGTHS, _SHIFTS = _code()


class HeaderError(Exception):
    """The bytes are no header block, or it is too large; the connection cannot go on."""


class HeaderDecoder(Generic[Head]):
    """One connection's table."""

    def __init__(self, parse: Callable[[Fields], Head], list_bytes_cap: int) -> None:
        """`parse` makes of a block's fields what `decode` returns; it must depend on nothing else."""
        self._parse = parse
        self._list_bytes_cap = list_bytes_cap
        self._table: deque[tuple[bytes, bytes]] = deque()
        self._table_bytes = 0
        self._table_bytes_cap = TABLE_BYTES
        self._known: dict[bytes, Head] = {}

    def decode(self, block: bytes) -> Head:
        """Read a block. Raises HeaderError."""
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            fields, table_changed = self._read(block)
        except IndexError as error:
            raise HeaderError("a header block ends too early") from error
        head = self._parse(fields)
        if table_changed or len(self._known) >= KNOWN_CAP:
            self._known.clear()
        if not table_changed:
            self._known[block] = head
        return head

    def _read(self, block: bytes) -> tuple[Fields, bool]:
        fields: list[tuple[bytes, bytes]] = []
        table_changed = False
        position, size = 0, 0
        while position < len(block):
            first = block[position]
            if first & 0x80:
                index, position = _integer(block, position, 7)
                field = self._field(index)
            elif first & 0xE0 == 0x20:
                cap, position = _integer(block, position, 5)
                if fields or cap > TABLE_BYTES:
                    raise HeaderError("a header block changes the table's size where it must not")
                self._resize(cap)
                table_changed = True
                continue
            else:
                keep = first & 0xC0 == 0x40
                index, position = _integer(block, position, 6 if keep else 4)
                name, position = (self._field(index)[0], position) if index else _string(block, position)
                value, position = _string(block, position)
                field = (name, value)
                if keep:
                    self._keep(field)
                    table_changed = True
            size += len(field[0]) + len(field[1]) + ENTRY_BYTES
            if size > self._list_bytes_cap:
                raise HeaderError(f"a header list is larger than {self._list_bytes_cap} bytes")
            fields.append(field)
        return tuple(fields), table_changed

    def _field(self, index: int) -> tuple[bytes, bytes]:
        if 1 <= index <= len(STATIC):
            return STATIC[index - 1]
        if not index or index > len(STATIC) + len(self._table):
            raise HeaderError(f"a header block names entry {index}, which the table does not have")
        return self._table[index - len(STATIC) - 1]

    def _keep(self, field: tuple[bytes, bytes]) -> None:
        self._table.appendleft(field)
        self._table_bytes += len(field[0]) + len(field[1]) + ENTRY_BYTES
        self._resize(self._table_bytes_cap)

    def _resize(self, cap: int) -> None:
        self._table_bytes_cap = cap
        while self._table_bytes > cap:
            name, value = self._table.pop()
            self._table_bytes -= len(name) + len(value) + ENTRY_BYTES


def encode(*fields: tuple[str, str]) -> bytes:
    """A block of literals that enter no table, so that the same bytes serve every connection."""
    parts = []
    for name, value in fields:
        if (name, value) == (":status", "200"):
            parts.append(b"\x88")
        else:
            parts += [b"\x00", _text(name), _text(value)]
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode()
    size = len(data)
    if size < 0x7F:
        return bytes((size,)) + data
    head = bytearray([0x7F])
    size -= 0x7F
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + data


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    """The number whose first byte has `bits` low bits for it, and where it ends (5.1)."""
    full = (1 << bits) - 1
    number = block[position] & full
    position += 1
    if number < full:
        return number, position
    shift = 0
    while True:
        byte = block[position]
        position += 1
        number += (byte & 0x7F) << shift
        if number > INTEGER_CAP or shift > 28:
            raise HeaderError("a number in a header block is too large")
        if not byte & 0x80:
            return number, position
        shift += 7


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    packed = block[position] & 0x80
    size, position = _integer(block, position, 7)
    end = position + size
    if end > len(block):
        raise HeaderError("a header block ends inside a string")
    data = block[position:end]
    return (unpack(data) if packed else data), end


def unpack(data: bytes) -> bytes:
    """Read Huffman code (5.2). Raises HeaderError."""
    symbols = bytearray()
    window = bits = 0
    try:
        for byte in data:
            window = window << 8 | byte
            bits += 8
            while bits >= _LONGEST:
                top = window >> (bits - _LONGEST)
                kind = bisect_right(_ENDS, top)
                length = _LENGTHS[kind]
                symbols.append(_SYMBOLS[(top >> (_LONGEST - length)) - _SHIFTS[kind]])
                bits -= length
                window &= (1 << bits) - 1
        while bits:
            top = (window + 1 << (_LONGEST - bits)) - 1  # as if ones followed, which is what pads a string
            kind = bisect_right(_ENDS, top)
            length = _LENGTHS[kind]
            if length > bits:
                break
            symbols.append(_SYMBOLS[(top >> (_LONGEST - length)) - _SHIFTS[kind]])
            bits -= length
            window &= (1 << bits) - 1
    except IndexError as error:
        raise HeaderError("a header string holds the code that ends one") from error
    if bits >= 8 or window != (1 << bits) - 1:
        raise HeaderError("a header string is padded wrongly")
    return bytes(symbols)
