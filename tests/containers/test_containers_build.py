"""The Dockerfiles built step by step by a real engine, and their images run: read-only, no rights, no network.

`make test-images` runs it. The bases stand in for those of a registry (see millhand_images.engine). Jetson's file is
built twice: of wheels for this machine, and as it is for a board, every step under emulation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from dressing_kit import A30, ORIN_CORE, dress

import millhand_plugins.rig
from millhand import __version__
from millhand.testing import wait_until
from millhand_images import engine
from millhand_images.lock import canonical
from millhand_images.process import pip
from millhand_images.target import Target, not_emulated

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build/images"
DATA = os.environ.get("MILLHAND_DATA")
FEATURES = ",".join(map(str, range(44))) + "\n"
MILLHAND = "/opt/millhand/bin/millhand"
PYTHON = "/opt/millhand/bin/python"
RIGHTS = "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status"
ORT = "onnxruntime-gpu==1.31.1"


@dataclass(frozen=True)
class Built:
    """A Dockerfile with its arguments, and what its image must hold."""

    dockerfile: str
    arguments: dict[str, str]
    onnxruntime: str
    arch: str = "amd64"
    distribution: str = "ubuntu"


IMAGES = {
    "x86-cpu": Built("Dockerfile.x86", {"VARIANT": "cpu"}, "onnxruntime"),
    "x86-gpu": Built("Dockerfile.x86", {"VARIANT": "gpu"}, "onnxruntime-gpu"),
    "jetson-on-amd64": Built("Dockerfile.jetson", {"LOCK": "amd64-python3.12"}, "onnxruntime"),
    # An index with code for Orin is not here: a folder with the wheel of PyPI stands in for it.
    "jetson-arm64": Built(
        "Dockerfile.jetson",
        {"LOCK": "arm64-python3.11", "ORT_INDEX_URL": "file:///index", "ORT_REQUIREMENT": ORT},
        "onnxruntime-gpu",
        "arm64",
        "debian",
    ),
}

pytestmark = [
    pytest.mark.images,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(engine.missing()), reason=engine.missing()),
]

RECORDED = pytest.mark.skipif(
    not DATA or shutil.which("gcc") is None,
    reason="MILLHAND_DATA does not name the folder of recordings of hardware, or gcc is not installed",
)


@pytest.fixture(scope="module")
def machine():
    return engine.Engine(STORE)


@pytest.fixture(scope="module", params=IMAGES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def built(name):
    found = IMAGES[name]
    if reason := not_emulated(found.arch):
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def image(name, built, machine):
    """The image of a Dockerfile; what its steps said is printed."""
    tag = f"localhost/millhand-{name}:test"
    given = {**built.arguments, "VERSION": __version__, "BASE_IMAGE": machine.base(built.arch)}
    volumes = index_of_wheels() if built.arch == "arm64" else ()
    print(machine.build(ROOT / built.dockerfile, given, tag, volumes=volumes)[-3000:])
    return tag


def index_of_wheels():
    """The board's wheels fetched by this machine's own pip, as a package index in a folder (PEP 503).

    An emulated pip is too slow for a server's patience, and compiles no bytecode here: that alone would take an hour.
    """
    target = Target("arm64", "3.11", "cpu")
    wheels, index, config = STORE / "wheels", STORE / "index", STORE / "pip.conf"
    locks = [["--require-hashes", "-r", replace(target, kind=kind).lock_path] for kind in ("cpu", "tools")]
    for wanted in (*locks, [ORT]):
        pip(["download", "--quiet", "--no-deps", "--dest", wheels, *wanted, *target.pip_options()])
    shutil.rmtree(index, ignore_errors=True)
    for wheel in wheels.iterdir():
        folder = index / canonical(wheel.name.partition("-")[0])
        folder.mkdir(parents=True, exist_ok=True)
        os.link(wheel, folder / wheel.name)
        with (folder / "index.html").open("a") as page:
            page.write(f'<a href="{wheel.name}">{wheel.name}</a>\n')
    config.write_text("[global]\nindex-url = file:///index\n[install]\nno-compile = true\n")
    return [f"{index}:/index:ro", f"{config}:/etc/pip.conf:ro"]


def plants_model(folder, name):
    """A model of the plant's own in a folder of models."""
    shutil.copytree(Path(millhand_plugins.rig.__file__).parent / "models/rig-fault", folder / name)
    manifest = folder / name / "model.toml"
    manifest.write_text(manifest.read_text().replace('name = "rig-fault"', f'name = "{name}"'))


@pytest.fixture
def cores(built, tmp_path):
    """ONNX Runtime reads the CPU's description at its import, and dies of this machine's on an emulated board."""
    if built.arch == "amd64":
        return []
    path = tmp_path / "cpuinfo"
    path.write_text("".join(ORIN_CORE.format(number=number) for number in range(os.cpu_count() or 1)))
    return [f"--volume={path}:/proc/cpuinfo:ro"]


@pytest.fixture
def container(machine, image, cores, tmp_path):
    """A running agent with a model of the plant's own, mounted where MODEL_PATH says."""
    plants_model(tmp_path / "models", "plant-fault")
    container = machine.run(
        image,
        [
            *cores,
            f"--volume={tmp_path / 'models'}:/models:ro",
            "--env=MILLHAND_PLUGINS__RIG={}",
            "--env=MILLHAND_NODE__ID=node-1",
            "--env=MILLHAND_LOG__FORMAT=json",
        ],
    )
    yield container
    machine.remove(container)


def said(machine, container, *words):
    """What a command of millhand's says, as JSON; None while it fails."""
    done = machine.execute(container, [MILLHAND, "--json", *words])
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout else None


def predicted(machine, container, model):
    """The model's answer to a row; None while there is none."""
    done = machine.execute(container, [MILLHAND, "--json", "predict", model, "--format", "csv"], stdin=FEATURES)
    return None if done.returncode else json.loads(done.stdout)["predictions"]


@pytest.mark.parametrize("dockerfile", sorted({each.dockerfile for each in IMAGES.values()}))
@pytest.mark.parametrize("given", [{}, {"BASE_IMAGE": "tag"}], ids=["none", "a tag"])
def test_a_base_without_a_digest_ends_the_build_with_the_command_that_finds_one(machine, dockerfile, given):
    machine.base()
    given = {"BASE_IMAGE": f"{engine.BASE}:{engine.STAND_INS['amd64'][0]}"} if given else {}
    with pytest.raises(engine.EngineError, match="docker buildx imagetools inspect"):
        machine.build(ROOT / dockerfile, given, "localhost/never:test")


def test_the_image_says_what_it_is(machine, built, image):
    found = machine.inspect(image)
    config, labels = found["Config"], found["Config"]["Labels"]
    assert found["Architecture"] == built.arch
    assert labels["org.opencontainers.image.version"] == __version__
    assert "@sha256:" in labels["org.opencontainers.image.base.name"]
    assert config["User"] == "10001:10001" and "/var/lib/millhand" in config["Volumes"]
    with machine.mounted(image) as root:
        bill = json.loads((root / "usr/share/doc/millhand/sbom.cdx.json").read_text())
        urls = {part.get("purl", "") for part in bill["components"]}
        assert any(url.startswith(f"pkg:deb/{built.distribution}/tini@") for url in urls)
        assert [url for url in urls if re.match(f"pkg:pypi/{built.onnxruntime}@", url)]
        names = {path.name for path in root.glob("opt/millhand/lib/python3*/site-packages/*")}
        assert {"millhand", "millhand_hub", "millhand_plugins", "millhand_profiles"} <= names
        assert not (root / "src").exists() and not (root / "opt/tools").exists(), "the build's parts stay behind"
        assert not [
            path for path in root.rglob("*") if path.is_file() and path.stat().st_mode & 0o6000 and "opt" in path.parts
        ]


def test_it_serves_read_only_as_its_user_and_ends_on_sigterm(machine, image, container):
    health = machine.inspect(image)["Healthcheck"]["Test"]
    assert health[0] == "CMD"
    wait_until(lambda: not machine.execute(container, health[1:]).returncode, "a healthy agent", 600, every_s=1)
    who = machine.execute(
        container, ["sh", "-c", f"id -u; cat /proc/1/comm; {RIGHTS}; touch /opt/x /x /etc/x 2>&1; pwd"]
    ).stdout
    assert who.splitlines()[:5] == [
        "10001",
        "tini",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
    ]
    assert who.count("Read-only file system") == 3
    assert who.splitlines()[-1] == "/var/lib/millhand"

    wait_until(lambda: predicted(machine, container, "plant-fault"), "the plant's own model", 600, every_s=1)
    machine.signal(container, "SIGTERM")
    wait_until(lambda: machine.state(container)["Status"] == "exited", "the container's end", 120, every_s=0.5)
    assert machine.state(container)["ExitCode"] == 0, machine.logs(container)
    lines = [json.loads(line) for line in machine.logs(container).splitlines() if line.startswith("{")]
    assert lines and not [line for line in lines if line["level"] == "error"], lines


@pytest.mark.parametrize("name", ["x86-gpu"], indirect=True)
def test_a_gpus_image_serves_on_the_cpu_where_no_gpu_is_and_says_so(machine, container):
    wait_until(lambda: predicted(machine, container, "plant-fault"), "a prediction", 600, every_s=1)
    found = machine.execute(container, [MILLHAND, "check"])
    print(found.stdout)
    assert found.returncode == 3 and "no GPU" in found.stdout
    hardware = said(machine, container, "hw", "show")
    assert (hardware["accelerators"], hardware["visible_devices"]) == ([], None)
    assert [worker["accelerator"] for worker in said(machine, container, "profile", "match")["workers"]] == ["cpu"]


@RECORDED
@pytest.mark.parametrize("name", ["x86-cpu"], indirect=True)
def test_model_path_and_cuda_visible_devices_mean_what_they_mean_elsewhere(machine, image, tmp_path):
    """Two folders of models; of a recorded A30 one slice. Its driver's library comes in as NVIDIA's runtime does it."""
    dress(A30, tmp_path / "node", Path(DATA) / "hardware")
    library = "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
    names = (Path(DATA) / "hardware/nvidia/a30_mig_L_three_instances.txt").read_text()
    visible = re.findall(r"\(UUID: (MIG-\S+)\)", names)[1]
    options = [f"--volume={tmp_path / 'node' / library}:/{library}:ro", "--env=MILLHAND_PLUGINS__RIG={}"]
    for name in ("first", "second"):
        plants_model(tmp_path / name, f"{name}-fault")
        options.append(f"--volume={tmp_path / name}:/{name}:ro")
    options += ["--env=MODEL_PATH=/first:/second", f"--env=CUDA_VISIBLE_DEVICES={visible}"]
    container = machine.run(image, options)
    try:
        for name in ("first-fault", "second-fault"):
            wait_until(lambda name=name: predicted(machine, container, name), f"an answer of '{name}'", 300, every_s=1)
        hardware = said(machine, container, "hw", "show")
        assert (hardware["driver"], hardware["virtualisation"]) == (A30.driver, "podman")
        assert len(hardware["accelerators"][0]["mig"]) == 3 and hardware["visible_devices"] == [visible]
        tests = wait_until(lambda: said(machine, container)["self_test"], "the agent's own view", 300, every_s=1)
        assert {test["accelerator"] for test in tests} == {visible}
        workers = said(machine, container, "profile", "match")["workers"]
        assert [worker["accelerator"] for worker in workers] == [visible]
    finally:
        machine.remove(container)


@RECORDED
@pytest.mark.parametrize("name", ["x86-cpu"], indirect=True)
def test_a_device_that_is_none_ends_the_container_with_what_there_is(machine, image, tmp_path):
    dress(A30, tmp_path, Path(DATA) / "hardware")
    library = "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
    container = machine.run(image, [f"--volume={tmp_path / library}:/{library}:ro", "--env=CUDA_VISIBLE_DEVICES=7"])
    try:
        wait_until(lambda: machine.state(container)["Status"] == "exited", "the container's end", 120, every_s=0.5)
        assert machine.state(container)["ExitCode"] != 0
        assert "CUDA_VISIBLE_DEVICES has '7', which names no GPU of this node" in " ".join(
            machine.logs(container).split()
        )
    finally:
        machine.remove(container)


def test_onnxruntime_offers_what_the_wheel_is_for(built, machine, image, cores):
    """CUDA is in the list of a GPU's wheel wherever it runs; nothing here can use it."""
    code = "import json, onnxruntime as ort; print(json.dumps([ort.__version__, *ort.get_available_providers()]))"
    container = machine.run(image, [*cores, f"--entrypoint={PYTHON}"], ["-c", "import time; time.sleep(3000)"])
    try:
        done = machine.execute(container, [PYTHON, "-c", code])
        print(done.stdout)
        offered = json.loads(done.stdout)
        assert ("CUDAExecutionProvider" in offered) is (built.onnxruntime == "onnxruntime-gpu"), offered
        assert "CPUExecutionProvider" in offered
        path = machine.execute(container, [PYTHON, "-c", "import json, sys; print(json.dumps(sys.path))"])
        own, *others = [each for each in json.loads(path.stdout) if each.endswith("-packages")]
        assert own.startswith("/opt/millhand/")
        assert bool(others) is (built.dockerfile == "Dockerfile.jetson"), "the base's TensorRT lies in its own folders"
        done = machine.execute(container, [MILLHAND, "health"])
        assert done.returncode == 1 and "no daemon answers" in done.stderr
    finally:
        machine.remove(container)
