"""The generator of attacks and harmless texts: its two parts share nothing."""

from __future__ import annotations

import sys
import tomllib
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


@pytest.mark.parametrize("part", ["tuning", "broad"])
def test_what_is_tuned_on_shares_no_template_and_no_filler_with_testing(generate: Any, part: str) -> None:
    tuning, testing = generate.read(part), generate.read("testing")
    for table in ("attacks", "harmless"):
        templates = [{text.lower() for kind in tables[table].values() for text in kind} for tables in (tuning, testing)]
        assert not templates[0] & templates[1]
    fillers = [
        {f"{name}: {word}".lower() for name, words in tables["fillers"].items() for word in words}
        for tables in (tuning, testing)
    ]
    assert not fillers[0] & fillers[1]


def test_no_word_fills_a_slot_of_broad_and_of_testing(generate: Any) -> None:
    """Their slots have other names, so the words alone are compared."""
    words = [
        {word.lower() for found in generate.read(part)["fillers"].values() for word in found}
        for part in ("broad", "testing")
    ]
    assert not words[0] & words[1]


def test_texts_that_variants_were_chosen_on_are_none_of_the_generator(generate: Any) -> None:
    chosen = tomllib.loads((FOLDER / "choosing.toml").read_text(encoding="utf-8"))
    by_hand = {text.lower() for kind in ("attacks", "harmless") for text in chosen[kind]}
    assert len(by_hand) > 150
    assert not by_hand & {text.text.lower() for part in ("tuning", "broad", "testing") for text in generate.texts(part)}


def test_the_testing_part_is_large_enough_and_repeats_nothing(generate: Any) -> None:
    found = generate.texts("testing")
    assert sum(text.attack for text in found) >= 5000
    assert sum(not text.attack for text in found) >= 5000
    assert len({text.text for text in found}) == len(found)
