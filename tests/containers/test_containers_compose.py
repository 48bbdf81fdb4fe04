"""The compose stack: its schema, what it lets a container do, and configurations that the real programs read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from millhand import node_metrics
from millhand.metrics import Registry
from millhand.serving import candidate_metrics, front_metrics, worker_metrics
from millhand.serving.openai import metrics as gateway_metrics
from millhand.telemetry.broker import nats_server
from millhand_hub.settings import load_settings

STACK = Path(__file__).parents[2] / "edge_images/compose"
FILES = ("compose.yaml", "compose.gpu.yaml")
SERVICES = yaml.safe_load((STACK / "compose.yaml").read_text())["services"]
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
MODULES = (node_metrics, candidate_metrics, worker_metrics, front_metrics, gateway_metrics)
REGISTRIES = {registry for module in MODULES for registry in vars(module).values() if isinstance(registry, Registry)}
FAMILIES = {name: family for registry in REGISTRIES for name, family in registry._families.items()}
OTHERS = {"up": ("job", "instance")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A copy of the stack after prepare.sh."""
    folder = tmp_path_factory.mktemp("site") / "compose"
    shutil.copytree(STACK, folder, ignore=shutil.ignore_patterns("secrets", "models", ".env"))
    subprocess.run(["sh", folder / "prepare.sh"], check=True)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_the_compose_specification_takes_it(name):
    """The specification's own schema, as check-jsonschema carries it."""
    carried = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(yaml.safe_load((STACK / name).read_text()), json.loads(carried.read_text()))


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_may_do_no_more_than_it_must(name):
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["logging"]["options"]["max-size"]
    assert name == "agent" or service["healthcheck"]["test"][0] == "CMD", "the agent's is in its image"
    for port in service.get("ports", ()):
        assert re.match(r"127\.0\.0\.1:|\$\{\w+_BIND:-127\.0\.0\.1\}:", port), port
    for volume in service["volumes"]:
        source, _, target = volume.partition(":")
        assert target.endswith(":ro") or f"{source}" in _named_volumes(), volume
        assert "docker.sock" not in volume
    assert not [
        value for key, value in service.get("environment", {}).items() if "PASSWORD" in key and "FILE" not in key
    ]


def _named_volumes():
    return yaml.safe_load((STACK / "compose.yaml").read_text())["volumes"]


def test_images_are_named_by_digest_and_the_example_says_where_from():
    example = (STACK / ".env.example").read_text()
    named = dict(re.findall(r"^(\w+)=(.*)$", example, re.M))
    used = set(re.findall(r"\$\{(\w+)", (STACK / "compose.yaml").read_text()))
    assert used == set(named)
    for name, service in SERVICES.items():
        found = re.fullmatch(r"(?:(\S+)@)?\$\{(\w+):\?.+\}", service["image"])
        assert found, name
        if found[1]:
            assert f"docker buildx imagetools inspect {found[1]}:" in example and named[found[2]] == ""


def test_the_agents_configuration_is_valid(prepared):
    command = [sys.executable, "-m", "millhand", "--config", prepared / "millhand.toml", "config", "validate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_hubs_configuration_is_valid():
    settings = load_settings(STACK / "hub.toml", {})
    assert settings.username == "hub" and str(settings.password_file) == "/run/secrets/hub-password"


def test_secrets_are_made_once_and_stay(prepared):
    folder = prepared / "secrets"
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(before) == {"agent-password", "hub-password", "grafana-password", "nats-users.conf"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(re.fullmatch("[0-9a-f]{48}", before[name]) for name in before if name.endswith("password"))
    assert before["agent-password"] in before["nats-users.conf"] and "@" not in before["nats-users.conf"]
    subprocess.run(["sh", prepared / "prepare.sh"], check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_nats_takes_its_configuration(prepared, tmp_path):
    for source in (prepared / "nats/nats.conf", prepared / "secrets/nats-users.conf"):
        shutil.copy(source, tmp_path / source.name.replace("nats-users", "users"))
    done = subprocess.run(
        [nats_server(), "-t", "-c", tmp_path / "nats.conf"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)")
@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", STACK / "prometheus/prometheus.yml"),
        ("test", "rules", Path(__file__).with_name("alerts.yml")),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_promtool_finds_nothing(words, tmp_path):
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, cwd=STACK / "prometheus", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def queries():
    """(where, PromQL) of every rule and every panel."""
    rules = yaml.safe_load((STACK / "prometheus/alerts.yml").read_text())
    for group in rules["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
    board = json.loads((STACK / "grafana/dashboards/millhand.json").read_text())
    for panel in board["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))


def selectors(query):
    """(metric, the labels that it is asked for) of a query, without reading the grammar: names that no call follows."""
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", query)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    for name, labels in re.findall(
        r"([a-zA-Z_:][\w:]*)(?!\w)\s*(?:\{([^}]*)\})?(?!\s*\()", re.sub(r'"[^"]*"', '""', bare)
    ):
        if name not in WORDS and not re.search(rf"\b{name}\s*\(", bare):
            yield name, re.findall(r"(\w+)\s*[=!~]", labels)


@pytest.mark.parametrize(
    ("where", "query"), [pytest.param(*each, id=f"{n}-{each[0]}") for n, each in enumerate(queries())]
)
def test_a_query_names_what_millhand_shows(where, query):
    found = list(selectors(query))
    assert found, query
    for name, labels in found:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        family = FAMILIES.get(name) or FAMILIES.get(base)
        known = OTHERS.get(name, (*(family.labels if family else ()), "instance", "job"))
        assert name in OTHERS or family is not None, f"{where}: no metric '{name}'"
        assert family is None or family.plain_kind, f"{where}: '{name}' is not on the page that is scraped"
        assert set(labels) <= set(known), f"{where}: '{name}' has no label {set(labels) - set(known)}"


def test_every_rule_speaks_only_of_labels_it_has():
    rules = yaml.safe_load((STACK / "prometheus/alerts.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        said = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) - {"instance", "job"}
        had = {label for name, _ in selectors(rule["expr"]) if name in FAMILIES for label in FAMILIES[name].labels}
        assert said <= had, rule["alert"]


def test_the_dashboards_source_is_the_one_that_is_provisioned():
    sources = yaml.safe_load((STACK / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    board = (STACK / "grafana/dashboards/millhand.json").read_text()
    assert set(re.findall(r'"uid": "(\w+)"\s*\n?\s*\}', board)) == {source["uid"] for source in sources}
    assert sources[0]["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
