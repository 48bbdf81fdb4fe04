"""sd_notify over a real datagram socket."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from millhand.systemd import notify, watchdog_interval_s


@pytest.mark.parametrize("abstract", [False, True])
def test_notify_reaches_the_manager(monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"millhand-{os.getpid()}" if abstract else str(Path(folder) / "notify")
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    connect = socket.socket
    monkeypatch.setattr(socket, "socket", lambda *kind: opened.append(1) or connect(*kind))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    assert not opened, "without a manager no socket is made"
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    notify("READY=1")  # a manager that is gone is no error
    assert len(opened) == 1


def test_watchdog_interval_is_half_of_what_the_manager_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval_s() is None
