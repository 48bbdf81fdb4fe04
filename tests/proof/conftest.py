"""An artifact with a data file in a folder of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from millhand.proof.signature import Keyring
from millhand.proof.verification import Subject

for kit in ("proof", "serving", "pages", "cli"):
    sys.path.insert(0, os.fspath(Path(__file__).parents[1] / kit / "kit"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The node's."""
    return tmp_path / "data"


@pytest.fixture
def keyring(data_dir: Path) -> Keyring:
    return Keyring(data_dir)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    folder = tmp_path / "press" / "1"
    (folder / "weights").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"a graph")
    (folder / "weights" / "first.bin").write_bytes(bytes(range(64)))
    return Subject(model="press", version=1, folder=folder, artifact="model.onnx", backend="onnxruntime")
