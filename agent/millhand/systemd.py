"""sd_notify: ready, reloading, stopping, and a watchdog that is fed only after the daemon checked itself.

Protocol: sd_notify(3). Without NOTIFY_SOCKET every call does nothing.
"""

from __future__ import annotations

import os
import socket
import time


def notify(state: str) -> None:
    """Send `state` (for example "READY=1") to the service manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return  # the manager is gone; nothing depends on it


def notify_reloading() -> None:
    """Type=notify-reload wants the monotonic time of the reload."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_interval_s() -> float | None:
    """Half of WatchdogSec, as sd_watchdog_enabled(3) advises; None where no watchdog waits for this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2e6
    except (KeyError, ValueError):
        return None
