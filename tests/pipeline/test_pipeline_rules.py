"""Decision rules: hysteresis, debounce, asset states, kinds, identity; and how outputs become values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import ConfigError, ModelError
from millhand.pipeline.judgement import judge
from millhand.pipeline.rules import RuleEngine, RuleState
from millhand.pipeline.settings import RuleOverride
from millhand.records import Alert, AlertState, AssetState, Prediction

RUL_OUTPUT = {"task": "regression", "output": "p", "value": "rul", "unit": "cycle", "low": 0, "high": 125}


@pytest.fixture
def engine(kit) -> Callable[..., RuleEngine]:
    def make(overrides: dict[str, RuleOverride] | None = None, **rule: Any) -> RuleEngine:
        changes: dict[str, Any] = {}
        if rule:
            changes["rules"] = [{"name": "fault", "value": "fault", **rule}]
        if "rul" in rule.get("value", ""):
            changes["prediction"] = RUL_OUTPUT
        return RuleEngine("pump", kit.manifest(**changes), overrides)

    return make


def prediction(second: int, fault: float, bearing: float | None = None, state: str = "running") -> Prediction:
    bearing = fault if bearing is None else bearing
    values = {"healthy": 1 - fault, "bearing": bearing, "looseness": fault - bearing, "fault": fault, "rul": fault}
    facts = {"velocity_rms_mm_s": float(second)}
    return Prediction("pump", "classifier", 1, second, second, values, state=AssetState(state), evidence=facts)


def run(rules: RuleEngine, *faults: float, first: int = 0, **changes: Any) -> list[Alert]:
    return [
        alert
        for second, fault in enumerate(faults, first)
        for alert in rules.judge(prediction(second, fault, **changes))
    ]


def test_an_alert_is_raised_after_m_of_n_and_cleared_after_a_run(engine) -> None:
    rules = engine(raise_above=0.8, clear_below=0.4, raise_after=3, of=5, clear_after=2)
    assert run(rules, 0.9, 0.1, 0.9, 0.1) == []
    (raised,) = run(rules, 0.95, first=4)
    assert (raised.state, raised.raised_ns, raised.changed_ns) == (AlertState.OPEN, 4, 4)
    assert raised.evidence["first_seen_ns"] == 0
    assert raised.evidence["windows_beyond"] == 3
    assert raised.evidence["measured"] == 0.95
    assert raised.evidence["limit"] == 0.8
    assert raised.evidence["facts"] == {"velocity_rms_mm_s": 4.0}
    assert run(rules, 0.3, 0.5, 0.3, first=5) == []
    (cleared,) = run(rules, 0.3, first=8)
    assert (cleared.id, cleared.state, cleared.raised_ns, cleared.changed_ns) == (raised.id, AlertState.CLEARED, 4, 8)


def test_old_windows_fall_out_of_the_count(engine) -> None:
    rules = engine(raise_above=0.8, raise_after=2, of=3)
    assert run(rules, 0.9, 0.1, 0.1, 0.9) == []
    assert len(run(rules, 0.9, first=4)) == 1


def test_between_the_limits_nothing_changes(engine) -> None:
    rules = engine(raise_above=0.8, clear_below=0.4, raise_after=1, clear_after=1)
    assert [alert.state for alert in run(rules, 0.8, 0.6, 0.81, 0.5, 0.4, 0.79, 0.39)] == ["open", "cleared"]


def test_a_rule_without_a_clear_limit_clears_below_its_raise_limit(engine) -> None:
    rules = engine(raise_above=0.8, raise_after=1, clear_after=2)
    assert [alert.state for alert in run(rules, 0.9, 0.7, 0.9, 0.7, 0.7)] == ["open", "cleared"]


def test_one_alert_is_open_at_most_and_keeps_its_kind(engine) -> None:
    rules = engine(raise_above=0.8, clear_below=0.4, raise_after=1, clear_after=1)
    (raised,) = run(rules, 0.9, 0.95, 0.99)
    assert raised.kind == "bearing"
    assert run(rules, 0.9, 0.9, bearing=0.0, first=3) == []
    (cleared,) = run(rules, 0.0, first=5)
    assert cleared.kind == "bearing"
    (again,) = run(rules, 0.9, bearing=0.0, first=6)
    assert again.kind == "looseness"
    assert again.id != raised.id


def test_the_kind_is_what_most_of_the_counted_windows_chose(engine) -> None:
    rules = engine(raise_above=0.8, raise_after=3)
    assert not run(rules, 0.9, bearing=0.1) and not run(rules, 0.9, bearing=0.2, first=1)
    (alert,) = run(rules, 0.9, bearing=0.8, first=2)
    assert alert.kind == "looseness"
    assert alert.evidence["kinds"] == {"looseness": 2, "bearing": 1}


def test_other_asset_states_are_neither_counted_nor_forgotten(engine) -> None:
    rules = engine(raise_above=0.8, raise_after=2, clear_after=2, states=["running"])
    assert run(rules, 0.9) == []
    assert run(rules, 0.9, 0.9, 0.9, state="idle", first=1) == []
    assert len(run(rules, 0.9, first=4)) == 1
    assert run(rules, 0.0, 0.0, 0.0, state="service", first=5) == []
    assert run(rules, 0.0, first=8) == []
    assert len(run(rules, 0.0, first=9)) == 1


def test_first_windows_are_passed_over(engine) -> None:
    rules = engine(raise_above=0.8, raise_after=1, min_windows=3)
    assert [alert.raised_ns for alert in run(rules, 0.9, 0.9, 0.9, 0.9)] == [3]


def test_a_falling_value_raises_below_its_limit(engine) -> None:
    rules = engine(
        value="rul", raise_below=30, clear_above=45, raise_after=2, clear_after=1, message="{asset} {value} {unit}"
    )
    (raised,) = run(rules, 31, 29, 30, 28, 27)
    assert (raised.raised_ns, raised.message, raised.kind) == (4, "pump 27 cycle", "fault")
    assert run(rules, 40, first=5) == []
    assert len(run(rules, 46, first=6)) == 1


def test_the_same_windows_give_the_same_alert(engine) -> None:
    first, second = (run(engine(raise_above=0.8, raise_after=2), 0.9, 0.9)[0] for _ in range(2))
    assert first == second
    (other,) = run(engine(raise_above=0.8, raise_after=1), 0.9)
    assert other.id != first.id


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(["running", "idle"]), st.booleans())))
@settings(max_examples=100, deadline=None)
def test_a_restart_at_any_window_changes_no_alert_and_states_alternate(kit, steps) -> None:
    undisturbed, restarted = (RuleEngine("pump", kit.manifest()) for _ in range(2))
    states = []
    for second, (fault, state, restart) in enumerate(steps):
        if restart:
            kept = msgspec.msgpack.encode(restarted.dump())
            restarted = RuleEngine("pump", kit.manifest())
            restarted.load(msgspec.msgpack.decode(kept, type=dict[str, RuleState]))
        expected = run(undisturbed, fault, state=state, first=second)
        assert run(restarted, fault, state=state, first=second) == expected
        states += [alert.state for alert in expected]
    assert states[::2] == ["open"] * len(states[::2])
    assert states[1::2] == ["cleared"] * len(states[1::2])


def test_the_owner_changes_and_silences_rules(engine) -> None:
    changed = engine({"fault": RuleOverride(raise_above=0.5, raise_after=1, of=1)})
    assert len(run(changed, 0.6)) == 1
    assert run(engine({"fault": RuleOverride(enabled=False)}), *[0.99] * 20) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"raise_below": 0.1}, "asset 'pump': rules.fault: .*exactly one of raise_above and raise_below"),
        ({"raise_above": 0.3}, "rule 'fault': clear_below = 0.4 lies above raise_above = 0.3"),
    ],
)
def test_an_override_that_cannot_work_is_refused(engine, override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        engine({"fault": RuleOverride(**override)})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"value": "falt", "raise_above": 1}, "value = 'falt' is not among .* did you mean 'fault'"),
        ({"raise_above": 1, "message": "{temperature} is high"}, "message = .*temperature"),
        ({"raise_above": 1, "message": "{asset"}, "message = "),
    ],
)
def test_a_rule_that_cannot_work_is_refused(engine, rule, message) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(**rule)


# ---- from outputs to values -----------------------------------------------------------------------------------------


def test_probabilities_become_named_values_kind_and_confidence(kit) -> None:
    ((values, kind, confidence),) = judge(kit.manifest(), {"p": np.array([[0.1, 0.7, 0.2]], np.float32)}, 1)
    assert values == pytest.approx({"healthy": 0.1, "bearing": 0.7, "looseness": 0.2, "fault": 0.9})
    assert (kind, confidence) == ("bearing", pytest.approx(0.7))


def test_logits_go_through_a_softmax_that_does_not_overflow(kit) -> None:
    output = kit.manifest().prediction.model_dump() | {"softmax": True}
    answers = judge(kit.manifest(prediction=output), {"p": np.array([[1000.0, 0, 0], [0, 0, 0]])}, 2)
    assert answers[0][0]["healthy"] == 1
    assert answers[1][0]["bearing"] == pytest.approx(1 / 3)


def test_a_regression_is_scaled_and_clipped(kit) -> None:
    model = kit.manifest(prediction={**RUL_OUTPUT, "scale": 10}, rules=[])
    answers = judge(model, {"p": np.array([[-1.0], [3.0], [99.0]])}, 3)
    assert [values for values, _, _ in answers] == [{"rul": 0}, {"rul": 30}, {"rul": 125}]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"q": np.zeros((1, 3))}, "output 'p' is not among"),
        ({"p": np.zeros((1, 4))}, r"shape \[1, 4\], wanted \[1, 3\]"),
        ({"p": np.array([[0.5, np.nan, 0.5]])}, "not finite"),
    ],
)
def test_an_output_that_cannot_be_read_is_the_models_fault(kit, outputs, message) -> None:
    with pytest.raises(ModelError, match=message):
        judge(kit.manifest(), outputs, 1)
