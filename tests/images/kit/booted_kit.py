"""A Debian root folder booted by its own systemd, process 1 of namespaces of its own, in a control group of its own.

No kernel, no firmware and no udev: what starts, hardens, watches and stops the units is systemd itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc", "--cgroup")
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root", "DEBIAN_FRONTEND=noninteractive")
BOOT_DEADLINE_S = 120.0
END_DEADLINE_S = 30.0
INIT = r"""
set -eu
read -r pid rest < /proc/self/stat
mount --make-rprivate /
mount --rbind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom tty; do touch "dev/$name"; mount --bind "/dev/$name" "dev/$name"; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin; ln -s fd/1 dev/stdout; ln -s fd/2 dev/stderr
mount -t tmpfs -o mode=755 run run
ip link set lo up
pivot_root . mnt
umount --lazy /mnt
echo "$pid"
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd >/dev/null 2>&1
"""


class Booted:
    """The machine, to be used with `with`: running inside."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._group = _unified() / f"millhand-{os.getpid()}-{root.parent.name}"
        self._first: subprocess.Popen[str] | None = None
        self._pid = ""

    def __enter__(self) -> Booted:
        self._group.mkdir()
        join = f'echo $$ >"{self._group}/cgroup.procs" && exec "$@"'
        enter = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child"]
        self._first = subprocess.Popen(
            ["sh", "-c", join, "sh", *enter, "sh", "-c", INIT, "init", str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        self._pid = self._first.stdout.readline().strip()
        try:
            assert self._pid, "the machine did not start"
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._first is not None and self._first.stdout is not None
        self._first.send_signal(signal.SIGKILL)
        self._first.wait()
        self._first.stdout.close()
        end = time.monotonic() + END_DEADLINE_S
        while self._group.exists() and time.monotonic() < end:
            for folder in sorted(self._group.rglob("*/"), key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):  # a process is still ending in it
                    folder.rmdir()
            with contextlib.suppress(OSError):
                self._group.rmdir()
            time.sleep(0.05)

    def run(self, *words: str, check: bool = True, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root, to its end."""
        command = ["nsenter", f"--target={self._pid}", *NAMESPACES, "env", "-i", *ENVIRONMENT, *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, check=False)
        print(f"\n# {' '.join(words)}\n{done.stdout}{done.stderr}", end="")
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def unit(self, name: str, fact: str) -> str:
        """What systemd says of a unit: `ActiveState`, `NRestarts` …"""
        return self.run("systemctl", "show", "--property", fact, "--value", name).stdout.strip()

    def journal(self, name: str, *options: str) -> str:
        """What a unit has said."""
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={name}", *options).stdout

    def _wait_until_up(self) -> None:
        end = time.monotonic() + BOOT_DEADLINE_S
        while (state := self.run("systemctl", "is-system-running", check=False).stdout.strip()) != "running":
            if state == "degraded" or time.monotonic() > end:
                failed = self.run("systemctl", "list-units", "--failed", "--no-pager", check=False).stdout
                raise AssertionError(f"the machine is '{state}':\n{failed}")
            time.sleep(0.2)


def missing() -> str:
    """Why nothing can be booted here; empty where it can."""
    if os.geteuid() != 0:
        return "only root boots a root folder"
    for program in ("debootstrap", "unshare", "nsenter", "setpriv", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return "" if _groups() else "there is no control group of version 2 here"


def _groups() -> list[Path]:
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return [Path(words[1]) for words in mounts if words[2] == "cgroup2" and os.access(words[1], os.W_OK)]


def _unified() -> Path:
    found = _groups()
    if not found:
        pytest.skip("there is no control group of version 2 here")
    return found[0]
