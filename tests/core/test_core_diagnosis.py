"""`millhand check`: real conditions in a temporary folder, each with its finding and remedy."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millhand.clock import is_synchronised
from millhand.diagnosis import diagnose
from millhand.findings import Finding
from millhand.language.diagnosis import server_finding
from millhand.proof.keys import node_key
from millhand.serving.packages import look, look_into
from millhand_plugins import turbofan

SHIPPED = Path(turbofan.__file__).parent / "models" / "turbofan-rul"
UUIDS = ["GPU-aaaaaaaa-1111-2222-3333-444444444444", "GPU-bbbbbbbb-1111-2222-3333-444444444444"]
XML = """<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>550.54.15</driver_version><cuda_version>12.4</cuda_version>{cards}</nvidia_smi_log>
"""
CARD = """<gpu id="00000000:0{index}:00.0"><product_name>NVIDIA A30</product_name><uuid>{uuid}</uuid>
<mig_mode><current_mig>Disabled</current_mig></mig_mode>
<fb_memory_usage><total>{mib} MiB</total></fb_memory_usage>
<temperature><gpu_temp>{heat} C</gpu_temp></temperature></gpu>"""


class Node:
    """A configuration in a folder of its own."""

    def __init__(self, folder: Path, run_dir: str) -> None:
        self.folder = folder
        self._tables: dict[str, dict[str, Any]] = {
            "node": {"data_dir": str(folder / "data"), "run_dir": run_dir},
            "http": {"enabled": False},
        }
        self._assets = ""

    def set(self, table: str, **values: Any) -> Node:
        self._tables.setdefault(table, {}).update(values)
        return self

    def judged_by(self, model: str) -> Node:
        self._assets += f'[[assets]]\nname = "node"\nadapter = "host"\nmodels = ["{model}"]\n'
        return self

    def recorded(self, heat: int = 41, mib: int = 24576) -> Node:
        """Two A30 cards, as a recording."""
        root = self.folder / "root"
        root.mkdir()
        cards = [CARD.format(index=i, uuid=uuid, heat=heat, mib=mib) for i, uuid in enumerate(UUIDS)]
        (root / "nvidia-smi-q.xml").write_text(XML.format(cards="".join(cards)))
        return self.set("node", hardware_root=str(root))

    def check(self) -> list[Finding]:
        path = self.folder / "millhand.toml"
        lines = []
        for table, values in self._tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        path.write_text("\n".join(lines) + "\n" + self._assets)
        return diagnose(path)

    def only(self, name: str) -> Finding:
        found = [finding for finding in self.check() if finding.name == name]
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as run_dir:
        yield Node(tmp_path, run_dir)


def own_model(folder: Path) -> Path:
    """A copy of a shipped model that no proof covers; returns its root."""
    root = folder / "models"
    shutil.copytree(SHIPPED, root / SHIPPED.name)
    return root


# ---- configuration and folders --------------------------------------------------------------------------------------


def test_a_healthy_node_has_no_error(node: Node) -> None:
    findings = node.set("plugins.turbofan").judged_by("turbofan-rul").check()
    assert not [finding for finding in findings if finding.level == "error"]
    assert {"config", "data_dir", "clock", "profile", "memory", "worker", "daemon"} <= {f.name for f in findings}


@pytest.mark.parametrize(("cards", "says"), [(True, []), (False, ["no GPU is seen: models run on the CPU"])])
def test_a_node_without_a_gpu_says_so(node: Node, cards: bool, says: list[str]) -> None:
    bare = node.folder / "bare"
    bare.mkdir()
    (bare / "nvidia-smi-q.xml").write_text(XML.format(cards=""))
    node = node.recorded() if cards else node.set("node", hardware_root=str(bare))
    assert [finding.message for finding in node.check() if finding.name == "gpu"] == says


def test_a_broken_configuration_is_the_only_finding(node: Node) -> None:
    findings = node.set("node", idd="press").check()
    assert [(finding.name, finding.level) for finding in findings] == [("config", "error")]
    assert "idd" in findings[0].message


def test_a_failing_check_hides_no_other(node: Node) -> None:
    findings = node.set("node", profile="a31").check()
    assert any(finding.level == "error" and "a31" in finding.message for finding in findings)
    assert any(finding.name == "broker" for finding in findings)


def test_a_run_dir_without_room_for_sockets(node: Node) -> None:
    """The longest folder of which the kernel binds every socket, and one that is a byte longer."""
    folder = Path("/tmp") / ("f" * 77)
    assert node.set("node", run_dir=str(folder)).only("config").level == "ok"
    finding = node.set("node", run_dir=f"{folder}f").only("config")
    assert finding.level == "error"
    assert "key 'node.run_dir'" in finding.message
    assert "at most 82 bytes, such as /run/millhand" in finding.message


@pytest.mark.parametrize(("name", "hub", "said"), [("localhost", True, 1), ("press-7", True, 0), ("node", False, 0)])
def test_a_name_that_other_nodes_have_too(name: str, hub: bool, said: int, node: Node) -> None:
    node.set("node", id=name)
    if hub:
        node.set("telemetry", enabled=True, brokers=["mqtt://127.0.0.1:1"])
    found = [finding for finding in node.check() if finding.name == "id"]
    assert [finding.level for finding in found] == ["warning"] * said
    assert all(name in finding.message and "[node] id" in finding.hint for finding in found)


# ---- clock ----------------------------------------------------------------------------------------------------------


def test_the_clock_says_whether_it_is_kept_in_step(node: Node) -> None:
    kept = is_synchronised()
    finding = node.only("clock")
    assert finding.level == ("warning" if kept is False else "ok")
    assert ("nothing keeps it in step" in finding.message) == (kept is False)


# ---- hardware -------------------------------------------------------------------------------------------------------


def test_heat(node: Node) -> None:
    findings = [finding for finding in node.recorded(heat=97).check() if finding.name == "temperature"]
    assert [finding.level for finding in findings] == ["warning"] * 2
    assert "97 C" in findings[0].message
    assert "fans" in findings[0].hint


def test_cool_cards_are_not_mentioned(node: Node) -> None:
    assert not [finding for finding in node.recorded(heat=41).check() if finding.name == "temperature"]


def test_models_beyond_the_memory_budget(node: Node) -> None:
    root = own_model(node.folder)
    with (root / SHIPPED.name / "1" / "model.onnx").open("r+b") as artifact:
        artifact.truncate(3 << 30)  # a hole: it takes no space on the disk
    node.recorded(mib=2048).set("models", paths=[str(root)]).judged_by("turbofan-rul")
    finding = node.only("memory")
    assert finding.level == "error"
    assert UUIDS[0] in finding.message
    assert "3072 MiB" in finding.message


def test_models_without_an_asset_count(node: Node) -> None:
    """A node that only serves holds what its folders have."""
    root = own_model(node.folder)
    with (root / SHIPPED.name / "1" / "model.onnx").open("r+b") as artifact:
        artifact.truncate(4 << 20)
    node.set("models", paths=[str(root)])
    assert "their files take 4 MiB" in node.only("memory").message
    assert node.only("model turbofan-rul").message == "version 1 unproved"
    node.set("models", interpreter=str(bare_interpreter(node.folder)))
    assert any("'onnxruntime'" in finding.message for finding in node.check() if finding.name == "worker")


def test_small_models_take_something(node: Node) -> None:
    node.set("models", paths=[str(own_model(node.folder))])
    size_mib = (SHIPPED / "1" / "model.onnx").stat().st_size / 2**20
    shown = float(node.only("memory").message.rpartition(" take ")[2].removesuffix(" MiB"))
    assert size_mib * 0.9 < shown < size_mib * 1.2


def test_the_budget_is_of_a_visible_card(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.recorded()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert UUIDS[1] in node.only("memory").message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    errors = [finding.message for finding in node.check() if finding.level == "error"]
    assert any("CUDA_VISIBLE_DEVICES has '5'" in message for message in errors)


# ---- models and their workers ---------------------------------------------------------------------------------------


def test_the_state_of_proofs(node: Node) -> None:
    root = own_model(node.folder)
    (root / SHIPPED.name / "1" / "proof.json").unlink(missing_ok=True)
    node.set("models", paths=[str(root)]).judged_by("turbofan-rul")
    finding = node.only("model turbofan-rul")
    assert (finding.level, finding.message) == ("ok", "version 1 unproved")
    finding = node.set("models", require_proof=True).only("model turbofan-rul")
    assert finding.level == "error"
    assert "is unproved" in finding.message


def test_keys_that_cannot_be_read_are_told(node: Node) -> None:
    assert not [finding for finding in node.check() if finding.name == "keys"]
    key = node_key(node.folder / "data").public.id
    assert node.only("keys").message == f"signatures by {key} count"
    finding = node.set("models", trusted_keys=[str(node.folder / "plant.pem")]).only("keys")
    assert finding.level == "error" and "plant.pem' cannot be read" in finding.message and finding.hint


def test_a_model_that_nobody_ships(node: Node) -> None:
    finding = node.judged_by("press-wear").only("asset node")
    assert finding.level == "error"
    assert "[models] paths" in finding.hint


def test_models_to_load_that_nobody_has(node: Node) -> None:
    root = own_model(node.folder)
    finding = node.set("models", paths=[str(root)], load=["turbofan-rull", "*"], pin=["lost"]).only("model lost")
    assert (finding.level, finding.message) == ("error", "model 'lost' is not known")
    finding = node.set("models", load=["turbofan-rull"]).only("model turbofan-rull")
    assert finding.message == "model 'turbofan-rull' is not known; did you mean 'turbofan-rul'?"
    assert finding.hint == "the repository has: turbofan-rul"


def bare_interpreter(folder: Path) -> Path:
    """A Python without any package of ours."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_packages_that_the_workers_interpreter_lacks(node: Node) -> None:
    node.set("plugins.turbofan").judged_by("turbofan-rul")
    node.set("models", interpreter=str(bare_interpreter(node.folder)))
    errors = [finding for finding in node.check() if finding.name == "worker"]
    assert {finding.level for finding in errors} == {"error"}
    missing = {"numpy", "msgspec", "pluggy", "onnxruntime"}
    assert {name for name in missing for finding in errors if f"'{name}'" in finding.message} == missing
    assert all("-m pip install" in finding.hint for finding in errors)


def test_an_interpreter_that_does_not_run(node: Node) -> None:
    finding = node.set("models", interpreter=str(node.folder / "no-python")).only("worker")
    assert finding.level == "error"
    assert "does not run" in finding.message


def installed(folder: Path, name: str, version: str) -> None:
    """What pip leaves behind of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_onnxruntime_and_its_gpu_build_together(node: Node) -> None:
    site = node.folder / "site"
    installed(site, "onnxruntime", "1.22.0")
    installed(site, "onnxruntime-gpu", "1.21.0")
    path = node.folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    finding = node.set("models", interpreter=str(path)).only("worker")
    assert finding.level == "error"
    assert "onnxruntime-gpu 1.21.0" in finding.message
    assert "uninstall both" in finding.hint


def test_one_of_both_in_a_folder_that_stands_first_is_the_one_that_counts(node: Node) -> None:
    """As a bundle lays onnxruntime-gpu before the package's own onnxruntime."""
    first, later = node.folder / "first", node.folder / "later"
    for site, name, version in ((first, "onnxruntime-gpu", "1.21.0"), (later, "onnxruntime", "1.22.0")):
        site.mkdir()
        installed(site, name, version)
    path = node.folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={first}:{later} exec {sys.executable} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    assert look_into(str(path), [])["twins"] == {"onnxruntime-gpu": "1.21.0"}
    assert node.set("models", interpreter=str(path)).only("worker").level == "ok"


def test_looking_imports_nothing() -> None:
    probe = (
        "import sys; from millhand.serving.packages import look; look(['numpy', 'onnxruntime']); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" not in loaded
    assert "onnxruntime" not in loaded
    assert look(["numpy", "no_such_package"])["missing"] == ["no_such_package"]
    assert look_into(sys.executable, ["numpy"]) == look(["numpy"])


# ---- the HTTP port --------------------------------------------------------------------------------------------------


def test_a_port_that_another_program_holds(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finding = node.set("http", enabled=True, port=port).only("http")
        assert finding.level == "error"
        assert f"127.0.0.1:{port}" in finding.message
        assert "[http] port" in finding.hint
    assert node.only("http").level == "ok"


def test_the_gateway_s_port_that_another_program_holds(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finding = node.set("gateway", enabled=True, port=port).only("gateway")
        assert finding.level == "error" and f"127.0.0.1:{port}" in finding.message
        assert "[gateway] port" in finding.hint
    assert node.only("gateway").level == "ok"


def test_the_guards_before_the_language_model(node: Node) -> None:
    node.set("gateway", enabled=True, port=0)
    assert node.only("guards").message == "guard.input, guard.model, guard.output"
    bare = node.set("plugins.guard", enabled=False).only("guards")
    assert bare.level == "warning" and bare.message.startswith("none stands before")


@pytest.mark.parametrize(
    ("states", "level", "words"),
    [
        (["ready", "ready"], "ok", "2 of 2 processes ready"),
        (["ready", "failed"], "warning", "1 of 2 processes ready: it died"),
        (["failed"], "error", "is failed, 0 of 1 processes ready: it died"),
        ([], "warning", "is starting"),
    ],
)
def test_how_the_language_servers_stand(states: list[str], level: str, words: str) -> None:
    state = "ready" if "ready" in states else states[0] if states else "starting"
    reason = "it died" if "failed" in states else ""
    shown = {
        "name": "m", "state": state, "reason": reason, "hint": "", "replicas": [{"state": one} for one in states],
    }  # fmt: skip
    finding = server_finding(shown)
    assert finding.level == level and words in finding.message and finding.hint == "millhand language show"


# ---- what listens ---------------------------------------------------------------------------------------------------


def test_tokens_that_cannot_be_read(node: Node) -> None:
    token = node.folder / "token"
    for table in ("http", "grpc"):
        node.set(table, enabled=True, port=0, admin_token_file=str(token))
        finding = node.only(f"{table} admin_token_file")
        assert finding.level == "error"
        assert finding.message == f"[{table}] admin_token_file = '{token}' cannot be read: No such file or directory"
    token.write_text("\n")
    assert node.only("http admin_token_file").message.endswith("is empty")
    token.write_text("secret\n")
    assert node.only("http admin_token_file").level == "ok"
    node.set("http", enabled=False, admin_token_file="/nowhere")
    assert not [finding for finding in node.check() if finding.name == "http admin_token_file"]


def test_tokens_of_the_gateway(node: Node) -> None:
    path = node.folder / "tokens"
    node.set("gateway", enabled=True, port=0, tokens_file=str(path))
    assert node.only("gateway tokens_file").level == "error"
    path.touch(mode=0o600)
    assert node.only("gateway tokens_file").hint == "millhand gateway token NAME"
    path.write_text(f"ada operator {'0' * 64}\n")
    assert node.only("gateway tokens_file").message == f"'{path}' holds 1 tokens"


def test_orders_that_nothing_would_write_or_make_better(node: Node) -> None:
    assert "orders" not in [finding.name for finding in node.check()]
    node.set("orders", writer="determinstic", reviser="modell").set("pack", name="no-such-field")
    found = [finding for finding in node.check() if finding.name == "orders"]
    assert {(finding.level, bool(finding.hint)) for finding in found} == {("error", True)}
    said = " ".join(finding.message for finding in found)
    for part in ("did you mean 'deterministic'", "did you mean 'model'", "no language model to ask", "no-such-field"):
        assert part in said, part


def test_tracing_without_its_package(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.set("http", enabled=True, port=0).set("tracing", enabled=True)
    assert node.only("tracing").level == "ok"
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    finding = node.only("tracing")
    assert finding.level == "error"
    assert "pip install 'millhand[otel]'" in finding.hint


ENSEMBLE = """name = "twice-read"
description = "turbofan-rul behind a step"
licence = "Apache-2.0"
{inputs}
[[steps]]
model = "turbofan-rul"
inputs = {{ features = "{tensor}" }}
"""


def write_ensemble(root: Path, tensor: str) -> None:
    """An ensemble with the inputs and outputs of the shipped model."""
    tables = (SHIPPED / "model.toml").read_text().partition("[[inputs]]")[2].partition("[window]")[0]
    (root / "twice-read").mkdir(exist_ok=True)
    (root / "twice-read/model.toml").write_text(ENSEMBLE.format(inputs="[[inputs]]" + tables, tensor=tensor))


def test_an_ensemble_counts_with_the_models_of_its_steps(node: Node) -> None:
    root = own_model(node.folder)
    write_ensemble(root, "features")
    node.recorded(mib=2048).set("models", paths=[str(root)]).judged_by("twice-read")
    assert node.only("model twice-read").level == "ok"
    with (root / SHIPPED.name / "1" / "model.onnx").open("r+b") as artifact:
        artifact.truncate(64 << 30)
    assert node.only("memory").level == "error"
    node.set("models", interpreter=str(bare_interpreter(node.folder)))
    assert any("onnxruntime" in finding.message for finding in node.check() if finding.name == "worker")


def test_a_bad_ensemble_names_step_and_tensor(node: Node) -> None:
    root = own_model(node.folder)
    write_ensemble(root, "feature")
    finding = node.set("models", paths=[str(root)]).only("model twice-read")
    assert finding.level == "error"
    assert "model.toml': step 1 (turbofan-rul): 'features' takes tensor 'feature', which no" in finding.message


# ---- backends -------------------------------------------------------------------------------------------------------


def test_each_provider_is_tried_in_a_worker(node: Node) -> None:
    node.set("plugins.turbofan").set("plugins.onnxruntime", providers=["tensorrt", "cpu"]).judged_by("turbofan-rul")
    findings = {finding.name: finding for finding in node.check() if finding.name.startswith("onnxruntime ")}
    assert list(findings) == ["onnxruntime tensorrt", "onnxruntime cpu"]
    assert findings["onnxruntime cpu"].level == "ok" and "works on the CPU" in findings["onnxruntime cpu"].message
    assert findings["onnxruntime tensorrt"].level == "error" and findings["onnxruntime tensorrt"].hint


def test_providers_are_not_tried_without_models_or_packages(node: Node) -> None:
    assert not [one for one in node.check() if one.name.startswith("onnxruntime ")]
    node.set("plugins.turbofan").judged_by("turbofan-rul")
    node.set("models", interpreter=str(bare_interpreter(node.folder)))
    assert not [one for one in node.check() if one.name.startswith("onnxruntime ")]
