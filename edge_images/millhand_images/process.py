"""Programs that the builder calls: pip and dpkg-deb."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from millhand.errors import MillhandError


class BuildError(MillhandError):
    """A package could not be built."""

    code = "build"


def call(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program to its end and return what it printed. Raises BuildError with the end of what it said."""
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=environment, cwd=cwd, check=False
        )
    except FileNotFoundError as error:
        raise BuildError(f"'{command[0]}' is not here", hint=f"install it: apt-get install {command[0]}") from error
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-10:])
        raise BuildError(f"'{' '.join(map(str, command[:4]))} …' ended with {done.returncode}:\n{said}")
    return done.stdout


def pip(words: Sequence[str | Path], offline: bool = False) -> str:
    """Call this interpreter's pip. `offline`: no index, and nothing of this machine's own settings."""
    environment = dict(os.environ)
    if offline:
        environment = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
        environment["PIP_CONFIG_FILE"] = os.devnull
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    return call([*command, "--no-index"] if offline else command, environment)
