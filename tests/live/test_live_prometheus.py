"""A real Prometheus over a real agent, and its linter over everything that the agent shows."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millhand.telemetry.broker import EmbeddedBroker
from millhand.testing import Agent, wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)"
)
QUERY = 'rate(http_requests_total{job="deepseek"}[5m]) > 100'
LIVE = "/v2/health/live"
PIPELINED = 50
JETSON = {
    "proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\n",
    "proc/meminfo": "MemTotal: 64349696 kB\nMemAvailable: 52430000 kB\n",
    "sys/devices/platform/bus@0/17000000.gpu/load": "321\n",
    "sys/class/thermal/thermal_zone0/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "45500\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    "sys/class/hwmon/hwmon3/in1_input": "19000\n",
    "sys/class/hwmon/hwmon3/curr1_input": "200\n",
    "sys/class/hwmon/hwmon3/curr1_max": "2000\n",
    "sys/class/hwmon/hwmon3/shunt1_resistor": "2000\n",
}


@pytest.fixture
def agent(millhand_agent: Callable[..., Agent], tmp_path: Path) -> Iterator[Agent]:
    """It serves a model, reads an asset, publishes, and takes its hardware from a recorded Jetson."""
    for name, text in JETSON.items():
        path = tmp_path / "jetson" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    recording = tmp_path / "press.csv"
    recording.write_text("time,temperature\n" + "".join(f"{row},{20 + row}\n" for row in range(40)))
    with EmbeddedBroker(tmp_path / "broker") as broker:
        yield millhand_agent(f"""
            profile = "generic-cpu"
            hardware_root = "{tmp_path / "jetson"}"
            [http]
            port = 0
            [models]
            load = ["rig-fault"]
            [plugins.rig]
            [telemetry]
            enabled = true
            brokers = ["{broker.url}"]
            [[assets]]
            name = "press"
            adapter = "file"
            [assets.options]
            path = "{recording}"
            time_column = "time"
            time_format = "epoch_s"
        """)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def _answers(url: str) -> bool:
    try:
        return bool(get(url))
    except OSError:
        return False


def infer(url: str, model: str) -> None:
    """One request of zeros, once the model is ready."""
    wait_until(lambda: _answers(f"{url}/v2/models/{model}/ready"), "the model")
    about = json.loads(get(f"{url}/v2/models/{model}"))
    inputs = []
    for tensor in about["inputs"]:
        shape = [1 if size < 0 else size for size in tensor["shape"]]
        count = 1
        for size in shape:
            count *= size
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": [0] * count})
    request = urllib.request.Request(
        f"{url}/v2/models/{model}/infer",
        json.dumps({"inputs": inputs}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def test_the_linter_finds_nothing_on_a_full_page(agent: Agent, tmp_path: Path) -> None:
    url = agent.call("state")["http"]
    infer(url, "rig-fault")
    wait_until(lambda: _is_full(get(f"{url}/metrics")), "every part of the page")
    (tmp_path / "jetson/proc/stat").write_text("cpu  150 0 150 900 0 0 0 0 0 0\n")
    page = get(f"{url}/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=page, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert _is_full(page)
    assert "nv_cpu_utilization 0.5\n" in page, "a mean since the page before"
    assert 'nv_gpu_utilization{gpu_uuid="0"} 0.321\n' in page
    assert "nv_inference_queue_duration_us" not in page
    triton = get(f"{url}/metrics?names=triton")
    assert "# TYPE nv_inference_request_success counter" in triton
    assert 'nv_inference_queue_duration_us{model="rig-fault",version=' in triton


def _is_full(page: str) -> bool:
    parts = (
        'nv_inference_request_success{model="rig-fault",version="1"} 1\n',
        'millhand_inference_queue_seconds_count{model="rig-fault",version="1"} 1\n',
        'millhand_readings_total{asset="press"} 40\n',
        "millhand_telemetry_connected 1\n",
        "nv_gpu_power_limit{",
        "nv_energy_consumption{",
        'http_requests_total{method="POST",path="/v2/models/{model}/infer",status="200"} 1\n',
    )
    return all(part in page for part in parts)


class Prometheus:
    """A server that scrapes one target every second under the job "deepseek"."""

    def __init__(self, folder: Path, target: str) -> None:
        folder.mkdir()
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: deepseek, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.url = f"http://{address}"
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stderr=self._log,
            stdout=self._log,
        )

    def query(self, text: str) -> list[dict[str, Any]]:
        """The instant vector that the query gives now; empty while the server does not answer."""
        try:
            answer = json.loads(get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': text})}"))
        except OSError:
            return []
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


def load(port: int, enough: threading.Event) -> None:
    """Pipelined requests on one connection, as fast as they are answered, until it is enough."""
    request = f"GET {LIVE} HTTP/1.1\r\nHost: node\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        seen = b""
        while not enough.is_set():
            connection.sendall(request * PIPELINED)
            answered = 0
            while answered < PIPELINED:
                seen += connection.recv(1 << 16)
                answered += seen.count(b"HTTP/1.1 200 OK\r\n")
                seen = seen[-16:]  # shorter than what is counted


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_query_over_a_scraped_agent_gives_its_rate(agent: Agent, tmp_path: Path) -> None:
    url = agent.call("state")["http"]
    get(f"{url}{LIVE}")
    prometheus = Prometheus(tmp_path / "prometheus", url.removeprefix("http://"))
    enough = threading.Event()
    loaders = [threading.Thread(target=load, args=(int(url.rpartition(":")[2]), enough)) for _ in range(2)]
    try:
        sampled = f'http_requests_total{{job="deepseek",path="{LIVE}"}}'
        wait_until(lambda: prometheus.query(sampled), "a first sample", 60)
        assert prometheus.query(QUERY) == []
        for loader in loaders:
            loader.start()
        # Over 5 minutes: 30,000 requests, however long they take.
        result = wait_until(lambda: prometheus.query(QUERY), "a rate above 100", 150, every_s=0.5)
    finally:
        enough.set()
        for loader in loaders:
            if loader.ident:
                loader.join(30)
        prometheus.stop()
    (series,) = result
    assert series["metric"]["job"] == "deepseek"
    assert (series["metric"]["method"], series["metric"]["path"], series["metric"]["status"]) == ("GET", LIVE, "200")
    assert float(series["value"][1]) > 100
