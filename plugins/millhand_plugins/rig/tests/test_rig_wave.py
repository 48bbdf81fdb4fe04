"""The waveform extractor and rig-wave: judged over lives that training never saw, and in a running agent."""

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
from millhand.records import AssetState
from millhand.serving.manifest import read_manifest
from millhand_plugins.rig import train, train_wave, trial
from millhand_plugins.rig.asset import FAULTS
from millhand_plugins.rig.labels import LABELS
from millhand_plugins.rig.lives import Moment, moments
from millhand_plugins.rig.simulator import G_PER_COUNT, Simulator
from millhand_plugins.rig.vibration import SAMPLE_RATE_HZ
from millhand_plugins.rig.waveform import KNEE_G, WAVEFORM_SAMPLES, WaveformExtractor, bend

SEEDS = (200_000, 200_001)
MODEL = train_wave.FOLDER / "1" / "model.onnx"
extract = WaveformExtractor().extract


def a_moment(fault: str = "none", counter: int = 60, seed: int = 31) -> Moment:
    return next(moments(Simulator(seed, fault), [counter]))


# ---- the extractor --------------------------------------------------------------------------------------------------


def test_the_newest_samples_on_a_bent_scale():
    simulator = Simulator(31, "bearing_outer")
    window = next(moments(simulator, [68])).window
    found = extract(window)
    assert found is not None
    waveform = found.tensors["waveform"]
    assert (waveform.shape, waveform.dtype) == ((2, WAVEFORM_SAMPLES), np.float32)
    counts = simulator.snapshot(68).counts[:, -WAVEFORM_SAMPLES:]
    assert np.sinh(waveform) * KNEE_G == pytest.approx(counts * G_PER_COUNT, rel=1e-4, abs=1e-4)
    assert set(found.evidence) == {
        "velocity_rms_mm_s",
        "velocity_axial_rms_mm_s",
        "acceleration_rms_g",
        "acceleration_kurtosis",
    }
    assert found.evidence["acceleration_rms_g"] == pytest.approx(np.sqrt(np.mean((counts[0] * G_PER_COUNT) ** 2)))
    assert 0 < found.evidence["velocity_rms_mm_s"] < 3


def test_the_scale_holds_all_that_the_transmitter_can_say():
    assert bend(np.array([0.0, 0.01, -0.01])) == pytest.approx([0, 0.1, -0.1], rel=0.01)
    assert np.abs(bend(np.array([-32.0, 32.0]))).max() < 6.5


def test_training_bends_as_the_extractor_does():
    torch = pytest.importorskip("torch", reason="the extra train is not installed")
    counts = np.random.default_rng(1).integers(-32_768, 32_767, (3, 2, 4096), dtype=np.int16)
    given = train_wave.some_samples(torch.from_numpy(counts)).numpy()
    whole = bend(counts * np.float64(G_PER_COUNT))
    assert given.shape == (3, 2, WAVEFORM_SAMPLES)
    starts = [
        place for place in range(2049) if np.allclose(np.abs(whole[0, 0, place : place + 64]), np.abs(given[0, 0, :64]))
    ]
    assert len(starts) == 1
    part = whole[:, :, starts[0] : starts[0] + WAVEFORM_SAMPLES]
    assert np.abs(given) == pytest.approx(np.abs(part), rel=1e-5)


def test_neither_speed_nor_bearing_is_needed():
    window = a_moment("bearing_inner", 68).window
    whole, bare = extract(window), extract(replace(window, signals={}, times_ns=window.times_ns[:0]))
    assert whole is not None
    assert bare is not None
    assert np.array_equal(whole.tensors["waveform"], bare.tensors["waveform"])


def test_what_cannot_be_judged_is_not_judged():
    window = a_moment().window
    radial, axial = window.waveforms["vibration_de"], window.waveforms["vibration_axial"]
    assert extract(window) is not None
    short = {name: changed(wave, samples=wave.samples[:4000]) for name, wave in window.waveforms.items()}
    broken = axial.array.copy()
    broken[5] = np.nan
    late = msgspec.structs.replace(axial.clock, source_ns=axial.clock.source_ns + 500_000_000)
    for waveforms in (
        {},
        {"vibration_de": radial},
        short,
        {"vibration_de": radial, "vibration_axial": changed(axial, samples=axial.samples[:-4])},
        {"vibration_de": radial, "vibration_axial": changed(axial, samples=broken.tobytes())},
        {"vibration_de": radial, "vibration_axial": changed(axial, sample_rate_hz=5120.0)},
        {"vibration_de": radial, "vibration_axial": changed(axial, clock=late)},
    ):
        assert extract(replace(window, waveforms=waveforms)) is None
    for state in (AssetState.IDLE, AssetState.SETUP):
        assert extract(replace(window, state=state)) is None


def test_another_sample_rate_is_refused_by_name():
    window = a_moment().window
    for rate_hz, fits in ((SAMPLE_RATE_HZ * 1.005, True), (25_600.0, False)):
        waveforms = {name: changed(wave, sample_rate_hz=rate_hz) for name, wave in window.waveforms.items()}
        if fits:
            assert extract(replace(window, waveforms=waveforms)) is not None
        else:
            with pytest.raises(ConfigError, match="sampled at 25600 Hz, not 10240 Hz"):
                extract(replace(window, waveforms=waveforms))


def changed(waveform, **fields):
    return msgspec.structs.replace(waveform, **fields)


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_lives_are_judged_rightly_and_in_time(fault):
    for seed in SEEDS:
        result = trial.judge_life(trial.Trial(seed, fault, train_wave.FOLDER, MODEL))
        assert trial.right(result), result


def test_model_and_manifest_agree():
    manifest = read_manifest(train_wave.FOLDER)
    assert manifest.features.extractor == WaveformExtractor.name
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    (given,), (answered,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:]) == (manifest.inputs[0].name, list(manifest.inputs[0].shape[1:]))
    assert (answered.name, answered.shape[1:]) == (manifest.outputs[0].name, list(manifest.outputs[0].shape[1:]))
    assert manifest.inputs[0].shape == (-1, 2, WAVEFORM_SAMPLES)
    assert manifest.prediction is not None
    assert manifest.prediction.labels == LABELS
    rows = np.random.default_rng(2).normal(size=(7, 2, WAVEFORM_SAMPLES)).astype(np.float32)
    (together,) = session.run(None, {"waveform": rows})
    alone = np.concatenate([session.run(None, {"waveform": row[None]})[0] for row in rows])
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-3)


def test_both_models_speak_by_the_same_rule():
    fault, wave = (read_manifest(folder) for folder in (train.FOLDER, train_wave.FOLDER))
    assert fault.rules == wave.rules
    assert fault.prediction == wave.prediction


def test_the_model_is_small_and_made_of_portable_operators():
    assert MODEL.stat().st_size < 1_400_000
    model = onnx.load(MODEL)
    operators = {"Unsqueeze", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"}
    assert {node.op_type for node in model.graph.node} == operators
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    floats = [item for item in model.graph.initializer if item.data_type == onnx.TensorProto.FLOAT]
    assert 200_000 < sum(int(np.prod(item.dims)) for item in floats) < 400_000


def test_training_keeps_off_the_seeds_of_the_evaluation():
    assert max(*train_wave.TRAIN_SEEDS, *train_wave.VALIDATION_SEEDS, *SEEDS) < 1_000_000
    assert not set(SEEDS) & {*train_wave.TRAIN_SEEDS, *train_wave.VALIDATION_SEEDS}


CONFIG = """
[http]
enabled = false
[plugins.rig]
[[assets]]
name = "skid"
adapter = "rig"
models = ["rig-wave"]
options = {{ seed = {seed}, fault = "{fault}", speed = "full" }}
"""


@pytest.mark.parametrize(("fault", "kinds"), [("bearing_inner", {"bearing_inner"}), ("none", set())])
def test_a_life_in_a_running_agent(millhand_agent, fault, kinds):
    """A real agent and worker: the model loads, judges one life, and raises what it should, with a work order."""
    agent = millhand_agent(CONFIG.format(seed=SEEDS[0], fault=fault))
    agent.wait(lambda: [asset["state"] for asset in agent.call("asset.list")] == ["ended"], "the end of the life", 90)
    states = {model["name"]: model["state"] for model in agent.call("model.list")}
    assert states["rig-wave"] == "ready"
    predictions = agent.call("prediction.list", asset="skid", limit=1000)
    assert len(predictions) > 40
    alerts = agent.call("alert.list", asset="skid")
    assert {alert["kind"] for alert in alerts} == kinds
    orders = agent.call("order.list", asset="skid")
    assert {order["alert_id"] for order in orders} == {alert["id"] for alert in alerts}
    assert all(order["evidence"]["facts"]["velocity_rms_mm_s"] > 0 for order in orders)
