"""Valid gRPC calls, mutations of their messages and frames, and the server's frames read strictly."""

from __future__ import annotations

import asyncio
import gzip
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import hpack
from mutations import mutate, splice

from millhand.serving.grpc import frames, wire
from millhand.serving.grpc.frames import frame

SERVICE = "inference.GRPCInferenceService"
QUIET_S = 0.5
"""A server that says nothing for so long waits for more of the request."""


@dataclass
class Call:
    """One call: method, messages, metadata."""

    method: str
    messages: list[bytes]
    metadata: dict[str, str] = field(default_factory=dict)
    service: str = SERVICE

    def fields(self) -> list[tuple[str, str]]:
        head = {":method": "POST", ":scheme": "http", ":path": f"/{self.service}/{self.method}", ":authority": "node"}
        return [*(head | {"content-type": "application/grpc", "te": "trailers"} | self.metadata).items()]

    def framed(self) -> bytes:
        packed = self.metadata.get("grpc-encoding") == "gzip"
        messages = [gzip.compress(message) for message in self.messages] if packed else self.messages
        return b"".join(struct.pack(">?I", packed, len(message)) + message for message in messages)


def sent(block: bytes, data: bytes, rng: random.Random) -> list[bytes]:
    """The frames of a call on stream 1."""
    cut = rng.randrange(len(data) + 1) if rng.random() < 0.3 else len(data)
    parts = [frame(frames.SETTINGS, 0, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 1 << 20))]
    parts.append(frame(frames.HEADERS, frames.END_HEADERS, 1, block))
    if cut < len(data):
        parts.append(frame(frames.DATA, 0, 1, data[:cut]))
    parts.append(frame(frames.DATA, frames.END_STREAM, 1, data[cut if cut < len(data) else 0 :]))
    return parts


def valid_calls() -> list[Call]:
    """Every method; inferences with every form of tensors."""
    calls = [
        Call("ServerLive", [b""]),
        Call("ServerReady", [b""]),
        Call("ServerMetadata", [b""]),
        Call("RepositoryIndex", [wire.RepositoryIndexRequest(ready=True).SerializeToString()]),
        Call("RepositoryModelUnload", [wire.RepositoryModelRequest(model_name="same-fp32").SerializeToString()]),
        Call("Check", [b""], service="grpc.health.v1.Health"),
        Call("TraceSetting", [b""]),
    ]
    named = wire.ModelRequest(name="same-fp32", version="1").SerializeToString()
    calls += [Call(method, [named]) for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")]
    fp32, strings = struct.pack("<4f", 1, 2, 3, 4), b"".join(struct.pack("<I", 3) + b"abc" for _ in range(4))
    raw = [infer("same-fp32", "FP32", rows, raw=fp32 * rows) for rows in (1, 16)]
    raw += [infer("same-bytes", "BYTES", 2, raw=strings * 2), infer("same-bool", "BOOL", 1, raw=b"\0\1\1\0")]
    typed = [infer("same-fp32", "FP32", 1, fp32_contents=[1, 2, 3, 4])]
    typed += [infer("same-int64", "INT64", 1, int64_contents=[1, -2, 3, 2**60])]
    typed += [infer("same-bytes", "BYTES", 1, bytes_contents=[b"a", b"", b"xyz", b"b"])]
    calls += [Call("ModelInfer", [message], {"grpc-timeout": "1S"}) for message in (*raw, *typed) for _ in range(2)]
    calls += [Call("ModelInfer", [raw[1]], {"grpc-encoding": "gzip"}), Call("ModelStreamInfer", [*raw, *typed])]
    calls += [Call("ModelStreamInfer", [raw[0]] * 3)]
    return calls


def infer(model: str, datatype: str, rows: int, raw: bytes = b"", **contents: list[object]) -> bytes:
    request = wire.ModelInferRequest(model_name=model, id="7")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[rows, 4])
    request.outputs.add(name="y")
    request.parameters["priority"].int64_param = 1
    if raw:
        request.raw_input_contents.append(raw)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return request.SerializeToString()


def mutated(rng: random.Random, valid: list[Call]) -> bytes:
    """What one connection sends."""
    call = rng.choice(valid)
    fields, data = call.fields(), call.framed()
    kind = rng.random()
    if kind < 0.45:  # a message, its size right
        messages = list(call.messages)
        place = rng.randrange(len(messages))
        messages[place] = mutate(rng, messages[place])
        data = Call(call.method, messages, call.metadata, call.service).framed()
    elif kind < 0.6:  # prefixes, compressed data, numbers and ends of messages
        data = mutate(rng, data)
    elif kind < 0.75:
        fields = _other_fields(rng, fields)
    block = hpack.Encoder().encode(fields)
    if 0.75 <= kind < 0.85:
        block = mutate(rng, block)
    parts = sent(block, data, rng)
    if kind >= 0.85:
        parts = rng.choice(_ON_FRAMES)(rng, parts, rng.choice(valid))
    whole = frames.PREFACE + b"".join(parts)
    return mutate(rng, whole) if kind >= 0.98 else whole


def _other_fields(rng: random.Random, fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    place = rng.randrange(len(fields))
    name, value = fields[place]
    change = rng.randrange(5)
    if change == 0:
        return fields[:place] + fields[place + 1 :]
    if change == 1:
        return [*fields, fields[place]]
    if change == 2:
        return [*fields, ("grpc-timeout", rng.choice(("0n", "1n", "99999999H", "1", "-1S", "S", "1e3S", "123456789m")))]
    if change == 3:
        coding = rng.choice(("gzip", "deflate", "identity", "snappy", "", "gzip, gzip"))
        return [*fields, ("grpc-encoding", coding), ("x" * 3000, "y" * rng.choice((0, 3000, 20_000)))]
    return [*fields[:place], (name, mutate(rng, value.encode()).decode("latin-1")), *fields[place + 1 :]]


def _shuffled(rng: random.Random, parts: list[bytes], other: Call) -> list[bytes]:
    return rng.sample(parts, len(parts))


def _repeated(rng: random.Random, parts: list[bytes], other: Call) -> list[bytes]:
    place = rng.randrange(len(parts))
    return parts[: place + 1] + parts[place:]


def _with_odd_frame(rng: random.Random, parts: list[bytes], other: Call) -> list[bytes]:
    payload = rng.randbytes(rng.choice((0, 4, 5, 6, 8, 9, 100)))
    odd = frame(
        rng.randrange(12), rng.choice((0, 1, 4, 5, 8, 0x20, 0xFF)), rng.choice((0, 1, 2, 3, 2**31 - 1)), payload
    )
    place = rng.randrange(len(parts) + 1)
    return [*parts[:place], odd, *parts[place:]]


def _bent(rng: random.Random, parts: list[bytes], other: Call) -> list[bytes]:
    """The head of one frame changed: size, kind, flags or stream."""
    place = rng.randrange(len(parts))
    bent = bytearray(parts[place])
    bent[rng.randrange(9)] = rng.choice((0, 1, 2, 3, 4, 5, 8, 0x7F, 0x80, 0xFF))
    return [*parts[:place], bytes(bent), *parts[place + 1 :]]


def _spliced(rng: random.Random, parts: list[bytes], other: Call) -> list[bytes]:
    second = sent(hpack.Encoder().encode(other.fields()), other.framed(), rng)
    return [splice(rng, b"".join(parts), b"".join(second))]


_ON_FRAMES: list[Callable[[random.Random, list[bytes], Call], list[bytes]]] = [
    _shuffled,
    _repeated,
    _with_odd_frame,
    _with_odd_frame,
    _bent,
    _bent,
    _spliced,
]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, list[int]]:
    """(how it ended, every grpc-status): "answered", "closed" by the server, or "left" where it waits for more.

    Raises AssertionError for an error of the server's own making.
    """
    decoder, statuses, data = hpack.Decoder(), [], b""
    while True:
        try:
            async with asyncio.timeout(QUIET_S):
                more = await reader.read(1 << 16)
        except TimeoutError:
            writer.write_eof()
            rest = await reader.read(-1)  # our side is closed: so must theirs
            statuses += _read(rest, decoder)[0] if not data else []
            return "left", statuses
        if not more:
            return "closed", statuses
        data += more
        if data.startswith(b"HTTP/1.1 "):
            return "closed", statuses
        found, ended, used = _read(data, decoder)
        data = data[used:]
        statuses += found
        if ended:
            return "answered", statuses


def _read(data: bytes, decoder: hpack.Decoder) -> tuple[list[int], bool, int]:
    """(statuses, whether a stream or the connection ended, bytes read) of whole frames."""
    statuses, ended, position = [], False, 0
    while len(data) - position >= 9:
        high, low, kind, flags, _ = frames.HEAD.unpack_from(data, position)
        end = position + 9 + (high << 8 | low)
        if end > len(data):
            break
        payload, position = data[position + 9 : end], end
        if kind == frames.HEADERS:
            fields = dict(decoder.decode(payload))
            if "grpc-status" in fields:
                statuses.append(int(fields["grpc-status"]))
                assert statuses[-1] not in (2, 13, 15), fields
            ended |= bool(flags & frames.END_STREAM)
        elif kind == frames.RST_STREAM:
            assert int.from_bytes(payload, "big") != frames.INTERNAL_ERROR
            ended = True
        elif kind == frames.GOAWAY:
            assert int.from_bytes(payload[4:8], "big") != frames.INTERNAL_ERROR, payload[8:]
    return statuses, ended, position
