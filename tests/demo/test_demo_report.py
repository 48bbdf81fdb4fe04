"""The demo's counting and its page, from made-up runs; the page also in headless Chromium."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from page_kit import laid_out_px, needs_chromium

from millhand.cli.demo import summary, text
from millhand.config import load_config
from millhand.demo.language import Spoken
from millhand.demo.pace import Load, suitable_pace
from millhand.demo.report import write_report
from millhand.demo.session import Outcome, write_config
from millhand.demo.tally import RigLog, RigTime, Tally, count, read_rig_log
from millhand.pages.charts import Chart, Mark, Span, ticks
from millhand.serving.settings import ModelSettings

EVIDENCE = {"facts": {"bpfo_hz": 105.0, "shaft_hz": 29.3}}


def outcome(**changes: object) -> Outcome:
    times = [i / 2 for i in range(70)]
    samples = np.random.default_rng(1).normal(0, 0.1, 4096)
    alert = {
        "asset": "skid-1",
        "kind": "bearing_outer",
        "lead_time_s": 12.0,
        "rig_time_s": 23.0,
        "evidence": EVIDENCE,
        "message": "m",
    }
    order = {
        "id": "o" * 36,
        "alert_id": "a" * 36,
        "asset": "skid-1",
        "symptom": "impacts <at> the outer race",
        "likely_cause": "spalling",
        "action": ["look", "listen"],
        "priority": 2,
        "writer": "deterministic",
        "parts": [],
        "tools": [],
        "skill": "",
        "minutes": 0,
        "citations": [],
        "struck": [],
        "revision": 1,
        "revised_ns": 0,
    }
    made = Outcome(
        seed=7,
        fault="bearing_outer",
        life_s=35.0,
        onset_s=13.0,
        failure_s=35.0,
        profile="generic-cpu",
        models=[{"name": "rig-fault", "versions": [1]}],
        alerts=[alert],
        orders=[order],
        tally=Tally(produced=700, stored=700, lost=0, duplicates=0, strange=0),
        acked=712,
        windows=60,
        latency_ms={"p50": 3.0, "p99": 9.0},
        rss_mb={"daemon": 70.0, "worker": 60.0},
        start_s=1.1,
        broker="nats-server",
        hardware=[("CPU", "a CPU")],
        health=[(t, min(t / 35, 1.0)) for t in times],
        velocity=[(t, 1.0 + t / 10) for t in times],
        signals={"speed": [(t, 2900.0) for t in times]},
        waveform={"samples": samples.tolist(), "sample_rate_hz": 12_800.0, "unit": "g", "name": "vibration_de"},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def spoken(**changes: object) -> Spoken:
    draft = outcome().orders[0]
    struck = {"field": "action[2]", "text": "order part <777>", "why": "777 stands nowhere"}
    better = {**draft, "writer": "model", "revision": 2, "struck": [struck], "citations": [{"place": "a.pdf, page 3"}]}
    outcomes = dict.fromkeys(("revised", "unchanged", "deadline"), 0)
    made = Spoken(
        model="small",
        server="llamacpp",
        precision="Q4_1",
        tokens_per_s=21.6,
        first_token_ms=640.0,
        versions=[draft, better],
        revision={"outcomes": {**outcomes, "revised": 1}, "struck": 1, "error": ""},
        question="What first?",
        answer="Look at <it>.",
        sources=["[S1] a.pdf, page 3"],
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_both_writers_stand_side_by_side(tmp_path: Path) -> None:
    made = outcome(spoken=spoken())
    write_report(made, tmp_path / "demo.html")
    page = (tmp_path / "demo.html").read_text()
    for told in (
        "One order, two writers",
        "22 tokens/s",
        "order part &lt;777&gt;",
        "a.pdf, page 3",
        "Look at &lt;it&gt;.",
    ):
        assert told in page
    assert page.count("<th>Priority</th>") == 2
    said = "\n".join(text(made, tmp_path / "demo.html"))
    assert "--- written by deterministic" in said and "--- written by model" in said
    assert "1 passages struck; drafts: revised 1" in said
    assert summary(made, tmp_path / "demo.html")["language"]["answer"] == "Look at <it>."


def test_a_silent_language_model_is_a_shortcoming() -> None:
    revision = {"outcomes": {"revised": 0, "unchanged": 0, "deadline": 1}, "struck": 0, "error": "no answer in time"}
    made = outcome(spoken=spoken(revision=revision, answer=""))
    assert made.shortcomings == [
        "the language model's version of the order did not come: no answer in time",
        "the language model gave no answer",
    ]
    assert not made.good


def test_lost_and_doubled_are_set_differences() -> None:
    assert count([1, 2, 3, 4], [1, 2, 2, 9]) == Tally(produced=4, stored=2, lost=2, duplicates=1, strange=1)


def test_rig_log_and_time(tmp_path: Path) -> None:
    lines = [
        {"kind": "header", "onset_ms": 1000, "failure_ms": 3000},
        {"kind": "served", "sequence": 1, "time_ms": 100},
        {"kind": "snapshot", "counter": 1, "time_ms": 150, "valid": True},
        {"kind": "served", "sequence": 2, "time_ms": 200},
    ]
    path = tmp_path / "rig.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    log = read_rig_log(path)
    assert (log.served, log.onset_ms, log.failure_ms) == ({1: 100, 2: 200}, 1000, 3000)
    rig_time = RigTime(log, [(5_000_000_000, 1), (5_100_000_000, 2)])
    assert rig_time.of(5_050_000_000) == 150.0
    assert rig_time.of(5_130_000_000) == 230.0


def test_rig_time_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="no answer"):
        RigTime(RigLog({}, {1: 5}), []).of(0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 35), (-3, 2900), (1e-4, 3e-4), (0, 1e9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in found)


def test_chart_is_well_formed_and_escapes_labels() -> None:
    chart = Chart(
        "a <b>", [0, 1, float("nan")], [1, 2, 3], "x & y", "g", [Mark(0.5, "<m>", "alert")], [Span(0, 1, "s")]
    )
    svg = ElementTree.fromstring(chart.__html__())
    assert svg.find("path") is not None
    assert "NaN" not in chart.__html__()
    assert "nan" not in chart.__html__()


def test_empty_chart_is_still_drawn() -> None:
    ElementTree.fromstring(Chart("nothing", [], [], "x", "y").__html__())


def test_page_is_self_contained_and_tells_the_run(tmp_path: Path) -> None:
    path = tmp_path / "demo.html"
    write_report(outcome(), path)
    page = path.read_text()
    assert "Outer-race bearing damage seen 12.0 s before the machine failed" in page
    assert "impacts &lt;at&gt; the outer race" in page
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!data:)', page), "nothing is loaded from elsewhere"
    assert page.count("<svg") >= 4
    assert "1BPFO" in page


def test_a_run_that_judged_nothing_is_told(tmp_path: Path) -> None:
    """A machine that is far too busy: no prediction, and still a report."""
    nothing = outcome(
        alerts=[], orders=[], waveform=None, windows=0, health=[], velocity=[], latency_ms={"p50": None, "p99": None},
        load=Load(13.0, 2),
    )  # fmt: skip
    write_report(nothing, tmp_path / "demo.html")
    assert "The machine failed and nobody was warned" in (tmp_path / "demo.html").read_text()
    said = "\n".join(text(nothing, tmp_path / "demo.html"))
    assert "reading to prediction  no prediction was made" in said
    assert "- only 0 % of the running time was watched" in said
    assert (
        "The machine was busy (load 13.0 on 2 cores). Try it again when it is idle, or give the rig more time: "
        "--scale 0.25." in said.replace("\n", " ")
    )
    assert "--scale 0.06." in _said(replace(nothing, scale=0.25))
    assert "more time" not in _said(replace(nothing, scale=0.02)), "there is no slower pace"
    alone = _said(replace(nothing, load=Load(1.0, 2)))
    assert "was busy" not in alone
    assert "The machine is slow for this pace. Give the rig more time: --scale 0.25." in alone


def _said(told: Outcome) -> str:
    return " ".join(text(told, Path("demo.html")))


@pytest.mark.parametrize(("processes", "pace"), [(0.0, 1.0), (2.0, 1.0), (3.0, 0.67), (6.9, 0.29), (90.0, 0.1)])
def test_the_pace_follows_the_load(processes: float, pace: float) -> None:
    assert suitable_pace(Load(processes, 2)) == pace


@pytest.mark.parametrize(("scale", "times"), [(2.0, 1), (1.0, 1), (0.25, 4), (0.05, 20)])
def test_a_slower_rig_is_asked_and_waited_for_at_its_pace(tmp_path: Path, scale: float, times: int) -> None:
    path = write_config(tmp_path, tmp_path / "run", 1883, 5020, scale, None)
    config = load_config(path)
    options = config.assets[0].options
    shipped = tomllib.loads((files("millhand_plugins.rig") / "modbus_map.toml").read_text())["assets"]["options"]
    assert options["poll_ms"] == shipped["poll_ms"] * times
    assert options["timeout_ms"] == 1000 * times
    asked = [wave["every_ms"] for wave in shipped["waveforms"]]
    assert [wave["every_ms"] for wave in options["waveforms"]] == [every_ms * times for every_ms in asked]
    usual = ModelSettings()
    assert config.models.deadline_ms == usual.deadline_ms * times
    assert config.models.hang_ms == usual.hang_ms * times
    assert config.models.load_timeout_s == usual.load_timeout_s * times


def test_healthy_page_has_no_alert_and_no_spectrum(tmp_path: Path) -> None:
    path = tmp_path / "demo.html"
    healthy = outcome(fault="none", onset_s=None, failure_s=None, alerts=[], orders=[], waveform=None)
    assert healthy.good
    write_report(healthy, path)
    assert "A healthy life: nothing to report" in path.read_text()
    assert "The spectrum that proves it" not in path.read_text()


def test_a_run_is_good_only_if_the_main_job_was_done() -> None:
    assert outcome().good
    assert not outcome(alerts=[]).good
    assert not outcome(tally=Tally(10, 9, 1, 0, 0)).good
    assert not outcome(tally=Tally(10, 10, 0, 2, 0)).good
    early = {**outcome().alerts[0], "rig_time_s": 5.0, "lead_time_s": 30.0}
    assert not outcome(alerts=[early]).good, "an alert before the damage is a false one"
    assert not outcome(fault="none", onset_s=None, failure_s=None).good


def test_a_run_that_was_hardly_judged_is_not_good() -> None:
    blind = outcome(health=[(1.0, 0.1), (2.0, 0.1)])
    assert blind.watched_percent < 10
    assert not blind.good
    assert any("was watched" in line for line in text(blind, Path("demo.html")))
    assert outcome(signals={}).watched_percent == 0, "a machine that was never seen to run"


def test_a_line_breaks_at_gaps_and_ends_at_the_edge() -> None:
    drawn = Chart("t", [0, 1, 5, 6, 99], [1, 2, 3, 4, 5], "s", "g", x_low=0, x_high=10, gap=2).__html__()
    path = re.search(r'class="line" d="([^"]*)"', drawn)
    assert path is not None
    assert (path[1].count("M"), path[1].count("L")) == (2, 2)


def test_standstill_is_a_stretch_of_idle() -> None:
    speeds = [(0.0, 2900.0), (1.0, 0.0), (2.0, 0.0), (3.0, 2900.0)]
    assert outcome(signals={"speed": speeds}).idle == [(1.0, 2.0)]


def test_summary_holds_what_others_read(tmp_path: Path) -> None:
    facts = summary(outcome(), tmp_path / "demo.html")
    assert set(facts) >= {
        "profile", "models", "windows", "alerts", "false_alerts", "work_orders", "telemetry", "latency_ms", "rss_mb",
        "start_s", "broker", "report",
    }  # fmt: skip
    assert facts["alerts"] == [{"asset": "skid-1", "kind": "bearing_outer", "lead_time_s": 12.0}]
    assert set(facts["telemetry"]) == {"produced", "stored", "acked", "duplicates", "lost"}
    json.dumps(facts)
    assert all(len(line) <= 80 for line in text(outcome(), Path("demo.html")))


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_screen_in_chromium(tmp_path: Path, width: int) -> None:
    path = tmp_path / "demo.html"
    write_report(outcome(), path)
    laid_out, room = laid_out_px(path.read_text(), width, tmp_path)
    assert laid_out <= room, f"{width} pixels: the page is {laid_out} wide in {room}"
