"""A broker and a hub as real processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millhand.telemetry.broker import EmbeddedBroker

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

from live_kit import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    with EmbeddedBroker(folder / "broker") as broker:
        running = Site(folder, broker)
        running.start()
        yield running
        running.stop()
