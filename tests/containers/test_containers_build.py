"""The Dockerfiles built step by step by a real engine, and their images run: read-only, no rights, no network.

`make test-images` runs it. The base is Ubuntu 24.04 (see millhand_images.engine), the wheels are those without a GPU,
for this machine's architecture.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import millhand_plugins.rig
from millhand import __version__
from millhand.testing import wait_until
from millhand_images import engine

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build/images"
ARGUMENTS = {
    "Dockerfile.x86": {"VARIANT": "cpu", "VERSION": __version__},
    "Dockerfile.jetson": {"LOCK": "amd64-python3.12", "VERSION": __version__},
}
FEATURES = ",".join(map(str, range(44))) + "\n"
MILLHAND = "/opt/millhand/bin/millhand"

pytestmark = [
    pytest.mark.images,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(engine.missing()), reason=engine.missing()),
]


@pytest.fixture(scope="module")
def machine():
    return engine.Engine(STORE)


@pytest.fixture(scope="module", params=ARGUMENTS)
def image(request, machine):
    """The image of a Dockerfile."""
    tag = f"localhost/{request.param.lower()}:test"
    base = machine.base()
    print(machine.build(ROOT / request.param, {**ARGUMENTS[request.param], "BASE_IMAGE": base}, tag)[-3000:])
    return tag


@pytest.fixture
def container(machine, image, tmp_path):
    """A running agent with a model of the plant's own, mounted where MODEL_PATH says."""
    shutil.copytree(Path(millhand_plugins.rig.__file__).parent / "models/rig-fault", tmp_path / "models/plant-fault")
    manifest = tmp_path / "models/plant-fault/model.toml"
    manifest.write_text(manifest.read_text().replace('name = "rig-fault"', 'name = "plant-fault"'))
    container = machine.run(
        image,
        [
            f"--volume={tmp_path / 'models'}:/models:ro",
            "--env=MILLHAND_PLUGINS__RIG={}",
            "--env=MILLHAND_NODE__ID=node-1",
            "--env=MILLHAND_LOG__FORMAT=json",
        ],
    )
    yield container
    machine.remove(container)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("given", [{}, {"BASE_IMAGE": "tag"}], ids=["none", "a tag"])
def test_a_base_without_a_digest_ends_the_build_with_the_command_that_finds_one(machine, name, given):
    machine.base()
    given = {"BASE_IMAGE": f"{engine.BASE}:{engine.SUITE}"} if given else {}
    with pytest.raises(engine.EngineError, match="docker buildx imagetools inspect"):
        machine.build(ROOT / name, given, "localhost/never:test")


def test_the_image_says_what_it_is(machine, image):
    config = machine.inspect(image)["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert "@sha256:" in labels["org.opencontainers.image.base.name"]
    assert config["User"] == "10001:10001" and "/var/lib/millhand" in config["Volumes"]
    with machine.mounted(image) as root:
        bill = json.loads((root / "usr/share/doc/millhand/sbom.cdx.json").read_text())
        urls = {part.get("purl", "") for part in bill["components"]}
        assert any(url.startswith("pkg:deb/ubuntu/tini@") for url in urls)
        assert any(url.startswith("pkg:pypi/onnxruntime@") for url in urls)
        names = {path.name for path in root.glob("opt/millhand/lib/python3*/site-packages/*")}
        assert {"millhand", "millhand_hub", "millhand_plugins", "millhand_profiles"} <= names
        assert not (root / "src").exists() and not (root / "opt/tools").exists(), "the build's parts stay behind"
        assert not [
            path for path in root.rglob("*") if path.is_file() and path.stat().st_mode & 0o6000 and "opt" in path.parts
        ]


def test_it_serves_read_only_as_its_user_and_ends_on_sigterm(machine, image, container):
    health = machine.inspect(image)["Healthcheck"]["Test"]
    assert health[0] == "CMD"
    wait_until(lambda: not machine.execute(container, health[1:]).returncode, "a healthy agent", 180, every_s=1)
    who = machine.execute(container, ["sh", "-c", "id -u; cat /proc/1/comm; touch /opt/x /x /etc/x 2>&1; pwd"]).stdout
    assert who.splitlines()[:2] == ["10001", "tini"] and who.count("Read-only file system") == 3
    assert who.splitlines()[-1] == "/var/lib/millhand"

    def served():
        listed = json.loads(machine.execute(container, [MILLHAND, "model", "list", "--json"]).stdout or "[]")
        return "plant-fault" in json.dumps(listed) and not predict().returncode

    def predict():
        words = [MILLHAND, "--json", "predict", "plant-fault", "--format", "csv"]
        return machine.execute(container, words, stdin=FEATURES)

    wait_until(served, "the plant's own model", 180, every_s=1)
    assert "logits" in predict().stdout
    machine.signal(container, "SIGTERM")
    wait_until(lambda: machine.state(container)["Status"] == "exited", "the container's end", 60, every_s=0.5)
    assert machine.state(container)["ExitCode"] == 0, machine.logs(container)
    lines = [json.loads(line) for line in machine.logs(container).splitlines() if line.startswith("{")]
    assert lines and not [line for line in lines if line["level"] == "error"], lines


def test_the_health_check_fails_where_no_agent_answers(machine, image):
    container = machine.run(image, ["--entrypoint=/usr/bin/sleep"], ["300"])
    try:
        done = machine.execute(container, [MILLHAND, "health"])
        assert done.returncode == 1 and "no daemon answers" in done.stderr
    finally:
        machine.remove(container)
