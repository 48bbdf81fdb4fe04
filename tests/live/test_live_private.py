"""The agent never phones home: every connection and every file opened for writing, of all its processes, by strace."""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from live_kit import HTTP_ANY, Site, cli, drained, ended, file_asset, http_url, rig_asset, write_engine

from millhand.testing import Agent

CALLS = "trace=network,open,openat,openat2,creat"
ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')
WRITING = re.compile(r'(?:open|openat|creat)\((?:\w+, )?"([^"]+)", ([^,)]*)')
DNS_PORT = 53
# Devices are no files: a driver's doors are opened for writing where there is such a card.
DEVICES = ("/dev/null", "/dev/shm/", "/dev/nvidia", "/dev/urandom", "/dev/tty")
LOOK_UP_FILES = ("/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/hosts", "/etc/gai.conf")


def tracer() -> str:
    """The path of strace; skips where it is missing or may not trace."""
    path = shutil.which("strace")
    if path is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    tried = subprocess.run([path, "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    return path


def outside(line: str) -> bool:
    """Whether a call names an Internet address that is not this machine's loopback, or a name server."""
    found = ADDRESS.search(line)
    return found is not None and (int(found[1]) == DNS_PORT or not ipaddress.ip_address(found[2]).is_loopback)


def test_the_patterns_see_what_they_must() -> None:
    assert outside('7 connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("20.1.2.3")}, 16) = 0')
    assert outside(
        '7 sendto(3, "..", 2, 0, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), '
        'inet_pton(AF_INET6, "2603::1", &sin6_addr), sin6_scope_id=0}, 28) = 2'
    )
    assert outside('7 connect(3, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0')
    assert not outside('7 connect(3, {sa_family=AF_INET, sin_port=htons(99), sin_addr=inet_addr("127.0.0.1")}, 16) = 0')
    assert not outside('7 connect(3, {sa_family=AF_UNIX, sun_path="/run/millhand/control.sock"}, 110) = 0')
    found = WRITING.search('7 openat(AT_FDCWD, "/root/.cache/x", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = 3')
    assert found is not None
    assert found.groups() == ("/root/.cache/x", "O_WRONLY|O_CREAT|O_CLOEXEC")


@pytest.mark.slow
def test_the_agent_never_phones_home(tmp_path: Path, site: Site, millhand_agent: Callable[..., Agent]) -> None:
    strace = tracer()
    trace = tmp_path / "trace"
    engine = write_engine(tmp_path / "engine.csv", 60)
    agent = millhand_agent(
        HTTP_ANY
        + site.telemetry
        + '[models]\nload = ["*"]\n[plugins.turbofan]\n[plugins.host]\n'
        + file_asset(engine, "engine", models=["turbofan-rul"])
        + rig_asset("skid", speed="full")
        + '\n[[assets]]\nname = "box"\nadapter = "host"\n',
        # Compiled modules are a matter of the installation.
        environment={"PYTHONDONTWRITEBYTECODE": "1"},
        prefix=[strace, "-D", "-f", "-qq", "-s", "200", "-e", CALLS, "-o", str(trace)],
        started=False,
    )
    agent.start(wait=False)
    agent.wait(agent.answers, "the traced agent", 60)
    agent.wait(ended(agent, "engine", "skid"), "the ends of the recordings", 60)
    agent.wait(lambda: agent.call("alert.list"), "an alert")
    agent.wait(lambda: drained(agent), "the hub's acknowledgement")
    for path in ("/v2/health/ready", "/v2/models/rig-fault", "/metrics"):
        with urllib.request.urlopen(http_url(agent) + path, timeout=10) as answer:
            assert answer.status == 200
    assert cli(agent, "check").returncode in (0, 3)
    agent.reload()
    agent.wait(lambda: "configuration read again" in agent.log(), "the reload")
    assert agent.stop() == 0

    lines = trace.read_text(errors="replace").splitlines()
    # The trace is whole: it has the broker's connection, the store, the worker's model and the HTTP process.
    port = f"htons({site.broker.port})"
    assert any(" connect(" in line and port in line for line in lines)
    assert any("millhand.db" in line for line in lines)
    assert any("turbofan-rul/1/model.onnx" in line for line in lines)
    assert len({line.split()[0] for line in lines}) >= 3

    asked = [line for line in lines if re.search(r" (connect|sendto|sendmsg|sendmmsg)\(", line)]
    assert [line for line in asked if outside(line)] == []
    assert [line for line in lines if any(f'"{name}"' in line for name in LOOK_UP_FILES)] == []

    own = (str(agent.folder / "data"), str(agent.run_dir), *DEVICES)
    written = {
        found[1]
        for line in lines
        if (found := WRITING.search(line)) and re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_APPEND", found[2])
    }
    assert {path for path in written if not path.startswith(own)} == set()
    assert str(agent.folder / "data" / "millhand.db") in written
