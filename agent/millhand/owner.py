"""Whose the data folder is: what root writes into the agent's own, the agent can no longer write."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

OF_A_DISK = {"lost+found"}


def other_owner(folder: Path) -> str:
    """The user whom a folder belongs to, where this process is root and that user is not; else empty."""
    if os.geteuid() != 0 or not folder.exists():
        return ""
    owner = folder.stat().st_uid
    try:
        return pwd.getpwuid(owner).pw_name if owner else ""
    except KeyError:  # a volume that comes from another machine
        return ""


def start_command(folder: Path, option: str = "") -> str:
    """The command that starts the agent in the foreground, as the user whom its data folder belongs to."""
    user = other_owner(folder)
    return f"{f'runuser -u {user} -- ' if user else ''}millhand{option} run"


def strays(folder: Path) -> list[str]:
    """Names in a folder whose owner is not the folder's; none where it cannot be read."""
    try:
        owner = folder.stat().st_uid
        with os.scandir(folder) as entries:
            found = {entry.name for entry in entries if entry.stat(follow_symlinks=False).st_uid != owner}
    except OSError:
        return []
    return sorted(found - OF_A_DISK)
