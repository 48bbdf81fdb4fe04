"""Compiled modules (.pyc) that do not depend on when, where or by whom they were made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from millhand_images.process import BuildError, call


def compile_tree(folder: Path, installed: Path, python: str) -> None:
    """Compile every module below `folder`, which will lie at `installed`. Raises BuildError.

    The files hold a hash of their source instead of its time (PEP 552), which nothing checks at import: a package's
    files change together. A Python of the same version compiles, as its byte code fits no other.
    """
    environment = dict(os.environ, PYTHONHASHSEED="0")  # the order of constants in a frozenset
    call(
        [
            *(interpreter(python), "-I", "-m", "compileall", "-q", "-j", "1", "--invalidation-mode", "unchecked-hash"),
            *("-s", folder, "-p", installed, folder),
        ],
        environment,
    )


def interpreter(python: str) -> str:
    """An interpreter of version `python`: this one, or one on PATH. Raises BuildError."""
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = shutil.which(f"python{python}")
    if found is None:
        raise BuildError(
            f"python{python} is not here to compile modules for it", hint=f"install python{python}, or build with it"
        )
    return found
