"""Valid HTTP requests, mutations of them, and the answers read as strictly as a proxy would."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from mutations import EXTREMES, ON_TEXT, mutate, splice

MODELS = ("same-fp32", "same-int64", "same-bool", "same-bytes")
LENGTH, JSON_LENGTH = "Content-Length", "Inference-Header-Content-Length"


@dataclass
class Request:
    """A request in parts, so that each can be changed alone; `json_bytes` is None where all of the body is JSON."""

    line: str
    headers: dict[str, str]
    text: bytes = b""
    data: bytes = b""
    binary: bool = False
    chunked: bool = False

    def encode(self, **lies: str) -> bytes:
        """The bytes with true sizes, but for `lies`: header name -> value."""
        body = self.text + self.data
        headers = {"Host": "node", **self.headers}
        if self.binary:
            headers[JSON_LENGTH] = str(len(self.text))
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
            body = chunks(body)
        elif body or self.line.startswith("POST"):
            headers[LENGTH] = str(len(body))
        headers |= lies
        lines = [f"{self.line} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunks(body: bytes, size: int = 50) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def _tensor(datatype: str, rows: int, **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": [rows, 4], **more}


def valid_requests() -> list[Request]:
    """Every endpoint and every form of a body."""
    requests = [
        Request(f"GET {path}", {"Accept-Encoding": "gzip"})
        for path in (
            "/v2",
            "/v2/health/ready",
            "/v2/models/same-fp32",
            "/v2/models/same-fp32/versions/1/ready",
            "/v2/models/same-fp32/config",
            "/v2/models/same-fp32/stats",
            "/metrics?names=triton",
            "/v2/openapi.json",
        )
    ]
    data: dict[str, Any] = {"fp32": [0.5, -1, 2.25, 1e30], "int64": [1, -2, 3, 2**53], "bool": [True, False] * 2}
    data["bytes"] = ["a", "größer", "", "x" * 50]
    raw = {"fp32": struct.pack("<4f", 1, 2, 3, 4), "int64": struct.pack("<4q", 1, -2, 3, 4), "bool": b"\0\1\1\0"}
    raw["bytes"] = b"".join(struct.pack("<I", len(item)) + item for item in (b"a", b"bc", b"", b"x" * 30))
    for kind, values in data.items():
        line, datatype = f"POST /v2/models/same-{kind}/infer", kind.upper()
        for rows in (1, 16):
            body = {"id": "7", "inputs": [_tensor(datatype, rows, data=values * rows)], "outputs": [{"name": "y"}]}
            text = json.dumps(body).encode()
            requests.append(Request(line, {"Content-Type": "application/json"}, text))
            requests.append(Request(line, {}, text, chunked=True))
            size = len(raw[kind]) * rows
            body = {"inputs": [_tensor(datatype, rows, parameters={"binary_data_size": size})]}
            body["parameters"] = {"binary_data_output": True, "priority": 1, "timeout": 1_000_000, "deadline_ms": 900}
            text = json.dumps(body).encode()
            requests.append(Request(line, {}, text, raw[kind] * rows, binary=True))
            requests.append(Request(line, {}, text, raw[kind] * rows, binary=True, chunked=True))
        requests.append(Request(line, {JSON_LENGTH: "0"}, b"", raw[kind]))
    body = {"inputs": [_tensor("FP32", 1, data=data["fp32"])]}
    body["outputs"] = [{"name": "y", "parameters": {"classification": 2, "binary_data": False}}]
    text = json.dumps(body).encode()
    line = "POST /v2/models/same-fp32/versions/1/infer"
    requests.append(Request(line, {"Expect": "100-continue"}, text))
    requests.append(Request(line, {"Content-Encoding": "gzip"}, gzip.compress(text * 1)))
    requests.append(Request(line, {"Content-Encoding": "deflate"}, zlib.compress(text)))
    nested = {"inputs": [_tensor("FP32", 2, data=[[1, 2, 3, 4], [5, 6, 7, 8]])]}
    requests.append(Request(line, {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}, json.dumps(nested).encode()))
    requests.append(Request("POST /v2/repository/index", {}, b'{"ready": true}'))
    requests.append(Request("POST /v2/repository/models/same-fp32/unload", {"Authorization": "Bearer no"}, b"{}"))
    requests.append(Request("POST /v2/models/none/infer", {}, text))
    return requests


def mutated(rng: random.Random, valid: list[Request]) -> bytes:
    """What one connection sends."""
    request = rng.choice(valid)
    kind = rng.random()
    if kind < 0.35:  # the body, its sizes right
        request = Request(**vars(request))
        if request.data and rng.random() < 0.4:
            request.data = mutate(rng, request.data)
        else:
            request.text = mutate(rng, request.text, ON_TEXT)
        return request.encode()
    if kind < 0.5:  # a header that lies
        name = rng.choice(
            (LENGTH, JSON_LENGTH, "Transfer-Encoding", "Content-Encoding", "Expect", "Connection", "Host")
        )
        values = [str(len(request.text) + rng.choice((-1, 1, 7))), *(value.decode() for value in EXTREMES)]
        values += ["chunked", "gzip", "100-continue", "close", "Upgrade, HTTP2-Settings", "", "chunked, chunked"]
        return request.encode(**{name: rng.choice(values)})
    data = request.encode()
    if kind < 0.65:  # the head, and what hangs on it
        head, _, body = data.partition(b"\r\n\r\n")
        return mutate(rng, head, ON_TEXT) + b"\r\n\r\n" + body
    if kind < 0.8:  # two requests in one
        other = rng.choice(valid).encode()
        return data + other if rng.random() < 0.3 else splice(rng, data, other)
    return mutate(rng, data, ON_TEXT)  # anywhere: chunks, blank lines, ends


async def answers(reader: asyncio.StreamReader) -> list[tuple[int, bytes]]:
    """Every (status, body) until the server closes. Raises AssertionError for what is no HTTP answer."""
    data, found = await reader.read(-1), []
    while data:
        head, blank, data = data.partition(b"\r\n\r\n")
        assert blank, f"an answer's head is cut off: {head[:200]!r}"
        first, *lines = head.split(b"\r\n")
        assert first.startswith(b"HTTP/1.1 "), first[:200]
        status = int(first[9:12])
        if status == 100:
            continue
        headers = dict(line.lower().split(b": ", 1) for line in lines)
        size = int(headers[b"content-length"])
        assert len(data) >= size, f"an answer's body is cut off: {head!r}"
        body, data = data[:size], data[size:]
        if status >= 400:
            assert json.loads(body)["error"], body
        found.append((status, body))
    return found
