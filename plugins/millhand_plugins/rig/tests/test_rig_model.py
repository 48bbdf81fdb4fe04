"""The extractor and the shipped classifier, judged by the rule of model.toml over lives that training never saw."""

from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from millhand.errors import ConfigError
from millhand.records import AssetState, Waveform
from millhand.serving.manifest import read_manifest
from millhand_plugins.rig import labels, millhand_models, train, trial
from millhand_plugins.rig.asset import FAULTS
from millhand_plugins.rig.bearing import BearingGeometry
from millhand_plugins.rig.extractor import FEATURES, RigExtractor, measure
from millhand_plugins.rig.lives import Moment, moments
from millhand_plugins.rig.simulator import Simulator

SEEDS = (200_000, 200_001)
MODEL = train.FOLDER / "1" / "model.onnx"


def a_moment(fault: str = "none", counter: int = 60, seed: int = 31) -> Moment:
    return next(moments(Simulator(seed, fault), [counter]))


@pytest.mark.parametrize("fault", FAULTS)
def test_lives_are_judged_rightly_and_in_time(fault):
    for seed in SEEDS:
        result = trial.judge_life(trial.Trial(seed, fault, train.FOLDER, MODEL))
        assert trial.right(result), result


def test_the_summary_counts_late_wrong_and_false_alerts():
    lives = [
        {"seed": 1, "fault": fault, "alerts": 1, "kind": fault, "degradation": 0.5}
        for fault in FAULTS
        if fault != "none"
    ]
    lives += [
        {"seed": 2, "fault": "imbalance", "alerts": 1, "kind": "looseness", "degradation": 0.9},
        {"seed": 3, "fault": "imbalance", "alerts": 1, "kind": "imbalance", "degradation": -0.1},
        {"seed": 4, "fault": "imbalance", "alerts": 0},
        {"seed": 5, "fault": "none", "alerts": 2, "kind": "imbalance", "degradation": 0.1},
        {"seed": 6, "fault": "none", "alerts": 0},
    ]
    assert [trial.right(life) for life in lives[5:]] == [False, False, False, False, True]
    found = trial.summary(lives)
    assert found["detected"] == 6 / 8
    assert found["right_kind"] == pytest.approx(5 / 6)
    assert (found["false_alerts_before_onset"], found["false_alerts_healthy"]) == (1, 2)
    assert found["place_of_alert"]["imbalance"] == {"median": pytest.approx(0.7), "latest": 0.9}


def test_model_and_manifest_agree():
    manifest = read_manifest(train.FOLDER)
    assert millhand_models(None) == [train.FOLDER.parent]
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    (given,), (answered,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:]) == (manifest.inputs[0].name, list(manifest.inputs[0].shape[1:]))
    assert (answered.name, answered.shape[1:]) == (manifest.outputs[0].name, list(manifest.outputs[0].shape[1:]))
    assert manifest.inputs[0].shape == (-1, FEATURES)
    assert manifest.prediction is not None
    assert manifest.prediction.labels == labels.LABELS
    assert set(labels.LABELS) - {"healthy"} == set(FAULTS) - {"none"}
    for batch in (1, 7):
        assert session.run(None, {given.name: np.zeros((batch, FEATURES), np.float32)})[0].shape == (batch, 6)


def test_the_model_is_small_and_made_of_portable_operators():
    assert MODEL.stat().st_size < 1_000_000
    assert {node.op_type for node in onnx.load(MODEL).graph.node} <= {"Gemm", "MatMul", "Conv", "Relu", "Add", "Mul"}


def test_training_keeps_off_the_seeds_of_the_evaluation():
    assert max(train.TRAIN_SEEDS) < min(train.VALIDATION_SEEDS)
    assert max(*train.TRAIN_SEEDS, *train.VALIDATION_SEEDS, *SEEDS) < 1_000_000
    assert not set(SEEDS) & {*train.TRAIN_SEEDS, *train.VALIDATION_SEEDS}


def test_labels_fade_with_severity():
    assert labels.share_of_fault("none", 0.0) == 0
    low, high = labels.FADE["imbalance"]
    assert labels.share_of_fault("imbalance", low) == 0
    assert labels.share_of_fault("imbalance", (low + high) / 2) == pytest.approx(0.5)
    assert labels.share_of_fault("imbalance", 1.3) == 1


def test_features_and_evidence():
    found = RigExtractor().extract(a_moment("bearing_outer", 68).window)
    assert found is not None
    assert found.tensors["features"].shape == (FEATURES,)
    assert found.tensors["features"].dtype == np.float32
    evidence = found.evidence
    assert evidence["envelope_bpfo_over_floor"] > 8 > 2 * evidence["envelope_bpfi_over_floor"]
    assert evidence["bpfo_hz"] == pytest.approx(evidence["shaft_hz"] * BearingGeometry().bpfo)
    assert 0 < evidence["velocity_rms_mm_s"] < 3
    assert evidence["acceleration_kurtosis"] > 4


def test_features_do_not_depend_on_the_speed_scale():
    """The same order spectrum at 80 % of the speed: time stretched, velocity kept."""
    rate, turns = 10_240.0, np.arange(4096) / 10_240.0
    vectors = []
    for hz in (48.0, 38.4):
        signal = sum(
            level * order * hz * np.cos(2 * np.pi * order * hz * turns) for order, level in ((1, 0.02), (2, 0.01))
        )
        found = measure(np.stack([signal, 0.5 * signal]), rate, hz, BearingGeometry(), (1500.0, 5000.0))
        vectors.append(found.lines_mm_s[:, [1, 3]])
    assert vectors[0] == pytest.approx(vectors[1], rel=0.01)


def test_another_bearing_is_looked_for_elsewhere():
    window = a_moment("bearing_outer", 68).window
    other = {"bearing": {"balls": 14, "ball_diameter_mm": 6.0}}
    found = RigExtractor().extract(replace(window, context=other))
    assert found is not None
    assert found.evidence["envelope_bpfo_over_floor"] < 8
    assert found.evidence["bpfo_hz"] > 5 * found.evidence["shaft_hz"]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"bearing": {"bals": 9}}, "did you mean 'balls'"),
        ({"bearing": {"ball_diameter_mm": 50.0}}, "smaller than pitch_diameter_mm"),
        ({"resonance_hz": [5000.0, 1500.0]}, "low < high"),
    ],
)
def test_a_wrong_context_is_named(context, message):
    with pytest.raises(ConfigError, match=message):
        RigExtractor().extract(replace(a_moment().window, context=context))


def test_what_cannot_be_judged_is_not_judged():
    window = a_moment().window
    extract = RigExtractor().extract
    assert extract(window) is not None
    speed = window.signals["speed"]
    late = delayed(window.waveforms["vibration_axial"], 500_000_000)
    for changed in (
        replace(window, state=AssetState.IDLE),
        replace(window, state=AssetState.SETUP),
        replace(window, signals={}),
        replace(window, signals={"speed": np.full_like(speed, np.nan)}),
        replace(window, signals={"speed": np.full_like(speed, 300.0)}),
        replace(window, signals={"speed": np.linspace(2000, 2900, len(speed))}),
        replace(window, waveforms={}),
        replace(window, waveforms={"vibration_de": window.waveforms["vibration_de"]}),
        replace(window, waveforms={**window.waveforms, "vibration_axial": late}),
    ):
        assert extract(changed) is None


def test_gaps_in_the_speed_do_not_matter():
    window = a_moment().window
    speed = window.signals["speed"].copy()
    speed[::2] = np.nan
    found = RigExtractor().extract(replace(window, signals={"speed": speed}))
    whole = RigExtractor().extract(window)
    assert found is not None
    assert whole is not None
    assert found.evidence["shaft_hz"] == pytest.approx(whole.evidence["shaft_hz"], rel=1e-3)


def delayed(waveform: Waveform, later_ns: int) -> Waveform:
    clock = msgspec.structs.replace(waveform.clock, source_ns=waveform.clock.source_ns + later_ns)
    return msgspec.structs.replace(waveform, clock=clock)
