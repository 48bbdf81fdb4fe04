"""The servers under measurement: millhand and its peers, each a real process with a marker of its own.

Peers live in venvs that `prepare` makes under a cache folder; a changed requirement makes one anew. All of them run the
same ONNX file with the same release of ONNX Runtime, one thread an inference.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from agent import BenchAgent
from figures import progress
from processes import Family

from millhand.config import Config

HERE = Path(__file__).parent
PEERS = HERE / "peers"
PEERS_DIR = HERE.parent / "build" / "peers"
REQUIREMENTS: dict[str, list[str]] = tomllib.loads((PEERS / "requirements.toml").read_text())
READY_S = 60.0
STOP_S = 20.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
Address = tuple[str, int]
Tables = dict[str, dict[str, Any]]


class Server:
    """A server that runs inside the `with` block. Addresses are None where it does not speak that protocol."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.family = Family()
        self.http: Address | None = None
        self.grpc: Address | None = None

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by role of all processes that answer a request."""
        return self.family.cpu_s()

    def address(self, protocol: str) -> Address | None:
        return self.grpc if protocol == "grpc" else self.http

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError


class Millhand(Server):
    """`millhand run` with the models of a repository."""

    def __init__(self, repository: Path, tables: Tables | None = None, name: str = "millhand") -> None:
        """`tables`: what the configuration says beside the defaults, `{"models": {"threads": 2}}`."""
        super().__init__(name)
        wanted: Tables = {"http": {"port": 0}, "models": {"paths": [str(repository)]}}
        if "grpc" in Config.model_fields:
            wanted["grpc"] = {"enabled": True, "port": 0}
        for table, keys in (tables or {}).items():
            wanted[table] = {**wanted.get(table, {}), **keys}
        self.agent = BenchAgent(_toml(wanted), environment=self.family.environment)

    def __enter__(self) -> Millhand:
        self.agent.start()
        state = self.agent.call("state")
        self.http = _address(state["http"])
        self.grpc = _address(state.get("grpc"))
        self.agent.wait(self._serves, "the models", READY_S, every_s=0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.agent.__exit__(kind, error, trace)

    def chosen(self, model: str) -> dict[str, Any]:
        """What it decided by itself for this machine and this model."""
        shown = self.agent.call("model.show", model=model)
        return {
            "threads": {version: found["threads"] for version, found in shown["threads"].items()},
            "max_batch": shown["max_batch"],
            "processes": dict(Counter(process.role for process in self.family.processes())),
        }

    def _serves(self) -> bool:
        assert self.http is not None
        return _answers(f"http://{self.http[0]}:{self.http[1]}/v2/health/ready")


class Peer(Server):
    """Another server, started by a command in its own venv."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        ports: Sequence[int],
        ready_path: str,
        environment: dict[str, str] | None = None,
        venv: str = "",
    ) -> None:
        super().__init__(name)
        self._command = [str(folder / (venv or name) / "bin" / "python"), *command]
        self._ready_path = ready_path
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._environment = {**inherited, **ONE_THREAD, **self.family.environment, **(environment or {})}
        self._log = folder / f"{name}.run.log"
        self.http = ("127.0.0.1", ports[0])
        self.grpc = ("127.0.0.1", ports[1]) if len(ports) > 1 else None

    def __enter__(self) -> Peer:
        assert self.http is not None
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, cwd=PEERS, start_new_session=True
            )
        end = time.monotonic() + READY_S
        while not _answers(f"http://{self.http[0]}:{self.http[1]}{self._ready_path}"):
            if self._process.poll() is not None or time.monotonic() > end:
                self._stop()
                raise SystemExit(f"peer '{self.name}' did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """SIGTERM, then SIGKILL, to its whole session."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.family.processes():
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + STOP_S
            while self.family.processes() and time.monotonic() < end:
                self._process.poll()
                time.sleep(0.05)
            if not self.family.processes():
                break
        self._process.wait()


def bare(model: Path, folder: Path, threads: int = 0) -> Peer:
    """uvicorn with uvloop and httptools, one process, no access log; `threads` as peers/bare.py says."""
    (port,) = _free_ports(1)
    environment = {"MODEL_FILE": str(model), "THREADS": str(threads)}
    name = "bare, threads" if threads else "bare"
    return Peer(name, _uvicorn("bare:app", port), folder, [port], "/ready", environment, "bare")


def bare_threads(model: Path, folder: Path) -> Peer:
    """The same with a thread for each core."""
    return bare(model, folder, os.cpu_count() or 1)


class Front(Peer):
    """Another HTTP server before the workers of a running agent (peers/front.py)."""

    def __init__(self, server: str, agent: Millhand, folder: Path) -> None:
        """`server`: uvicorn or granian. The agent must run."""
        (port,) = _free_ports(1)
        self._agent = agent
        command = {
            "uvicorn": _uvicorn("front:app", port),
            "granian": ["-m", "granian", "--interface", "asgi", "--no-ws", "--port", str(port), "front:app"],
        }[server]
        # This interpreter's packages too: the agent's client lives there.
        packages = [path for path in sys.path if path and path != str(HERE)]
        environment = {
            "CONTROL_SOCKET": str(agent.agent.folder / "run" / "control.sock"),
            "PYTHONPATH": os.pathsep.join([str(PEERS), *packages]),
        }
        super().__init__(f"{server} front", command, folder, [port], "/ready", environment, "bare")

    def cpu_s(self) -> dict[str, float]:
        return {**self._agent.cpu_s(), **self.family.cpu_s()}


def _uvicorn(app: str, port: int) -> list[str]:
    return ["-m", "uvicorn", app, "--port", str(port), "--no-access-log", "--log-level", "warning"]


def mlserver(model: Path, folder: Path) -> Peer:
    """In its own process (`parallel_workers = 0`), which is its fastest form for a small model."""
    http_port, grpc_port, metrics_port = _free_ports(3)
    home = folder / "mlserver-models" / "cnn"
    home.mkdir(parents=True, exist_ok=True)
    settings = {"host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    (home.parent / "settings.json").write_text(json.dumps({**settings, "parallel_workers": 0, "debug": False}))
    runtime = {"name": "cnn", "implementation": "mlserver_runtime.OnnxRuntime"}
    (home / "model-settings.json").write_text(
        json.dumps({**runtime, "parameters": {"uri": str(model), "version": "1"}})
    )
    command = ["-m", "mlserver.cli.main", "start", str(home.parent)]
    return Peer("mlserver", command, folder, [http_port, grpc_port], "/v2/models/cnn/ready", {"PYTHONPATH": str(PEERS)})


def pytriton(model: Path, folder: Path) -> Peer:
    """Triton finds libpython only where LD_LIBRARY_PATH names its folder."""
    http_port, grpc_port = _free_ports(2)
    python = folder / "pytriton" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    libraries = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    command = ["pytriton_server.py", str(model), str(http_port), str(grpc_port)]
    return Peer(
        "pytriton", command, folder, [http_port, grpc_port], "/v2/models/cnn/ready", {"LD_LIBRARY_PATH": libraries}
    )


PEER_MAKERS = (bare, bare_threads, mlserver, pytriton)


def prepare(folder: Path, names: Sequence[str] = tuple(REQUIREMENTS)) -> dict[str, dict[str, str]]:
    """Make the venvs that are missing or out of date; returns peer -> package -> version."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        wanted = [*REQUIREMENTS[name], f"onnxruntime=={version('onnxruntime')}"]
        home = folder / name
        stamp = home / "requirements.json"
        if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
            progress(f"making the venv of peer '{name}'")
            subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
            pip = [home / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
            subprocess.run([*pip, *wanted], check=True, stdout=sys.stderr)
            stamp.write_text(json.dumps(wanted))
        found[name] = _installed(home)
    return found


def _installed(home: Path) -> dict[str, str]:
    ask = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    done = subprocess.run([home / "bin" / "python", "-c", ask], check=True, capture_output=True, text=True)
    everything: dict[str, Any] = json.loads(done.stdout)
    names = (
        "mlserver",
        "nvidia-pytriton",
        "onnxruntime",
        "numpy",
        "orjson",
        "starlette",
        "uvicorn",
        "uvloop",
        "granian",
    )
    return {name: everything[name] for name in names if name in everything}


def _toml(tables: Tables) -> str:
    lines = []
    for table, keys in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        with closing(one):
            pass
    return ports


def _address(url: str | None) -> Address | None:
    if not url:
        return None
    where = urlsplit(url if "//" in url else f"//{url}")
    return where.hostname or "127.0.0.1", where.port or 80


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
