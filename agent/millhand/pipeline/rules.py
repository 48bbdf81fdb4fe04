"""Decision rules: predictions in, alerts raised and cleared.

A rule counts how many of its last `of` judged windows lie beyond the raise limit; `raise_after` of them, the newest
among them, raise the alert. `clear_after` windows in a row beyond the clear limit end it. In asset states that the
rule does not name it neither counts nor forgets. An alert keeps the kind it was raised with until it is cleared; a
rule has one open alert at most.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from millhand.errors import ConfigError, suggestion
from millhand.pipeline.judgement import FAULT, fault_kind, output_spec
from millhand.pipeline.settings import RuleOverride
from millhand.records import Alert, AlertState, Prediction
from millhand.serving.manifest import Manifest, OutputSpec, RuleSpec
from millhand.validation import validate

# Alert ids are UUIDs of version 5 (RFC 9562) in this namespace, so that a replay raises the same alert.
NAMESPACE = uuid.UUID("6f1cf9d2-58a4-5b8e-9c0f-7f0f3f6a2d11")


class Judged(msgspec.Struct, array_like=True):
    """One judged window as a rule remembers it."""

    end_ns: int
    beyond: bool
    kind: str


class RuleState(msgspec.Struct, array_like=True):
    """What a rule remembers between two windows."""

    windows: int = 0
    recent: list[Judged] = []
    clear_run: int = 0
    alert: Alert | None = None


class RuleEngine:
    """The rules of one model on one asset."""

    def __init__(self, asset: str, manifest: Manifest, overrides: Mapping[str, RuleOverride] | None = None) -> None:
        """`overrides`: rule name -> the owner's changes; names of other models' rules are passed over.

        Raises ConfigError for a rule that cannot work, as shipped or as changed.
        """
        self._asset = asset
        self._spec = output_spec(manifest)
        self._rules = list(_overridden(asset, manifest, overrides or {}))
        for rule in self._rules:
            _check(rule, self._spec, f"model '{manifest.name}': rule '{rule.name}'")
        self._states = {rule.name: RuleState() for rule in self._rules}

    def judge(self, prediction: Prediction) -> list[Alert]:
        """Take one prediction; return the alerts that it raises or clears."""
        changed = []
        for rule in self._rules:
            alert = self._apply(rule, self._states[rule.name], prediction)
            if alert is not None:
                changed.append(alert)
        return changed

    def dump(self) -> dict[str, RuleState]:
        return self._states

    def load(self, states: Mapping[str, RuleState]) -> None:
        """Go on from a dump; rules that are new begin anew, rules that are gone are forgotten."""
        self._states = {rule.name: states.get(rule.name, RuleState()) for rule in self._rules}

    def _apply(self, rule: RuleSpec, state: RuleState, prediction: Prediction) -> Alert | None:
        value = prediction.values.get(rule.value)
        if prediction.state not in rule.states or value is None:
            return None
        state.windows += 1
        if state.windows <= rule.min_windows:
            return None
        if state.alert is not None:
            return self._maybe_clear(rule, state, prediction, value)
        kind = rule.kind or fault_kind(self._spec, prediction.values)
        state.recent.append(Judged(prediction.window_end_ns, _beyond_raise(rule, value), kind))
        del state.recent[: -max(rule.of, rule.raise_after)]
        counted = [judged for judged in state.recent if judged.beyond]
        if not state.recent[-1].beyond or len(counted) < rule.raise_after:
            return None
        state.alert = self._alert(rule, prediction, value, counted)
        state.recent, state.clear_run = [], 0
        return state.alert

    def _maybe_clear(self, rule: RuleSpec, state: RuleState, prediction: Prediction, value: float) -> Alert | None:
        state.clear_run = state.clear_run + 1 if _beyond_clear(rule, value) else 0
        if state.clear_run < rule.clear_after or state.alert is None:
            return None
        cleared = msgspec.structs.replace(state.alert, state=AlertState.CLEARED, changed_ns=prediction.window_end_ns)
        state.alert, state.recent, state.clear_run = None, [], 0
        return cleared

    def _alert(self, rule: RuleSpec, prediction: Prediction, value: float, counted: list[Judged]) -> Alert:
        kinds = Counter(judged.kind for judged in counted)
        kind = kinds.most_common(1)[0][0] or rule.name
        raised_ns = prediction.window_end_ns
        limit = rule.raise_above if rule.raise_above is not None else rule.raise_below
        evidence: dict[str, Any] = {
            "value": rule.value,
            "measured": value,
            "limit": limit,
            "unit": self._spec.unit,
            "windows_beyond": len(counted),
            "windows_looked_at": max(rule.of, rule.raise_after),
            "first_seen_ns": counted[0].end_ns,
            "kinds": dict(kinds),
            "facts": dict(prediction.evidence),
        }
        message = _message(rule, self._asset, kind, value, self._spec.unit)
        name = f"{self._asset}\0{prediction.model}\0{rule.name}\0{raised_ns}"
        return Alert(
            id=str(uuid.uuid5(NAMESPACE, name)),
            asset=self._asset,
            model=prediction.model,
            rule=rule.name,
            kind=kind,
            severity=rule.severity,
            message=message,
            raised_ns=raised_ns,
            changed_ns=raised_ns,
            evidence=evidence,
        )


def _overridden(asset: str, manifest: Manifest, overrides: Mapping[str, RuleOverride]) -> Iterable[RuleSpec]:
    for rule in manifest.rules:
        override = overrides.get(rule.name)
        if override is None:
            yield rule
        elif override.enabled:
            changes = override.model_dump(exclude={"enabled"}, exclude_none=True)
            source = f"asset '{asset}': rules.{rule.name}"
            yield validate(RuleSpec, {**rule.model_dump(exclude_none=True), **changes}, source)


def _check(rule: RuleSpec, spec: OutputSpec, source: str) -> None:
    known = [spec.value]
    if spec.task == "classification":
        known = [*([FAULT] if spec.healthy in spec.labels else []), *spec.labels]
    if rule.value not in known:
        raise ConfigError(
            f"{source}: value = '{rule.value}' is not among the model's outputs{suggestion(rule.value, known)}",
            hint=f"write one of {', '.join(known)}",
        )
    above, below = rule.raise_above, rule.raise_below
    if above is not None and rule.clear_below is not None and rule.clear_below > above:
        raise ConfigError(
            f"{source}: clear_below = {rule.clear_below:g} lies above raise_above = {above:g}",
            hint="an alert must not clear where it is raised: lower clear_below",
        )
    if below is not None and rule.clear_above is not None and rule.clear_above < below:
        raise ConfigError(
            f"{source}: clear_above = {rule.clear_above:g} lies below raise_below = {below:g}",
            hint="an alert must not clear where it is raised: raise clear_above",
        )
    try:
        _message(rule, "", "", 0.0, "")
    except (LookupError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{source}: message = '{rule.message}' cannot be filled in: {error!r}",
            hint="use {asset}, {kind}, {value} and {unit} only; write {{ for a brace",
        ) from error


def _message(rule: RuleSpec, asset: str, kind: str, value: float, unit: str) -> str:
    text = rule.message or "{asset}: {kind}, {value} {unit}"
    return text.format(asset=asset, kind=kind.replace("_", " "), value=f"{value:.3g}", unit=unit).strip()


def _beyond_raise(rule: RuleSpec, value: float) -> bool:
    if rule.raise_above is not None:
        return value > rule.raise_above
    return rule.raise_below is not None and value < rule.raise_below


def _beyond_clear(rule: RuleSpec, value: float) -> bool:
    """Without a clear limit of its own the raise limit serves."""
    if rule.raise_above is not None:
        return value < (rule.raise_above if rule.clear_below is None else rule.clear_below)
    assert rule.raise_below is not None
    return value > (rule.raise_below if rule.clear_above is None else rule.clear_above)
