"""proof.html: the verdict first, all that was measured, nothing from elsewhere; also in headless Chromium."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from page_kit import laid_out_px, needs_chromium
from proof_kit import proof_of

from millhand.pages.bars import Bar, Bars
from millhand.proof.document import Latency, Layer, Proof, Signature
from millhand.proof.file import read_proof, write_proof
from millhand.proof.page import LAYERS_SHOWN, page
from millhand.proof.verification import Subject

CHARACTER = 0.56
"""Width of a letter of the system's sans serif as a share of its size, about."""


def full(subject: Subject, **changes: Any) -> Proof:
    """A proof with everything in it, some of it long."""
    layers = tuple(
        Layer(name=f"/model/layers.{i}/self_attn/q_proj/MatMul", operator="MatMulNBits", precision="int4",
              error=None if i % 9 == 8 else 10.0 ** -(i % 7))
        for i in range(60)
    )  # fmt: skip
    whole = {
        "layers": layers,
        "latency": tuple(
            Latency(batch=batch, p50_ms=1234.5678, p99_ms=4321.9, original_p50_ms=5e3, original_p99_ms=9e3)
            for batch in (1, 256)
        ),
        "energy_mj": 2.5,
        "notes": ("Layer <head> stays fp32.", "n" * 200),
        "reasons": ("Accuracy fell by 0.2 %, the limit is 1.2 %.",),
        "node": {"name": "press-7", "cpu": {"model": "EPYC", "instructions": ["avx2", "f16c"]}, "driver": None},
        "options": {"graph": {"level": "all"}},
        "signatures": (Signature(key="0123456789abcdef", role="plant", signature="00" * 64),),
    }
    return msgspec.structs.replace(proof_of(subject), **{**whole, **changes})


def words(text: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL).split())


def test_the_page_says_all_that_a_technician_needs(subject: Subject) -> None:
    text = page(full(subject, candidate="int8"))
    found = words(text)
    for part in (
        "Passed: int8 of press, version 1", "Measured on press-7", "Accuracy fell by 0.2 %",
        "accuracy: worse than the original (limit 1.2 %)", "98.70 %", "98.50 %", "4.05 × faster, one row",
        "25 % of the original&#39;s size", "2.5 mJ", "3.0 MiB", "1.23 s, p99 4.32 s", "A batch of 256",
        f"the worst {LAYERS_SHOWN} of 54; 6 were not measured", "Layer &lt;head&gt; stays fp32.",
        "cpu.instructions avx2, f16c", "driver not known", "Option graph.level all", "onnxruntime 1.32.0",
        "plant key 0123456789abcdef",
        subject.digest(), "millhand model verify press",
    ):  # fmt: skip
        assert part in found, part
    assert found.index("Passed") < found.index("How good") < found.index("Error of each layer")
    assert not re.search(r"<script|https?://|@import|url\(|<link|src=", text), "it needs nothing from elsewhere"
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    ("changes", "verdict", "style"),
    [
        ({"candidate": "int8"}, "Passed: int8 of press, version 1", "good"),
        ({"passed": False}, "Failed: the original of press", "bad"),
        ({"executed": False}, "Never run: the original of press", "bad"),
    ],
)
def test_the_verdict_comes_first(subject: Subject, changes: dict[str, Any], verdict: str, style: str) -> None:
    assert f'<h1 class="{style}">{verdict}' in page(full(subject, **changes))


def test_what_was_not_measured_is_left_out(subject: Subject) -> None:
    nothing = {
        "score": None,
        "latency": (),
        "layers": (),
        "energy_mj": None,
        "notes": (),
        "reasons": (),
        "signatures": (),
    }
    found = words(page(full(subject, memory_bytes=None, executed=False, **nothing)))
    for part in ("How good", "How quick", "Error of each layer", "Notes", "In memory", "None", "energy"):
        assert part not in found, part
    assert "Nobody has signed it." in found and "nothing was measured" in found


def test_a_candidate_that_is_slower_is_called_so(subject: Subject) -> None:
    latency = (Latency(batch=1, p50_ms=0.0125, p99_ms=0.06, original_p50_ms=0.01, original_p99_ms=0.05),)
    text = page(full(subject, candidate="int8", latency=latency))
    assert '<b class="bad">1.25 ×</b><span>slower, one row (p50)' in text
    assert "12.5 µs, p99 60 µs" in text


def test_it_is_written_beside_the_proof(subject: Subject) -> None:
    before = subject.digest()
    write_proof(subject.folder, full(subject))
    assert (subject.folder / "proof.html").read_text() == page(read_proof(subject.folder / "proof.json"))
    assert subject.digest() == before


@pytest.mark.parametrize("log", [False, True])
def test_bars_are_as_long_as_what_they_stand_for(log: bool) -> None:
    values = [0.0, 1e-5, 1e-3, 0.1]
    chart = Bars("<title>", [Bar("a", value, f"{value}", reach=value * 2) for value in values], log)
    svg = ElementTree.fromstring(chart.__html__())
    assert svg.get("aria-label") == "<title>"
    widths = [float(rect.get("width", 0)) for rect in svg.iter("rect") if rect.get("class") == "after"]
    assert widths[0] == 0 and widths == sorted(widths)
    if log:
        assert widths[2] - widths[1] == pytest.approx(widths[3] - widths[2], abs=0.2), "two decades each"
    else:
        assert widths[3] == pytest.approx(100 * widths[2], rel=0.06)


def test_labels_leave_room_for_values(subject: Subject) -> None:
    """In the largest type of the page, 17 of 480: what a phone shows."""
    for svg in re.findall(r"<svg.*?</svg>", page(full(subject))):
        labels = re.findall(r'<text class="row"[^>]*>([^<]*)<', svg)
        values = re.findall(r'<text class="value"[^>]*>([^<]*)<', svg)
        for label, value in zip(labels, values, strict=True):
            assert (len(label) + len(value)) * CHARACTER * 17 < 480, (label, value)


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_it_fits_the_screen_in_chromium(subject: Subject, tmp_path: Path, width: int) -> None:
    laid_out, room = laid_out_px(page(full(subject)), width, tmp_path)
    assert laid_out <= room, f"{width} pixels: the page is {laid_out} wide in {room}"
