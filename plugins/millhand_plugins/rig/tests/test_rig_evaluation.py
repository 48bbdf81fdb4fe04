"""What the rig's models are judged by: rows of lives that no training has seen."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
import pytest

from millhand.errors import InputError
from millhand.hookspecs import Examples
from millhand.serving.manifest import read_manifest
from millhand_plugins.rig import evaluation, millhand_evaluations, millhand_models, train, train_wave
from millhand_plugins.rig.asset import FAULTS
from millhand_plugins.rig.labels import LABELS, share_of_fault
from millhand_plugins.rig.operation import GRID_MS, RUNNING
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator

JUDGES = {judge.model: judge for judge in millhand_evaluations(None)}
(MODELS,) = millhand_models(None)


@pytest.fixture(scope="module", params=["rig-fault", pytest.param("rig-wave", marks=pytest.mark.long)])
def judged(request) -> tuple[str, Examples]:
    return request.param, JUDGES[request.param].examples(None)


def test_every_shipped_model_is_judged():
    assert sorted(JUDGES) == sorted(path.parent.name for path in MODELS.glob("*/model.toml"))
    assert {judge.metric for judge in JUDGES.values()} == {"accuracy"}


def test_rows_are_many_balanced_and_as_the_model_takes_them(judged):
    model, examples = judged
    manifest = read_manifest(MODELS / model)
    assert {spec.name for spec in manifest.inputs} == set(examples.held) == set(examples.calibration)
    for spec in manifest.inputs:
        for rows, least in ((examples.held[spec.name], 2000), (examples.calibration[spec.name], 512)):
            assert rows.dtype == np.float32
            assert rows.shape[1:] == spec.shape[1:]
            assert len(rows) >= least
            assert np.isfinite(rows).all()
    assert examples.truth.dtype == np.int64
    assert len(examples.truth) == len(examples.held[manifest.inputs[0].name])
    counts = np.bincount(examples.truth, minlength=len(LABELS))
    assert counts.min() > 0.9 * counts.max()


def test_the_truth_is_what_the_model_mostly_says(judged):
    model, examples = judged
    session = onnxruntime.InferenceSession(MODELS / model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], dict(examples.held))
    accuracy = float((logits.argmax(axis=1) == examples.truth).mean())
    # Damage that is only just visible is among the rows: a figure of 1 would tell nothing.
    assert 0.9 < accuracy < 1


def test_no_life_serves_twice():
    seeds = [
        evaluation.CALIBRATION_SEEDS,
        evaluation.HELD_SEEDS,
        train.VALIDATION_SEEDS,
        train_wave.VALIDATION_SEEDS,
    ]
    for training in (train.TRAIN_SEEDS, train_wave.TRAIN_SEEDS):
        assert not any(set(training) & set(others) for others in seeds)
    assert not set(evaluation.CALIBRATION_SEEDS) & set(evaluation.HELD_SEEDS)
    used = {*train.VALIDATION_SEEDS, *train_wave.VALIDATION_SEEDS, *range(200_000, 400_000)}
    assert not used & {*evaluation.CALIBRATION_SEEDS, *evaluation.HELD_SEEDS}
    assert max(*evaluation.CALIBRATION_SEEDS, *evaluation.HELD_SEEDS) < 1_000_000


@pytest.mark.parametrize("fault", FAULTS)
def test_only_what_shows_the_fault_is_looked_at(fault):
    simulator = Simulator(5, fault)
    counters = evaluation.chosen(simulator)
    assert len(counters) == len(set(counters)) == evaluation.WINDOWS_OF_A_LIFE
    for counter in counters:
        place = counter * SNAPSHOT_MS // GRID_MS
        assert simulator.operation.state[place] == RUNNING
        assert fault == "none" or share_of_fault(fault, simulator.operation.severity[place]) > 0.5
    assert evaluation.chosen(Simulator(5, fault)) == counters


def test_the_same_rows_each_time(monkeypatch):
    monkeypatch.setattr(evaluation, "CALIBRATION_SEEDS", range(3, 4))
    monkeypatch.setattr(evaluation, "HELD_SEEDS", range(4, 5))
    monkeypatch.setattr(evaluation, "WINDOWS_OF_A_LIFE", 2)
    for judge in JUDGES.values():
        first, second = judge.examples(None), judge.examples(None)
        assert np.array_equal(first.truth, second.truth)
        for part in ("calibration", "held"):
            for name, rows in getattr(first, part).items():
                assert np.array_equal(rows, getattr(second, part)[name])


def test_data_of_the_owner_is_refused():
    with pytest.raises(InputError, match=r"rig-wave.*simulator, not from 'rows.npz'"):
        JUDGES["rig-wave"].examples(Path("rows.npz"))
