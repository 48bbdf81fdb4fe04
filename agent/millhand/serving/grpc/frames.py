"""Frames of HTTP/2 (RFC 9113): kinds, flags, codes and limits."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = struct.Struct(">HBBBI")  # 24 bits of length as 16 and 8, kind, flags, stream
FRAME_BYTES = 16_384
HEADER_BYTES_CAP = 16_384
WINDOW = 1 << 20
"""What a client may send on one stream before it is told to go on."""
WINDOW_CAP = (1 << 31) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0x0, 0x1, 0x2, 0x3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 5, 6, 7, 8, 9, 11
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE = 0x3, 0x4, 0x6


class ConnectionFault(Exception):
    """The peer broke the protocol: the connection ends with this code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class StreamFault(Exception):
    """The peer broke the protocol on one stream: the stream ends with this code."""

    def __init__(self, stream: int, code: int) -> None:
        super().__init__(stream, code)
        self.stream = stream
        self.code = code


def frame(kind: int, flags: int, number: int, payload: bytes | memoryview = b"") -> bytes:
    """One frame, ready to be written."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, number) + payload


def unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "a frame is all padding")
    return payload[1 : len(payload) - payload[0]]
