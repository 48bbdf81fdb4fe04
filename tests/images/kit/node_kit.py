"""A Debian root folder as a machine of its own: processes, mounts, host name and network in namespaces.

Nothing of it can be reached from outside, and nothing in it reaches out: its one way out is a wire that ends nowhere
and counts what is sent on it. All mounts and processes are gone with the machine, also after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The first process of the machine; dash waits for any child, so that it also reaps what lost its parent.
INIT = r"""
set -eu
read -r pid rest < /proc/self/stat
mount --make-rprivate /
mount -t proc proc "$1/proc"
for file in $(ls "$2"); do mount --bind "$2/$file" "$1/proc/$file"; done
mount -t tmpfs -o mode=755 dev "$1/dev"
mkdir "$1/dev/shm"; chmod 1777 "$1/dev/shm"; ln -s /proc/self/fd "$1/dev/fd"
for name in null zero full random urandom; do touch "$1/dev/$name"; mount --bind "/dev/$name" "$1/dev/$name"; done
mount -t tmpfs -o mode=755 run "$1/run"
hostname "$3"
ip link set lo up
ip link add out0 type veth peer name nowhere0
echo 1 > /proc/sys/net/ipv6/conf/out0/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/nowhere0/disable_ipv6
ip addr add 192.0.2.2/24 dev out0; ip link set out0 up; ip link set nowhere0 up; ip route add default via 192.0.2.1
echo "$pid"
exec >/dev/null
while :; do sleep 1; done
"""


class Node:
    """One machine, to be used with `with`; `proc` holds files that take the place of the kernel's in /proc."""

    def __init__(self, name: str, root: Path, proc: Mapping[str, str] | None = None) -> None:
        self.name, self.root = name, root
        self._proc = root.with_name(f"{root.name}.proc")
        shutil.rmtree(self._proc, ignore_errors=True)
        self._proc.mkdir()
        for file, text in (proc or {}).items():
            (self._proc / file).write_text(text)
        self._init: subprocess.Popen[str] | None = None
        self._pid = ""
        self._sent = 0

    def __enter__(self) -> Node:
        (self.root / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost {self.name}\n::1 localhost\n")
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *NAMESPACES,
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            INIT,
            "init",
        ]
        self._init = subprocess.Popen(
            [*command, os.fspath(self.root), os.fspath(self._proc), self.name], stdout=subprocess.PIPE, text=True
        )
        assert self._init.stdout is not None
        self._pid = self._init.stdout.readline().strip()
        assert self._pid, "the machine did not start"
        self._sent = self._packets()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._init is not None
        self._init.kill()
        self._init.wait()
        if self._init.stdout is not None:
            self._init.stdout.close()

    def command(self, *words: str, user: str = "root", env: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs `words` in the machine."""
        home = "/root" if user == "root" else "/"
        variables = {"PATH": PATH, "HOME": home, "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **(env or {})}
        enter = ["nsenter", f"--target={self._pid}", *NAMESPACES, "chroot"]
        if user != "root":
            enter.append(f"--userspec={user}:{user}")
        settings = [f"{name}={value}" for name, value in variables.items()]
        return [*enter, os.fspath(self.root), "env", "-i", *settings, *words]

    def run(
        self,
        *words: str,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        text: str | None = None,
        codes: Sequence[int] = (0,),
        timeout_s: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and print what it says; it must end with one of `codes`."""
        print(f"\n{self.name} {'#' if user == 'root' else '$'} {' '.join(words)}", flush=True)
        done = subprocess.run(
            self.command(*words, user=user, env=env),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        print(done.stdout, done.stderr, sep="", end="", flush=True)
        assert done.returncode in codes, f"{words} ended with {done.returncode}: {done.stderr[-2000:]}"
        return done

    def start(self, *words: str, user: str = "root", log: Path) -> subprocess.Popen[bytes]:
        """Start a command that stays; what it says goes to `log`. It ends with the process that is returned."""
        print(f"\n{self.name} {'#' if user == 'root' else '$'} {' '.join(words)} &", flush=True)
        with log.open("wb") as file:
            command = self.command("setpriv", "--pdeathsig", "KILL", *words, user=user)
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def packets_sent_out(self) -> int:
        """Packets that left for the outside since the machine started, questions for the gateway's address included."""
        return self._packets() - self._sent

    def _packets(self) -> int:
        enter = ["nsenter", f"--target={self._pid}", "--net", "ip", "-s", "-j", "link", "show", "out0"]
        answer = subprocess.run(enter, capture_output=True, text=True, check=True).stdout
        count: int = json.loads(answer)[0]["stats64"]["tx"]["packets"]
        return count
