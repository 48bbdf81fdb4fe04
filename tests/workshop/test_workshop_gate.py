"""The gate's verdict, and which candidate serves."""

from __future__ import annotations

from typing import Any

import pytest

from millhand.proof.document import Latency, Proof, Score
from millhand.workshop.gate import choose, verdict
from millhand.workshop.settings import WorkshopSettings

SETTINGS = WorkshopSettings()


def score(drop: float = 0.0, metric: str = "accuracy", rows: int = 1000) -> Score:
    return Score(
        metric=metric,
        higher_is_better=metric != "rmse",
        original=0.9,
        candidate=0.9 * (1 - drop / 100),
        drop_percent=drop,
        limit_percent=1.2,
        rows=rows,
        data="",
    )


def proof(name: str, speed: float, size: int, passed: bool = True, **changes: Any) -> Proof:
    """`speed`: how many times as fast as the original, on a machine that may be slower now than for the others."""
    slow = 1 + len(name) % 3
    latency = Latency(batch=8, p50_ms=slow / speed, p99_ms=3, original_p50_ms=slow, original_p99_ms=3)
    given = {
        "model": "m", "version": 1, "candidate": name, "target": "cpu", "artifact": "model.onnx", "sha256": "0" * 64,
        "bytes": size, "source_bytes": 1000, "backend": "b", "executed": True, "score": score(), "latency": (latency,),
        "passed": passed, "date": "",
    }  # fmt: skip
    return Proof(**{**given, **changes})


@pytest.mark.parametrize(("drop", "passed"), [(-3.0, True), (0.0, True), (1.2, True), (1.2001, False), (30.0, False)])
def test_the_cap_is_the_cap(drop: float, passed: bool) -> None:
    said, reasons = verdict(score(drop))
    assert said is passed
    assert "1.2 % are allowed" in reasons[0]


def test_reasons_are_sentences_with_the_numbers() -> None:
    assert verdict(score(2.0, "rmse"))[1][0].startswith("The RMSE is worse by 2 %: 0.9 to 0.882 on 1000 rows;")
    assert verdict(score(-2.0))[1][0].startswith("The accuracy is better by 2 %")
    few = verdict(score(rows=42))[1]
    assert few[1] == "One row of 42 counts 2.4 %: more rows would say more."


def chosen(*proofs: Proof) -> tuple[str, str]:
    return choose({proof.candidate: proof for proof in proofs}, 1000, 8, SETTINGS)


def test_the_fastest_that_passed_serves() -> None:
    name, why = chosen(proof("int8", 3.0, 250), proof("fp16", 1.5, 500), proof("wrong", 9.0, 100, passed=False))
    assert name == "int8"
    assert "3.0 times as fast as the original at batches of 8, the accuracy is kept" in why


def test_where_none_is_faster_by_the_margin_the_smallest_serves() -> None:
    name, why = chosen(proof("int8", 1.04, 250), proof("int4", 0.97, 125), proof("tiny", 0.5, 10))
    assert name == "int4"
    assert "12% of the original's size" in why or "13% of the original's size" in why


@pytest.mark.parametrize(
    ("proofs", "words"),
    [
        ((), "none was run"),
        ((proof("int8", 3.0, 250, passed=False),), "no candidate passed"),
        ((proof("int8", 3.0, 250, executed=False),), "none was run"),
        ((proof("int8", 1.01, 990),), "1 passed, and none is faster by 5 %"),
        ((proof("old", 3.0, 100, score=score(2.0)),), "no candidate passed"),  # under a cap that was higher then
        ((proof("slow", 0.5, 100),), "takes 200% of the original's time"),
        ((proof("other", 3.0, 100, latency=()),), "1 passed, and none is faster"),
    ],
)
def test_else_the_original_serves_and_it_is_said_why(proofs: tuple[Proof, ...], words: str) -> None:
    name, why = chosen(*proofs)
    assert name == ""
    assert why.startswith("The original serves:")
    assert words in why
