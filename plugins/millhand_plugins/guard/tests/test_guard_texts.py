"""The generator of attacks and harmless texts: its two parts share nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[4] / "benchmarks/eval/guard_texts"


@pytest.fixture(scope="module")
def generate() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import generate

        return generate
    finally:
        sys.path.remove(str(FOLDER))


def test_tuning_and_testing_share_no_template_and_no_filler(generate: Any) -> None:
    tuning, testing = generate.read("tuning"), generate.read("testing")
    for table in ("attacks", "harmless"):
        templates = [{text.lower() for kind in part[table].values() for text in kind} for part in (tuning, testing)]
        assert not templates[0] & templates[1]
    fillers = [
        {f"{name}: {word}".lower() for name, words in part["fillers"].items() for word in words}
        for part in (tuning, testing)
    ]
    assert not fillers[0] & fillers[1]


def test_the_testing_part_is_large_enough_and_repeats_nothing(generate: Any) -> None:
    found = generate.texts("testing")
    assert sum(text.attack for text in found) >= 5000
    assert sum(not text.attack for text in found) >= 5000
    assert len({text.text for text in found}) == len(found)
