"""Round trip of the worker protocol: 8 KB, 64 KB and 1 MB through a real worker, ring against inline.

The model is the identity on the smallest backend there is (it returns its input), so the figures are the protocol's.
`python benchmarks/worker_protocol.py`; the last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from millhand.serving.blackbox import Blackbox
from millhand.serving.blocking_client import BlockingWorkerClient
from millhand.serving.client import WorkerClient

ROUNDS = 400
REPEATS = 5
SIZES = {"8 KB": 8 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20}
BACKEND = """
class Session:
    inputs = {"x": ("uint8", (-1, -1))}
    outputs = {"y": ("uint8", (-1, 1))}
    def run(self, inputs): return {"y": inputs["x"][:, :1]}
    def close(self): pass
class Backend:
    name, suffixes = "first", ()
    def load(self, artifact, accelerator, options): return Session()
def millhand_backends(): return [Backend()]
"""


class Worker:
    """One worker process with the model loaded."""

    def __init__(self, folder: Path) -> None:
        (folder / "bench_backend.py").write_text(BACKEND)
        near, far = socket.socketpair()
        self.path = folder / "w.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(self.path))
        listener.listen()
        self.blackbox, fd = Blackbox.create()
        descriptors = {"control_fd": far.fileno(), "blackbox_fd": fd, "listen_fd": listener.fileno()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "millhand.serving.worker", json.dumps({"name": "bench", **descriptors})],
            pass_fds=list(descriptors.values()),
            env={**os.environ, "PYTHONPATH": os.fspath(folder), "OPENBLAS_NUM_THREADS": "1"},
        )
        far.close()
        listener.close()
        os.close(fd)
        self.control = BlockingWorkerClient(near, "bench")
        specs = {"inputs": {"x": ["uint8", [-1, -1]]}, "outputs": {"y": ["uint8", [-1, 1]]}}
        self.control.call(
            "load", model="first", version=1, artifact="", backend="first", module="bench_backend", max_batch=1, **specs
        )

    def stop(self) -> None:
        self.control.close()
        self.process.wait(5)


def median_us(times: list[float]) -> float:
    return statistics.median(times) * 1e6


def blocking_us(path: Path, size: int, slots: int) -> float:
    client = BlockingWorkerClient.connect(path, slots, 2 << 20)
    x = np.ones((1, size), dtype=np.uint8)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        client.infer("first", {"x": x})
        times.append(time.perf_counter() - start)
    client.close()
    return median_us(times)


async def asyncio_us(path: Path, size: int) -> float:
    client = await WorkerClient.connect(path, "bench", 16, 2 << 20)
    x = np.ones((1, size), dtype=np.uint8)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        await client.infer("first", {"x": x})
        times.append(time.perf_counter() - start)
    client.close()
    return median_us(times)


def measure(path: Path) -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    for label, size in SIZES.items():
        ring, inline, loop = [], [], []
        for _ in range(REPEATS):  # paired: each repeat measures all three
            ring.append(blocking_us(path, size, slots=2))
            inline.append(blocking_us(path, size, slots=0))
            loop.append(asyncio.run(asyncio_us(path, size)))
        value, peer = statistics.median(ring), statistics.median(inline)
        figures += [
            {"name": f"blocking client, ring, {label}", "value": round(value, 1), "unit": "us",
             "peer": {"name": "inline", "value": round(peer, 1)}},
            {"name": f"asyncio client, ring, {label}", "value": round(statistics.median(loop), 1), "unit": "us"},
        ]  # fmt: skip
        print(f"{label:>6}: ring {value:7.1f} us, inline {peer:7.1f} us, asyncio {statistics.median(loop):7.1f} us")
    return figures


def host() -> str:
    info = Path("/proc/cpuinfo").read_text()
    pairs = (line.split(":", 1) for line in info.splitlines() if ":" in line)
    lines = {key.strip(): text.strip() for key, text in pairs}
    flags = lines.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni") if name in flags]
    return f"{lines.get('model name', platform.machine())}, {os.cpu_count()} cores, {' '.join(sets)}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        try:
            figures = measure(worker.path)
        finally:
            worker.stop()
    result = {
        "name": "worker_protocol",
        "figures": figures,
        "host": host(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "msgspec": msgspec.__version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
