"""A chroot of Debian 12 that stands for a node, in memory: dpkg's many fsync would make a disk the slowest part."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 300.0
MODEL = "rig-fault"
ROW = ",".join(map(str, range(1, 45))) + "\n"
"""One input of MODEL."""
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
AS_AGENT = ("setpriv", "--reuid=millhand", "--regid=millhand", "--init-groups")


class Chroot:
    """The node; `enter` stands before every command in it: namespaces, say."""

    def __init__(self, root: Path, enter: tuple[str, ...] = ()) -> None:
        self.root = root
        self.enter = enter

    def command(self, *words: str) -> list[str]:
        return [*self.enter, "chroot", str(self.root), *words]

    def run(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root, to its end."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, env=ENVIRONMENT, check=False, **options
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def lay(self, package: Path) -> str:
        """Copy a package that lies outside into it; returns its path there."""
        shutil.copy(package, self.root / "root")
        return f"/root/{package.name}"

    def install(self, package: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`dpkg -i` of a package that lies outside."""
        return self.run("dpkg", "-i", self.lay(package), check=check)

    def state(self) -> str:
        """dpkg's word of the package; empty where it does not know it."""
        return self.run("dpkg-query", "-W", "-f", "${Status}", "millhand", check=False).stdout

    def version(self) -> str:
        """What the installed command says of itself; empty where it does not start."""
        said = self.run("sh", "-c", "millhand --version", check=False)
        return said.stdout.split()[-1] if said.returncode == 0 else ""

    def set_up(self) -> None:
        """A node that watches itself, and may serve MODEL; with all listeners on free ports."""
        answers = self.root / "root/answers.toml"
        answers.write_text('node = "press-7"\ngroup = "plant-a"\n')
        self.run("millhand", "setup", "--answers", "/root/answers.toml", "--no-check")
        with (self.root / "etc/millhand/millhand.toml").open("a") as file:
            file.write("\n[assets.options]\nevery_ms = 500\n\n[http]\nport = 0\n\n[plugins.rig]\n")

    def start(self) -> subprocess.Popen[bytes]:
        """The agent as its unit starts it, as its user and with /run/millhand of its own; returns when it answers."""
        self.run("install", "-d", "-o", "millhand", "-g", "millhand", "-m", "0750", "/run/millhand")
        with (self.root / "root/agent.log").open("w") as log:
            words = self.command(*AS_AGENT, "millhand", "run")
            agent = subprocess.Popen(words, stdout=log, stderr=log, env=ENVIRONMENT)
        try:
            self.wait(lambda: '"uptime_s"' in self.run("millhand", "--json", check=False).stdout, agent)
        except BaseException:
            agent.kill()
            agent.wait()
            raise
        return agent

    @contextlib.contextmanager
    def agent(self) -> Iterator[None]:
        """The agent, which must end well."""
        agent = self.start()
        try:
            yield
        finally:
            agent.terminate()
            assert agent.wait(60) == 0, self.log()

    def wait(self, condition: Callable[[], bool], agent: subprocess.Popen[bytes] | None = None) -> None:
        """Wait until `condition` holds; with the agent's log where it never does, or where the agent has ended."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert agent is None or agent.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.2)

    def log(self) -> str:
        """What the agent said since it was started last."""
        return (self.root / "root/agent.log").read_text()

    def rows(self) -> list[str]:
        """Readings in the store of the agent that runs, as lines of CSV."""
        return self.run("millhand", "readings", "node", check=False).stdout.splitlines()[1:]

    def predict(self) -> str:
        """What MODEL says to ROW, asked of the agent that runs."""
        self.run("millhand", "model", "load", MODEL)
        return self.run("millhand", "predict", MODEL, "--format", "csv", input=ROW).stdout

    def kill(self) -> None:
        """kill -9 of every process in it, as when the power goes."""
        while found := [process for process in Path("/proc").glob("[0-9]*") if self._holds(process)]:
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
            time.sleep(0.01)

    def _holds(self, process: Path) -> bool:
        try:
            return (process / "root").readlink() == self.root and "\nState:\tZ" not in _text(process / "status")
        except OSError:  # it has ended
            return False

    def kept(self, *places: str) -> dict[str, tuple[int, bytes]]:
        """Files below `places` by owner and content."""
        paths = [path for place in places for path in (self.root / place).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): (path.stat().st_uid, path.read_bytes()) for path in paths}


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def mount(*words: str | Path) -> None:
    """Mount; skip the test where this machine does not allow it."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def made(base: Path, root: Path, size: str = "2g") -> Iterator[Chroot]:
    """A node in memory, of a tar file; `size` as tmpfs takes it. Unmounted whatever happens."""
    root.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"mode=755,size={size}", "tmpfs", root)
    node = Chroot(root)
    try:
        subprocess.run(["tar", "-C", str(root), "-xf", str(base)], check=True)
        mount("-t", "proc", "proc", root / "proc")
        yield node
    finally:
        node.kill()
        subprocess.run(["umount", "--lazy", "--recursive", root], check=False)
