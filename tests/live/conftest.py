"""A broker and a hub as real processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "serving" / "kit"))

from live_kit import Site, running_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path / "site") as site:
        yield site
