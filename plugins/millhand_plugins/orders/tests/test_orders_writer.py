"""Work orders: deterministic, every number from the evidence, the owner's knowledge wins."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import millhand_plugins.orders as plugin
from millhand.errors import ConfigError
from millhand.records import Alert, AlertState, Severity
from millhand.serving.manifest import read_manifest
from millhand_plugins.orders.writer import GENERAL, DeterministicWriter, read_knowledge

FACTS = {
    "velocity_rms_mm_s": 4.237,
    "velocity_1x_mm_s": 3.9,
    "envelope_bpfo_over_floor": 12.61,
    "envelope_bpfo_g": 0.0123,
    "bpfo_hz": 88.44,
    "acceleration_kurtosis": 7.2,
    "shaft_hz": 24.8,
}
SERIAL = itertools.count()


def alert(kind: str = "bearing_outer", facts: object = FACTS, **changes: object) -> Alert:
    values = {
        "id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
        "asset": "pump-3",
        "model": "rig-fault",
        "rule": "fault",
        "kind": kind,
        "severity": Severity.WARNING,
        "message": f"pump-3: {kind.replace('_', ' ')}, certainty 0.97",
        "raised_ns": 1_700_000_000_000_000_000,
        "evidence": {"measured": 0.971, "limit": 0.8, "facts": facts},
    }
    return Alert(**{**values, **changes})


def earlier(kind: str = "bearing_outer") -> Alert:
    return alert(kind, id=f"7c9e6679-7425-40de-944b-{next(SERIAL):012d}", state=AlertState.CLEARED)


@pytest.fixture(scope="module")
def writer() -> DeterministicWriter:
    return DeterministicWriter(read_knowledge())


def numbers(text: str) -> list[float]:
    """The numbers of a text: not those inside a name (`s11`, `pump-3`, `1x`)."""
    return [float(found) for found in re.findall(r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w|\.\d)", text)]


def test_order_says_what_where_and_how_urgent(writer: DeterministicWriter) -> None:
    order = writer.write(alert(), [])
    assert order.symptom == (
        "pump-3: repeated impacts at the rate at which rolling elements pass the outer race of the drive-end bearing. "
        "Measured: envelope bpfo over floor 12.6, envelope bpfo 0.0123 g, bpfo 88.4 Hz, velocity rms 4.24 mm/s."
    )
    assert "outer race" in order.likely_cause
    assert order.action
    assert order.priority == 2
    assert (order.asset, order.alert_id, order.created_ns) == ("pump-3", alert().id, alert().raised_ns)
    assert order.evidence["facts"] == FACTS
    assert order.writer == "deterministic"


def test_same_alert_gives_the_same_order_with_the_same_id(writer: DeterministicWriter) -> None:
    history = [earlier(), earlier("looseness")]
    again = DeterministicWriter(read_knowledge())
    assert msgspec.msgpack.encode(writer.write(alert(), history)) == msgspec.msgpack.encode(
        again.write(alert(), history)
    )
    assert writer.write(earlier(), []).id != writer.write(alert(), []).id


@given(
    values=st.lists(st.floats(-1e9, 1e9).filter(lambda value: abs(value) > 1e-6), min_size=7, max_size=7),
    kind=st.sampled_from(sorted(read_knowledge())),
    repeats=st.integers(0, 9),
)
def test_every_number_that_is_filled_in_stands_in_the_evidence(values: list[float], kind: str, repeats: int) -> None:
    facts = dict(zip(FACTS, values, strict=True)) | {"s11_drift_sigma": values[0], "observed_cycles": values[1]}
    writer, knowledge = DeterministicWriter(read_knowledge()), read_knowledge()
    subject = alert(kind, facts, message="pump-3: certainty 0.971")
    order = writer.write(subject, [earlier(kind) for _ in range(repeats)])
    known = knowledge[kind]
    told = numbers(order.symptom.removeprefix(known.symptom))
    told += numbers(" ".join(order.action[len(known.action) :]))
    assert bool(told) == ("Measured" in order.symptom or "{message}" in known.symptom or repeats > 1)
    evidence = [0.971, *facts.values(), order.evidence["earlier_alerts"]]
    for number in told:
        assert any(number == pytest.approx(value, rel=6e-3) for value in evidence), (number, order.symptom)


def test_wear_reads_well(writer: DeterministicWriter) -> None:
    facts = {"s11_drift_sigma": 3.21, "s4_drift_sigma": 2.9, "s12_drift_sigma": -2.55, "observed_cycles": 168.0}
    message = "engine-7: about 22.4 cycles of life are left; plan the shop visit"
    order = writer.write(alert("wear", facts, asset="engine-7", message=message), [])
    assert order.symptom == (
        f"{message}. Measured: s11 drift 3.21 sigma, s4 drift 2.9 sigma, s12 drift -2.55 sigma, observed 168 cycles."
    )


@pytest.mark.parametrize(
    ("severity", "repeats", "priority"),
    [
        (Severity.CRITICAL, 0, 1),
        (Severity.CRITICAL, 5, 1),
        (Severity.WARNING, 1, 2),
        (Severity.WARNING, 2, 1),
        (Severity.INFO, 0, 4),
        (Severity.INFO, 2, 3),
    ],
)
def test_priority_follows_severity_and_repetition(
    writer: DeterministicWriter, severity: Severity, repeats: int, priority: int
) -> None:
    history = [*(earlier() for _ in range(repeats)), earlier("looseness"), earlier("imbalance")]
    order = writer.write(alert(severity=severity), history)
    assert order.priority == priority
    assert order.evidence["earlier_alerts"] == repeats
    assert ("before" in order.action[-1]) == bool(repeats)


def test_unknown_kind_is_written_with_the_general_entry(writer: DeterministicWriter) -> None:
    order = writer.write(alert("seal_leak"), [])
    assert order.symptom == "pump-3: seal leak, certainty 0.97."
    assert order.likely_cause == read_knowledge()[GENERAL].likely_cause


@pytest.mark.parametrize("facts", [{}, {"velocity_rms_mm_s": float("nan")}, {"velocity_rms_mm_s": "much"}])
def test_facts_that_are_missing_or_no_numbers_are_not_quoted(writer: DeterministicWriter, facts: object) -> None:
    assert "Measured" not in writer.write(alert("imbalance", facts), []).symptom


def test_alert_without_facts_gets_an_order(writer: DeterministicWriter) -> None:
    assert writer.write(alert(evidence={}), []).symptom.startswith("pump-3: repeated impacts")


def test_every_kind_that_a_shipped_model_names_is_known() -> None:
    known = read_knowledge()
    for path in Path(plugin.__file__).parents[1].glob("*/models/*/model.toml"):
        manifest = read_manifest(path.parent)
        assert manifest.prediction is not None
        kinds = {rule.kind for rule in manifest.rules if rule.kind}
        kinds |= set(manifest.prediction.labels) - {manifest.prediction.healthy}
        assert kinds <= known.keys(), path


def test_own_knowledge_adds_and_wins(tmp_path: Path) -> None:
    own = tmp_path / "faults.toml"
    own.write_text(
        '[kinds.cavitation]\nsymptom = "{asset}: rattles."\nlikely_cause = "Strainer."\naction = ["Clean it."]\n'
        'facts = ["shaft_*"]\n[kinds.imbalance]\nsymptom = "ours"\nlikely_cause = "x"\naction = ["y"]\n'
    )
    (ours,) = plugin.millhand_order_writers(plugin.OrdersConfig(knowledge=own))
    assert ours.write(alert("cavitation"), []).symptom == "pump-3: rattles. Measured: shaft 24.8 Hz."
    assert ours.write(alert("imbalance"), []).symptom == "ours"
    assert ours.write(alert("looseness"), []).likely_cause == read_knowledge()["looseness"].likely_cause


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, "faults.toml"),
        ("kinds = 3", "key 'kinds'"),
        ('[kinds.x]\nsymptom = "s"\nlikely_cause = "c"\naction = []', "kinds.x.action"),
        ('[kinds.x]\nsymptom = "s"\ncause = "c"\naction = ["a"]', "kinds.x.cause"),
        ("[kinds", "not valid TOML"),
    ],
)
def test_bad_knowledge_is_refused_naming_file_and_key(tmp_path: Path, text: str | None, names: str) -> None:
    own = tmp_path / "faults.toml"
    if text is not None:
        own.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(names)) as caught:
        read_knowledge(own)
    assert "faults.toml" in caught.value.message
    assert caught.value.hint
