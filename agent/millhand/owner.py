"""Whose the agent's files are: what root makes among them must not be out of the agent's reach."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Iterator
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


@contextlib.contextmanager
def handed_over(*folders: Path) -> Iterator[None]:
    """What is root's in these folders at the end belongs to the folder's owner, however it ends.

    Where the file system does not let root give things away, they stay, and `check` tells of them.
    """
    try:
        yield
    finally:
        for folder in folders:
            if os.geteuid() == 0 and folder.exists():
                _hand_over(folder.resolve())


def reading_group(path: Path) -> int | None:
    """Who may read a file that root writes: its folder's group, as the package gives /etc/millhand to the agent's.

    Raises OSError where there is no such folder.
    """
    group = path.parent.stat().st_gid
    return group if os.geteuid() == 0 and group else None


def _hand_over(folder: Path) -> None:
    """Never a file with a second name: that may lie elsewhere."""
    owner = folder.stat()
    if owner.st_uid == 0:
        return
    for path, folders, files, number in os.fwalk(folder, follow_symlinks=False):
        if Path(path) == folder:
            folders[:] = [name for name in folders if name not in OF_A_DISK]
        for name in (*folders, *files):
            with contextlib.suppress(OSError):  # a running agent tidies up too
                found = os.stat(name, dir_fd=number, follow_symlinks=False)
                if found.st_uid == 0 and (stat.S_ISDIR(found.st_mode) or found.st_nlink == 1):
                    os.chown(name, owner.st_uid, owner.st_gid, dir_fd=number, follow_symlinks=False)
