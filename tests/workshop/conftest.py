"""A node of its own for each test, with the makers of tests/workshop/kit."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))

from workshop_kit import KIT, Node


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    site = tmp_path / "site"
    information = site / "workbench-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: workbench\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[millhand]\nworkbench = millhand_workbench\n")
    path = os.pathsep.join(filter(None, [str(site), str(KIT), os.environ.get("PYTHONPATH", "")]))
    run_dir = Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(site)
    node = Node(tmp_path, run_dir)
    node.model()
    node.configure("folded", "half", "damaged")
    try:
        yield node
    finally:
        for process in node.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        run_dir.rmdir() if not any(run_dir.iterdir()) else None
