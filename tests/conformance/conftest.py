"""One agent with models of every datatype, and environments for the clients of others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "serving" / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

from conformance_kit import Node, config, ready

from millhand.testing import millhand_agents


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    with millhand_agents(folder) as start:
        yield ready(start(config(folder)))
