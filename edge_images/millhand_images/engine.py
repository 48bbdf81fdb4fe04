"""Builds the images and runs them where no engine's daemon is: buildah and podman, as root, with a store of their own.

An image's base comes from a registry. Here Ubuntu 24.04 of Ubuntu's own archive stands in for it (debootstrap): what
the CUDA and TensorRT bases are made of, without CUDA and TensorRT. For arm64 it is Debian 12, with its Python 3.11:
Ubuntu keeps arm64 on a server of its own, which fewer networks let through.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from millhand.errors import MillhandError

ROOT = Path(__file__).parents[2]
PROGRAMS = ("buildah", "podman", "crun", "debootstrap")
KEYRING = Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg")
BASE = "localhost/millhand-base"
STAND_INS = {
    # gutsy: debootstrap has one script for every Ubuntu since; an older one does not know Noble by its name.
    "amd64": (
        "noble",
        (f"--keyring={KEYRING}", "--components=main,universe"),
        ("http://archive.ubuntu.com/ubuntu", "gutsy"),
    ),
    "arm64": ("bookworm", (), ("http://deb.debian.org/debian",)),
}
"""Architecture -> what debootstrap is told: the suite, options, where it comes from."""
OLD_CGROUPS = Path("/sys/fs/cgroup/unified")
ALONE = 'umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
"""crun refuses a machine with both kinds of control groups: in a mount namespace of its own it sees the new kind."""


class EngineError(MillhandError):
    """An image could not be built or run."""

    code = "engine"


def missing() -> str:
    """What keeps images from being built here, with the remedy; empty where nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "images are built as root"
    if absent:
        return f"{', '.join(absent)} not here (apt-get install {' '.join(absent)})"
    return "" if KEYRING.exists() else f"'{KEYRING}' is not here (apt-get install ubuntu-archive-keyring)"


class Engine:
    """Images and containers whose files all lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = ["--root", str(folder / "store"), "--runroot", str(folder / "run")]

    def base(self, arch: str = "amd64") -> str:
        """The stand-in for an image's base, by its digest; made where it is not there. Raises EngineError."""
        suite, options, source = STAND_INS[arch]
        image = f"{BASE}:{suite}"
        if not self._lists(image):
            tree = self._folder / suite
            shutil.rmtree(tree, ignore_errors=True)
            _call(["debootstrap", "--variant=minbase", f"--arch={arch}", *options, suite, str(tree), *source])
            self._take_over_certificates(tree)
            archive = self._folder / "base.tar"
            _call(["tar", "-C", str(tree), "-cf", str(archive), "."])
            self._podman("import", "--arch", arch, str(archive), image)
            archive.unlink()
            shutil.rmtree(tree)
        return f"{BASE}@{self.inspect(image)['Digest']}"

    def build(self, dockerfile: Path, arguments: Mapping[str, str], tag: str, volumes: Sequence[str] = ()) -> str:
        """Build an image of the project's folder, layers cached; return what was printed. Raises EngineError.

        volumes: what the steps see beside the context, as `here:there:ro`; of it the image holds an empty name at most.
        """
        given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        given += [f"--volume={volume}" for volume in volumes]
        options = ["--layers", "--isolation", "chroot", "--format", "docker", "--network", "host"]
        command = ["buildah", *self._store, "bud", *options, *given, "--tag", tag, "--file", str(dockerfile)]
        return _call([*command, str(ROOT)])

    def inspect(self, image: str) -> dict[str, Any]:
        """What the engine knows of an image."""
        found: dict[str, Any] = json.loads(self._podman("image", "inspect", image))[0]
        return found

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """The image's files, as a folder."""
        path = self._podman("image", "mount", image).strip()
        try:
            yield Path(path)
        finally:
            self._podman("image", "unmount", image)

    def run(self, image: str, options: Sequence[str] = (), command: Sequence[str] = ()) -> str:
        """Start a container in the background; return its id. Raises EngineError.

        Its root is read-only, it has no capability and no network but loopback, and nothing is writable but the two
        tmpfs and the volume that the image declares.
        """
        files = str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        fixed = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
        # podman 4 does not know a tmpfs' uid.
        fixed += ["--tmpfs=/tmp", "--tmpfs=/run/millhand:mode=1777", "--network=none"]
        # Without these podman asks for more than a root with few capabilities may give.
        fixed += ["--cgroups=disabled", f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=1024:1024"]
        said = self._podman("run", "--detach", "--no-healthcheck", *fixed, *options, image, *command)
        return said.split()[-1]  # a warning about another architecture comes first

    def execute(self, container: str, command: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program inside, as the container's user."""
        words = self._command("exec", "--interactive", container, *command)
        return subprocess.run(words, capture_output=True, text=True, input=stdin, timeout=600, check=False)

    def state(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container's state."""
        found: dict[str, Any] = json.loads(self._podman("inspect", container))[0]["State"]
        return found

    def logs(self, container: str) -> str:
        done = subprocess.run(self._command("logs", container), capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def signal(self, container: str, name: str) -> None:
        self._podman("kill", f"--signal={name}", container)

    def remove(self, container: str) -> None:
        """End a container, and delete it with its volumes."""
        self._podman("rm", "--force", "--volumes", "--time=0", container)

    def _lists(self, image: str) -> bool:
        return not subprocess.run(self._command("image", "exists", image), check=False).returncode

    def _take_over_certificates(self, tree: Path) -> None:
        """A package index behind a proxy of the site: pip inside trusts what this machine's pip trusts."""
        trusted = os.environ.get("PIP_CERT")
        if trusted:
            shutil.copy(trusted, tree / "etc/pip-certificates.crt")
            (tree / "etc/pip.conf").write_text("[global]\ncert = /etc/pip-certificates.crt\n", encoding="utf-8")

    def _command(self, *words: str) -> list[str]:
        alone = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ALONE, "sh"]
        quiet = ["podman", *self._store, "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        # A mount for others to see must stay in the machine's own namespace.
        own_view = OLD_CGROUPS.exists() and words[0] in ("run", "exec", "kill", "rm")
        return [*(alone if own_view else ()), *quiet, *words]

    def _podman(self, *words: str) -> str:
        return _call(self._command(*words))


def _call(command: Sequence[str]) -> str:
    """Run to the end, return stdout. Raises EngineError with the end of what was said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise EngineError(f"'{' '.join(command)}' ended with {done.returncode}:\n{said}")
    return done.stdout
