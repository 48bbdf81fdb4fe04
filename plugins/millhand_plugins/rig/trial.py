"""Whole simulated lives through the product's own stages: a model is judged by its rules, as it will be used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from millhand.pipeline.judgement import judge
from millhand.pipeline.rules import RuleEngine
from millhand.pipeline.windows import WindowBuilder
from millhand.records import AlertState, Batch, Prediction
from millhand.serving.manifest import read_manifest
from millhand_plugins.rig import millhand_extractors
from millhand_plugins.rig.adapter import RigKind, RigOptions
from millhand_plugins.rig.asset import FAULTS, LIFE_MS, Fault, draw_traits

LATE = 0.8
"""An alert after this share of the degradation comes too late."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One life to judge. `folder` holds the model.toml; `artifact` is the net."""

    seed: int
    fault: Fault
    folder: Path
    artifact: Path


def judge_life(trial: Trial) -> dict[str, object]:
    """Run one life through adapter, windows, extractor, net, judgement and rules.

    Returns seed, fault, the number of `alerts`, and of the first one its `kind` and the share of the `degradation`
    that had passed (below 0: before the onset).
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(trial.artifact, options, providers=["CPUExecutionProvider"])
    manifest = read_manifest(trial.folder)
    assert manifest.window is not None
    assert manifest.prediction is not None
    (extractor,) = (found for found in millhand_extractors(None) if found.name == manifest.features.extractor)
    windows, rules = WindowBuilder("rig", manifest.window), RuleEngine("rig", manifest)
    alerts = []
    for batch in asyncio.run(_play(trial.seed, trial.fault)):
        for window in windows.add(batch):
            found = extractor.extract(window)
            if found is None:
                continue
            output = manifest.prediction.output
            answers = session.run([output], {name: rows[None] for name, rows in found.tensors.items()})
            (answer,) = judge(manifest, {output: answers[0]}, 1)
            if answer is None:
                continue
            values, kind, confidence = answer
            times = (window.start_ns, window.end_ns)
            prediction = Prediction("rig", manifest.name, 1, *times, values, kind, confidence, window.state)
            alerts += [alert for alert in rules.judge(prediction) if alert.state is AlertState.OPEN]
    result: dict[str, object] = {"seed": trial.seed, "fault": trial.fault, "alerts": len(alerts)}
    if alerts:
        onset_ms = draw_traits(trial.seed, trial.fault).onset_ms
        raised_ms = alerts[0].raised_ns / 1e6 - RigOptions().start.timestamp() * 1000
        result |= {"kind": alerts[0].kind, "degradation": round((raised_ms - onset_ms) / (LIFE_MS - onset_ms), 3)}
    return result


async def _play(seed: int, fault: Fault) -> list[Batch]:
    adapter = RigKind().create("rig", RigOptions(seed=seed, fault=fault, speed="full"))
    await adapter.open(None)
    return [batch async for batch in adapter.batches()]


def right(result: dict[str, object]) -> bool:
    """Whether a life got what it should: no alert if healthy, else the right kind, after the onset and in time."""
    if result["fault"] == "none":
        return result["alerts"] == 0
    return result.get("kind") == result["fault"] and 0 <= float(str(result["degradation"])) < LATE


def summary(results: Sequence[dict[str, object]]) -> dict[str, object]:
    """The figures of a card. An alert before the onset is a false one."""
    faulty = [result for result in results if result["fault"] != "none"]
    places = {id(result): float(str(result.get("degradation", "nan"))) for result in faulty}
    seen = [result for result in faulty if places[id(result)] >= 0]
    return {
        "lives": len(results),
        "detected": len(seen) / len(faulty),
        "right_kind": sum(result["kind"] == result["fault"] for result in seen) / max(len(seen), 1),
        "false_alerts_before_onset": sum(place < 0 for place in places.values()),
        "false_alerts_healthy": sum(int(str(result["alerts"])) for result in results if result["fault"] == "none"),
        "place_of_alert": {
            fault: {
                "median": float(np.median([places[id(result)] for result in seen if result["fault"] == fault])),
                "latest": max(places[id(result)] for result in seen if result["fault"] == fault),
            }
            for fault in FAULTS
            if any(result["fault"] == fault for result in seen)
        },
    }
