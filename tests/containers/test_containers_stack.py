"""The stack's own configurations in its own programs, on loopback instead of in containers.

Only addresses and folders are exchanged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from test_containers_compose import STACK, queries, selectors

from millhand.telemetry.broker import nats_server
from millhand.testing import wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)"
    ),
]

WITHOUT = {
    "a GPU": {
        "millhand_gpu_temperature_celsius",
        "nv_gpu_memory_used_bytes",
        "nv_gpu_power_usage",
        "nv_gpu_utilization",
    },
    "a sensor of the machine's own heat": {"millhand_temperature_celsius"},
    "an asset with a model": {"millhand_prediction_latency_seconds_bucket"},
    "a language model": {
        "millhand_guard_requests_total",
        "millhand_language_server_restarts_total",
        "millhand_language_time_to_first_token_seconds_bucket",
    },
    "a candidate": {"millhand_candidate_serves", "millhand_rebuilds"},
    "something that failed, or a store that fills up": {
        "millhand_alerts_raised_total",
        "millhand_sink_given_up_total",
        "millhand_store_dropped_rows_total",
        "millhand_store_until_full_seconds",
    },
}
"""What the running stack may lack, and the families that then have no series; which they are is proved by the text."""
MAY_BE_SILENT = set().union(*WITHOUT.values())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replace(path, *exchanges):
    """Exchange texts in a file; each must be there."""
    text = path.read_text()
    for old, new in exchanges:
        assert old in text, f"{path.name}: {old}"
        text = text.replace(old, new)
    path.write_text(text)


@contextmanager
def program(log, *command, **environment):
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=file, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


class Stack:
    """The folder of a running stack, and where its parts answer."""

    def __init__(self, folder):
        self.folder = folder
        self.mqtt, self.http, self.prometheus = free_port(), free_port(), free_port()
        self.run_dir = tempfile.mkdtemp(prefix="mh-", dir="/tmp")

    def password(self, user):
        return (self.folder / "secrets" / f"{user}-password").read_text()

    def move(self):
        """From the network of the containers to loopback."""
        secrets, broker = str(self.folder / "secrets"), f"127.0.0.1:{self.mqtt}"
        shutil.copy(self.folder / "secrets/nats-users.conf", self.folder / "nats/users.conf")
        replace(
            self.folder / "nats/nats.conf",
            ("0.0.0.0", "127.0.0.1"),
            ("1883", str(self.mqtt)),
            ("4222", "-1"),
            ("127.0.0.1:8222", f"127.0.0.1:{free_port()}"),
            ("/data", str(self.folder / "nats-data")),
        )
        for name in ("millhand.toml", "hub.toml"):
            replace(self.folder / name, ("nats:1883", broker), ("/run/secrets", secrets))
        replace(
            self.folder / "prometheus/prometheus.yml",
            ("agent:8080", f"127.0.0.1:{self.http}"),
            ("127.0.0.1:9090", f"127.0.0.1:{self.prometheus}"),
            ("15s", "1s"),
        )

    def programs(self):
        millhand = [sys.executable, "-m", "millhand"]
        data = self.folder / "prometheus-data"
        yield "nats", [nats_server(), "--config", self.folder / "nats/nats.conf"], {}
        yield "hub", [*millhand, "hub", "run"], self.hub_environment()
        yield (
            "agent",
            [*millhand, "--config", self.folder / "millhand.toml", "run"],
            {
                "MILLHAND_NODE__DATA_DIR": str(self.folder / "data"),
                "MILLHAND_NODE__RUN_DIR": self.run_dir,
                "MILLHAND_NODE__ID": "node-1",
                "MILLHAND_HTTP__PORT": str(self.http),
            },
        )
        yield (
            "prometheus",
            [
                "prometheus",
                f"--config.file={self.folder / 'prometheus/prometheus.yml'}",
                f"--storage.tsdb.path={data}",
                f"--web.listen-address=127.0.0.1:{self.prometheus}",
            ],
            {},
        )

    def hub_environment(self):
        return {
            "MILLHAND_HUB_CONFIG": str(self.folder / "hub.toml"),
            "MILLHAND_HUB__DATA_DIR": str(self.folder / "hub-data"),
        }

    def hub(self, *words):
        return subprocess.run(
            [sys.executable, "-m", "millhand", "hub", *words, "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **self.hub_environment()},
            check=False,
        )

    def query(self, text):
        """Prometheus' answer; None while it does not answer."""
        url = f"http://127.0.0.1:{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.loads(answer.read())
        except OSError:
            return None


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack") / "compose"
    shutil.copytree(STACK, folder, ignore=shutil.ignore_patterns("secrets", "models", ".env"))
    subprocess.run(["sh", folder / "prepare.sh"], check=True)
    found = Stack(folder)
    found.move()
    with ExitStack() as running:
        for name, command, environment in found.programs():
            running.enter_context(program(folder / f"{name}.log", *command, **environment))
        yield found
    shutil.rmtree(found.run_dir)


def test_what_the_node_reads_arrives_at_the_hub_and_in_prometheus(stack):
    def arrived():
        nodes = json.loads(stack.hub("nodes").stdout or "[]")
        return [node for node in nodes if node["rows"] > 0]

    (node,) = wait_until(arrived, "rows at the hub", 120, every_s=0.5)
    assert (node["group"], node["node"], node["online"]) == ("plant-a", "node-1", True)
    assert stack.hub("health").returncode == 0

    def scraped():
        answer = stack.query('millhand_readings_total{job="millhand",asset="node"} > 0')
        return answer and answer["data"]["result"]

    assert wait_until(scraped, "the node's readings in Prometheus", 120, every_s=0.5)
    assert wait_until(lambda: stack.query("millhand_telemetry_connected == 1")["data"]["result"], "the broker", 60)


@pytest.fixture
def asked(stack):
    """The stack after its model was asked, and after Prometheus saw that twice: a rate needs two scrapes."""
    rows = {"inputs": [{"name": "features", "shape": [1, 44], "datatype": "FP32", "data": [[1.0] * 44]}]}
    url = f"http://127.0.0.1:{stack.http}/v2/models/rig-fault/infer"
    request = urllib.request.Request(url, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def answered():
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status == 200
        except OSError:
            return False

    def seen():
        found = answered() and stack.query('increase(nv_inference_request_success{model="rig-fault"}[1m]) > 1')
        return found and found["data"]["result"]

    wait_until(seen, "answers of the model in Prometheus", 120, every_s=0.5)
    return stack


def promtool(stack, query):
    words = ["promtool", "query", "instant", f"http://127.0.0.1:{stack.prometheus}", query]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{query}: {done.stderr}"
    return done.stdout.strip()


def test_prometheus_has_what_dashboard_and_rules_name(asked):
    named = {name for _, text in queries() for name, _ in selectors(text)}
    answer = promtool(asked, f'group by (__name__) ({{__name__=~"{"|".join(sorted(named))}"}})')
    shown = set(re.findall(r"^(\w+) =>", answer.replace('{__name__="', "").replace('"}', ""), re.M))
    assert len(named) > 30 and named - shown - MAY_BE_SILENT == set(), answer


def test_promtool_gets_an_answer_to_every_query(asked):
    """As Grafana sends them to Prometheus, its own variables filled in. A query that filters may find nothing."""
    for where, text in queries():
        filled = text.replace("$node", ".*").replace("$__rate_interval", "1m")
        assert "$" not in filled
        answer = promtool(asked, filled)
        print(f"{where}\n  {filled}\n    {answer or '(nothing)'}")
        filters = re.search(r"[<>]|[=!]=\s", text)
        lacks = MAY_BE_SILENT & {name for name, _ in selectors(text)}
        assert answer or filters or lacks, f"{where}: {filled}"


@pytest.mark.parametrize(
    ("user", "topic", "passes"),
    [
        ("agent", "spBv1.0/plant-a/NCMD/node-2", False),
        ("agent", "spBv1.0/STATE/millhand-hub", False),
        ("agent", "spBv1.0/plant-a/NDATA/node-2", True),
        ("hub", "spBv1.0/plant-a/NCMD/node-2", True),
        ("hub", "spBv1.0/plant-a/NDATA/node-2", False),
    ],
)
def test_the_broker_keeps_nodes_and_hub_apart(stack, user, topic, passes):
    """The second message proves that the broker has worked off the first."""
    fence = "spBv1.0/plant-a/NDATA/fence" if user == "agent" else "spBv1.0/plant-a/NCMD/fence"
    heard = []
    listener, speaker = (mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"test-{n}") for n in ("ear", "mouth"))
    listener.username_pw_set("hub", stack.password("hub"))
    speaker.username_pw_set(user, stack.password(user))
    listener.on_message = lambda _, __, message: heard.append((message.topic, message.payload))
    ready = []
    listener.on_subscribe = lambda *_: ready.append(True)
    for client in (listener, speaker):
        client.connect("127.0.0.1", stack.mqtt)
        client.loop_start()
    try:
        listener.subscribe([("spBv1.0/plant-a/#", 0), ("spBv1.0/STATE/#", 0)])
        wait_until(lambda: ready, "the subscription")
        wait_until(speaker.is_connected, "the speaker")
        speaker.publish(topic, b"probe")
        speaker.publish(fence, b"fence")
        wait_until(lambda: (fence, b"fence") in heard, "the second message")
        assert ((topic, b"probe") in heard) is passes
    finally:
        for client in (listener, speaker):
            client.disconnect()
            client.loop_stop()


def test_a_stranger_is_not_let_in(stack):
    refused = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="stranger")
    client.on_connect = lambda _, __, ___, code, ____: refused.append(code.is_failure)
    client.connect("127.0.0.1", stack.mqtt)
    client.loop_start()
    try:
        assert wait_until(lambda: refused, "the broker's answer")[0]
    finally:
        client.disconnect()
        client.loop_stop()
