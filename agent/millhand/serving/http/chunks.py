"""A body in chunks (RFC 9112, section 7.1): decoded as it comes, extensions and trailers read over."""

from __future__ import annotations

from millhand.errors import InputError
from millhand.serving.http.messages import BodyTooLarge

LINE_BYTES_CAP = 4096
TRAILER_BYTES_CAP = 16 << 10


class ChunkedBody:
    """Feed it until it says that the body is complete; then `body` holds it."""

    def __init__(self, bytes_cap: int) -> None:
        self.body = bytearray()
        self._bytes_cap = bytes_cap
        self._left = 0  # bytes of the chunk under way, with its CRLF
        self._trailer_bytes = -1  # not yet in the trailer

    def feed(self, data: bytearray) -> bool:
        """Take what it can from the front of `data`; True once complete. Raises InputError or BodyTooLarge."""
        while data:
            if self._left:
                self._take_chunk(data)
                continue
            end = data.find(b"\r\n", 0, LINE_BYTES_CAP)
            if end < 0:
                if len(data) >= LINE_BYTES_CAP:
                    raise InputError("a chunk's size line is too long", hint="send chunks as HTTP/1.1 does")
                return False
            line = bytes(data[:end])
            del data[: end + 2]
            if self._trailer_bytes >= 0:
                if not line:
                    return True
                self._trailer_bytes += len(line) + 2
                if self._trailer_bytes > TRAILER_BYTES_CAP:
                    raise InputError("the trailers are too long", hint="send fewer")
            else:
                self._begin_chunk(line)
        return False

    def _begin_chunk(self, line: bytes) -> None:
        digits = line.partition(b";")[0].strip(b" \t")
        if not digits or len(digits) > 16 or digits.strip(b"0123456789abcdefABCDEF"):
            raise InputError(f"a chunk's size '{digits[:32].decode(errors='replace')}' is no hexadecimal number")
        size = int(digits, 16)
        if len(self.body) + size > self._bytes_cap:
            raise BodyTooLarge(self._bytes_cap)
        if size == 0:
            self._trailer_bytes = 0
        else:
            self._left = size + 2

    def _take_chunk(self, data: bytearray) -> None:
        part = min(len(data), self._left)
        content = max(min(part, self._left - 2), 0)
        self.body += data[:content]
        end = bytes(data[content:part])
        # The bytes after the content are the last of b"\r\n" that are still due.
        due = b"\r\n"[2 - min(self._left - content, 2) :]
        if not due.startswith(end):
            raise InputError("a chunk is longer than its size says", hint="send chunks as HTTP/1.1 does")
        del data[:part]
        self._left -= part
