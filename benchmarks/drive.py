"""Loads a server from outside: wrk for HTTP/1.1, h2load for gRPC, load.py where wrk is missing.

All are closed loops: each connection asks again as soon as it was answered.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from figures import percentile
from load import Load
from wire import Request

WRK_SCRIPT = """\
local file = io.open("{folder}/body", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{{"requests": %d, "us": %d, "status": %d, "lost": %d, "p50_us": %d, "p99_us": %d}}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


class LoadFailed(Exception):
    """Not every request was answered well: a figure of such a run would mean nothing."""


@dataclass(frozen=True)
class Drive:
    """One run's outcome; every request got its answer."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def generators() -> dict[str, str]:
    """Protocol family -> the program that loads it here; gRPC is left out where h2load is missing."""
    found = {"http": "wrk" if shutil.which("wrk") else "load.py"}
    if shutil.which("h2load"):
        found["grpc"] = "h2load"
    return found


def drive(address: tuple[str, int], request: Request, connections: int, seconds: float, answer_bytes: int) -> Drive:
    """Load for so long. `answer_bytes`: the size of a right answer's body; another mean size is refused.

    Raises LoadFailed.
    """
    if request.protocol == "grpc":
        if not shutil.which("h2load"):
            raise LoadFailed("h2load is not installed")
        return _h2load(address, request, connections, seconds, answer_bytes)
    if shutil.which("wrk"):
        return _wrk(address, request, connections, seconds)
    return _own(address, request, connections, seconds, answer_bytes)


def _wrk(address: tuple[str, int], request: Request, connections: int, seconds: float) -> Drive:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(request.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in request.headers.items())
        script = Path(folder) / "script.lua"
        script.write_text(WRK_SCRIPT.format(folder=folder, headers=headers))
        # wrk takes whole seconds only; a shorter warm-up is the caller's.
        command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s", "-s", str(script)]
        text = _run([*command, f"http://{address[0]}:{address[1]}{request.path}"])
    found = json.loads(text.strip().splitlines()[-1])
    if found["status"] or found["lost"] or not found["requests"]:
        raise LoadFailed(f"{request.protocol}: {found}")
    return Drive(found["requests"], found["us"] / 1e6, found["p50_us"] / 1e3, found["p99_us"] / 1e3)


def _h2load(address: tuple[str, int], request: Request, connections: int, seconds: float, answer_bytes: int) -> Drive:
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(request.body)
        text = _run([
            "h2load", "-t", "1", "-c", str(connections), "-m", "1", "-D", f"{round(1e3 * seconds)}ms",
            "-d", str(body), "--log-file", str(log),
            "-H", "content-type: application/grpc", "-H", "te: trailers",
            f"http://{address[0]}:{address[1]}{request.path}",
        ])  # fmt: skip
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    done = re.search(r"requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed", text)
    size = re.search(r"\((\d+)\) data", text)
    if done is None or size is None or int(done[3]) or not int(done[2]):
        raise LoadFailed(f"grpc: {text[-600:]}")
    # A failed call has status 200 too, its error in the trailers and no data. (h2load's own warm-up would blur this.)
    answers = int(size[1]) / answer_bytes
    if not int(done[2]) <= answers <= int(done[2]) + connections:
        raise LoadFailed(f"grpc: {int(size[1])} bytes in {done[2]} answers of {answer_bytes} bytes each")
    latencies = [int(row[2]) / 1e3 for row in rows]
    return Drive(int(done[2]), seconds, percentile(latencies, 50) or 0.0, percentile(latencies, 99) or 0.0)


def _own(address: tuple[str, int], request: Request, connections: int, seconds: float, answer_bytes: int) -> Drive:
    load = Load(address, [request.http1(address[0])], lambda _, __, body: len(body) == answer_bytes, connections)
    result = load.closed(seconds)
    if result.right != result.requests or not result.right:
        raise LoadFailed(f"{request.protocol}: {result.to_dict()}")
    return Drive(result.right, result.seconds, result.percentile_ms(50) or 0.0, result.percentile_ms(99) or 0.0)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadFailed(f"{command[0]} ended with {done.returncode}: {done.stderr[-600:] or done.stdout[-600:]}")
    return done.stdout
