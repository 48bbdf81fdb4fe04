"""The shipped normaliser, and one trained on a few texts."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from millhand_plugins.knowledge.shorthand import Lexicon, Shorthand
from millhand_plugins.knowledge.train_shorthand import read_texts, train


@pytest.fixture(scope="module")
def shorthand() -> Shorthand:
    return Shorthand(Lexicon.read())


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("repl hyd hse", "replace hydraulic hose"),
        ("REPL BLOWN HYD HOSE", "replace blown hydraulic hose"),
        ("c/o lh steer cyl", "change out left hand steering cylinder"),
        ("A/C u/s", "air conditioner unserviceable"),
        ("eng oil leek", "engine oil leak"),
    ],
)
def test_shorthand_becomes_full_words(shorthand: Shorthand, text: str, full: str) -> None:
    assert shorthand.expand(text) == full


def test_ids_and_numbers_stay_as_they_were_written(shorthand: Shorthand) -> None:
    assert shorthand.expand("XH531 repl pos 7 tyre") == "XH531 replace position 7 tyre"


def test_words_that_are_joined_at_the_end_keep_the_count() -> None:
    lexicon = Lexicon(merges={"tow bar": {"towbar": 9}, "acme works": {"<sensitive>": 9}})
    for form in ("lower", "word", "kept", "merge"):
        for span in (1, 2, 3):
            lexicon.weights[f"M 4/5! {span}"] = 9.0 + span
            lexicon.weights[f"o {form}"] = 0.1
    shorthand = Shorthand(lexicon)
    assert shorthand.normalise(["tow", "bar"]) == ["towbar", ""]
    assert shorthand.expand("tow bar") == "towbar"
    assert shorthand.normalise(["Acme", "Works"]) == ["<sensitive>", ""]
    assert shorthand.expand("Acme Works") == "Acme Works"


@pytest.mark.parametrize("text", ["", " \t\n", "\0", "汽蚀", "a" * 100_000, "/ / & & + - '" * 200, "\udcff x"])
def test_any_text_is_taken(shorthand: Shorthand, text: str) -> None:
    shorthand.expand(text)
    words = text[:2000].split()
    assert len(shorthand.normalise(words)) == len(words)


def test_training_learns_from_pairs_alone(tmp_path: Path) -> None:
    lines = ["repl\treplace", "hyd\thydraulic", "hse\those", "", "Repl\treplace", "tow\ttowbar", "bar\t", ""]
    path = tmp_path / "texts.norm.gz"
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode() * 20))
    lexicon = train(read_texts(path))
    assert Shorthand(lexicon).normalise(["repl", "tow", "bar"]) == ["replace", "towbar", ""]


@pytest.mark.data
@pytest.mark.skipif("MILLHAND_DATA" not in os.environ, reason="MILLHAND_DATA names no folder with MaintNorm")
@pytest.mark.parametrize(("company", "least"), [("a", 95), ("c", 90)])
def test_error_reduction_on_maintnorms_test_parts(shorthand: Shorthand, company: str, least: float) -> None:
    texts = read_texts(Path(os.environ["MILLHAND_DATA"]) / "maintnorm" / f"company_{company}_test.norm.gz")
    right = changed = kept = 0
    for text in texts:
        for (word, full), said in zip(text, shorthand.normalise([word for word, _ in text]), strict=True):
            right += said == full
            changed += word != full
            kept += word == full
    assert 100 * (right - kept) / changed >= least
