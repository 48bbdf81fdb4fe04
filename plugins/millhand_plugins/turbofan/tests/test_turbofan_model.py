"""The shipped model: what it is made of, that it answers, and how well on the official test sets."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from millhand.errors import InputError
from millhand.pipeline.rules import RuleEngine
from millhand.records import Prediction
from millhand.serving.manifest import read_manifest
from millhand_plugins.turbofan import cmapss, folds, millhand_extractors, millhand_models
from millhand_plugins.turbofan.extractor import FEATURE_COUNT, WINDOW_CYCLES
from millhand_plugins.turbofan.fleet import SENSORS, SETTINGS

DATA = os.environ.get("MILLHAND_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MILLHAND_DATA names no folder of data sets")
FOLDER = Path(DATA) / "cmapss"
MODEL = folds.MODEL_FOLDER / "1" / "model.onnx"
# What every hardware path can take: no loop, no recurrence, no tree.
ALLOWED_OPS = {"Gemm", "Mul", "Add", "Sigmoid", "Clip"}
RMSE_GOALS = {"FD001": 11.5, "FD002": 12.5, "FD004": 12.5}
FD003_GOAL = 11.5
CUT_SEED = 1


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session():
    return session_of(MODEL)


def features_of(engine: cmapss.Engine, cycle: int) -> np.ndarray:
    [extractor] = millhand_extractors()
    return extractor.extract(engine.window(cycle, WINDOW_CYCLES)).tensors["features"]


def answers_of(session, features) -> np.ndarray:
    [rul] = session.run(["rul"], {"features": np.stack(features)})
    return rul[:, 0].astype(float)


def test_the_manifest_fits_the_artifact_and_the_extractor(session):
    [models] = millhand_models()
    manifest = read_manifest(models / "turbofan-rul")
    [extractor] = millhand_extractors()
    assert manifest.features.extractor == extractor.name
    assert manifest.window.signals == (*SETTINGS, *SENSORS)
    assert manifest.window.length == WINDOW_CYCLES
    assert manifest.window.min_length == 1
    assert [(spec.name, spec.shape) for spec in manifest.inputs] == [("features", (-1, FEATURE_COUNT))]
    assert [port.name for port in session.get_inputs()] == ["features"]
    assert [(port.name, port.shape[1]) for port in session.get_outputs()] == [("rul", 1)]
    assert session.get_inputs()[0].shape[1] == FEATURE_COUNT
    assert {rule.value for rule in manifest.rules} == {manifest.prediction.value}


def test_the_artifact_is_small_and_made_of_plain_operators():
    assert MODEL.stat().st_size < 1_000_000
    model = onnx.load(str(MODEL))
    assert {node.op_type for node in model.graph.node} <= ALLOWED_OPS
    assert {entry.domain for entry in model.opset_import} == {""}
    assert all(weight.data_type == onnx.TensorProto.FLOAT for weight in model.graph.initializer)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_any_batch_gives_the_same_answers(session, batch):
    features = np.random.default_rng(3).normal(size=(batch, FEATURE_COUNT)).astype(np.float32)
    together = answers_of(session, features)
    alone = [answers_of(session, [row])[0] for row in features]
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert ((together >= 0) & (together <= 125)).all()


def test_the_answer_is_the_mean_of_the_five_nets(session, tmp_path):
    features = np.random.default_rng(4).normal(size=(20, FEATURE_COUNT)).astype(np.float32)
    singles = []
    for fold in range(folds.FOLDS):
        folds.cut_net(fold, tmp_path / f"{fold}.onnx")
        singles.append(answers_of(session_of(tmp_path / f"{fold}.onnx"), features))
    np.testing.assert_allclose(answers_of(session, features), np.mean(singles, axis=0), atol=1e-3)
    assert np.std(singles, axis=0).max() > 0.1


def test_every_engine_is_held_out_once():
    for subset, engines in {"FD001": 100, "FD002": 260, "FD003": 100, "FD004": 249}.items():
        units = [unit for fold in range(folds.FOLDS) for unit in folds.held_out(subset, fold)]
        assert sorted(units) == list(range(1, engines + 1))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"train_FD001\.txt") as caught:
        cmapss.read_engines(tmp_path, "train", "FD001")
    assert caught.value.hint


class TestSet:
    """The official test set of one subset: each engine up to its last recorded cycle, and its RUL capped at 125."""

    __test__ = False

    def __init__(self, subset: str) -> None:
        self.engines = cmapss.read_engines(FOLDER, "test", subset)
        self.capped = np.minimum(cmapss.read_table(FOLDER, f"RUL_{subset}.txt")[:, 0], 125)
        assert len(self.engines) == len(self.capped)

    def rmse(self, session, without: str = "", unseen: int = 0) -> float:
        """`without`: a sensor that was never measured; `unseen`: cycles flown before the agent came."""
        [extractor] = millhand_extractors()
        features, capped = [], []
        for engine, true in zip(self.engines, self.capped, strict=True):
            cycles = len(engine.table) - unseen
            if cycles < cmapss.SHORTEST_HISTORY_CYCLES:
                continue
            window = engine.window(len(engine.table), min(cycles, WINDOW_CYCLES))
            if without:
                window.signals[without][:] = np.nan
            features.append(extractor.extract(window).tensors["features"])
            capped.append(true)
        return float(np.sqrt(np.mean((answers_of(session, features) - capped) ** 2)))


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("subset", sorted(RMSE_GOALS))
def test_rmse_on_the_official_test_set(session, subset):
    rmse = TestSet(subset).rmse(session)
    assert rmse <= RMSE_GOALS[subset]


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("sensor", SENSORS)
def test_one_dead_sensor_costs_little(session, sensor):
    assert TestSet("FD001").rmse(session, without=sensor) <= RMSE_GOALS["FD001"]


@needs_data
@pytest.mark.data
def test_an_engine_met_late_is_still_judged(session):
    assert TestSet("FD002").rmse(session, unseen=50) <= 15


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("subset", ["FD001", "FD004"])
def test_held_out_engines_are_alerted_once_and_in_time(subset, tmp_path):
    engines = {engine.unit: engine for engine in cmapss.read_engines(FOLDER, "train", subset)}
    manifest = read_manifest(folds.MODEL_FOLDER)
    folds.cut_net(0, tmp_path / "net.onnx")
    net = session_of(tmp_path / "net.onnx")
    for unit in folds.held_out(subset, 0)[:5]:
        life = len(engines[unit].table)
        answers = answers_of(net, [features_of(engines[unit], cycle) for cycle in range(1, life + 1)])
        rules, leads = RuleEngine("engine", manifest), []
        for cycle, rul in enumerate(answers, start=1):
            end_ns = cycle * cmapss.CYCLE_NS
            prediction = Prediction("engine", manifest.name, 1, end_ns, end_ns, {"rul": float(rul)})
            leads += [life - cycle for alert in rules.judge(prediction) if alert.rule == "rul_low"]
        assert len(leads) == 1, f"unit {unit}: {leads}"
        assert 10 <= leads[0] <= 50, f"unit {unit}"


@needs_data
@pytest.mark.data
def test_rmse_on_held_out_engines_of_fd003(tmp_path):
    engines = {engine.unit: engine for engine in cmapss.read_engines(FOLDER, "train", "FD003")}
    generator = np.random.default_rng(CUT_SEED)
    errors = []
    for fold in range(folds.FOLDS):
        units = folds.held_out("FD003", fold)
        lives = [len(engines[unit].table) for unit in units]
        true = np.array([generator.integers(6, min(145, life - 19) + 1) for life in lives])
        folds.cut_net(fold, tmp_path / "net.onnx")
        features = [features_of(engines[unit], life - rul) for unit, life, rul in zip(units, lives, true, strict=True)]
        errors.extend(answers_of(session_of(tmp_path / "net.onnx"), features) - np.minimum(true, 125))
    assert len(errors) == 100
    rmse = np.sqrt(np.mean(np.square(errors)))
    assert rmse <= FD003_GOAL, f"seed {CUT_SEED}"


@needs_data
@pytest.mark.data
def test_the_shortest_history_is_answered(session):
    engines = cmapss.read_engines(FOLDER, "test", "FD004")
    shortest = min(engines, key=lambda engine: len(engine.table))
    assert len(shortest.table) == 19
    answers = answers_of(session, [features_of(shortest, cycle) for cycle in range(1, 20)])
    assert np.isfinite(answers).all()
