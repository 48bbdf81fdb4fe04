"""Gateways of the real kind, one for all tests that leave it as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

from gateway_kit import Site, until

KIT = Path(__file__).parent / "kit"


@pytest.fixture(scope="module")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """Start a gateway; settings as keywords. All are stopped at the end."""
    points = tmp_path_factory.mktemp("points")
    information = points / "wordguard-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wordguard\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[millhand]\nwordguard = millhand_wordguard\n")
    sites: list[Site] = []
    with pytest.MonkeyPatch.context() as patch:
        for folder in (KIT, points):
            patch.setenv("PYTHONPATH", os.fspath(folder), prepend=os.pathsep)

        def make(**options: Any) -> Site:
            site = Site(tmp_path_factory.mktemp("gateway"), **options).start()
            sites.append(site)
            until(lambda: site.get("/health").status_code == 200, "the gateway's health")
            return site

        yield make
        for site in sites:
            site.stop()


@pytest.fixture(scope="module")
def site(make_site: Callable[..., Site]) -> Site:
    """A gateway without guards, before two servers."""
    return make_site(servers=2)
