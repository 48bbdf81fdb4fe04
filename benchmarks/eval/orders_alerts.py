"""Makes benchmarks/eval/orders_alerts.jsonl: alerts whose fault is known, for benchmarks/eval/orders.py.

Lives of the rig's simulator are judged by `rig-fault` and its rules, as in production: the alert's kind is the model's
word, the truth is the simulator's. Alerts of turbofans and of other machines are written by hand in
orders_by_hand.toml, with the fault that their author had in mind. Committed, so that all evaluations see the same.

    python benchmarks/eval/orders_alerts.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tomllib
import uuid
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import msgspec

from millhand.pipeline.judgement import judge
from millhand.pipeline.rules import RuleEngine
from millhand.pipeline.windows import WindowBuilder
from millhand.records import Alert, AlertState, Batch, Prediction, Severity
from millhand.serving.manifest import read_manifest
from millhand_plugins.rig import millhand_extractors, millhand_models
from millhand_plugins.rig.adapter import RigKind, RigOptions

PATH = Path(__file__).with_suffix(".jsonl")
BY_HAND = Path(__file__).with_name("orders_by_hand.toml")
RIG_FAULTS = ("bearing_outer", "bearing_inner", "imbalance", "misalignment", "looseness")
FIRST_SEED = 2_000_000
START_NS = 1_767_225_600_000_000_000
SPACE = uuid.UUID("5f0f5dc2-55a1-4f8e-9d7c-0c8a4d0b7a11")


def made(fault: str, alert: Alert) -> str:
    return json.dumps({"fault": fault, "alert": msgspec.to_builtins(alert)}, ensure_ascii=False)


def by_hand() -> list[str]:
    rows = []
    for place, row in enumerate(tomllib.loads(BY_HAND.read_text(encoding="utf-8"))["alerts"]):
        alert = Alert(
            id=str(uuid.uuid5(SPACE, f"{place} {row['asset']}")),
            asset=row["asset"],
            model="",
            rule=row["kind"],
            kind=row["kind"],
            severity=Severity(row["severity"]),
            message=row["message"],
            raised_ns=START_NS + place * 60_000_000_000,
            evidence={"facts": row["facts"]},
        )
        rows.append(made(row["fault"], alert))
    return rows


async def played(seed: int, fault: Any) -> list[Batch]:
    adapter = RigKind().create("rig", RigOptions(seed=seed, fault=fault, speed="full"))
    await adapter.open(None)
    return [batch async for batch in adapter.batches()]


def of_the_rig(seed: int, fault: str) -> list[str]:
    """The first alert of one life, as the pipeline raises it."""
    import onnxruntime

    (models,) = millhand_models(None)
    manifest = read_manifest(models / "rig-fault")
    session = onnxruntime.InferenceSession(models / "rig-fault/1/model.onnx", providers=["CPUExecutionProvider"])
    assert manifest.window is not None and manifest.prediction is not None
    (extractor,) = (found for found in millhand_extractors(None) if found.name == manifest.features.extractor)
    asset = f"skid-{seed - FIRST_SEED}"
    windows, rules, output = (
        WindowBuilder(asset, manifest.window),
        RuleEngine(asset, manifest),
        manifest.prediction.output,
    )
    for batch in asyncio.run(played(seed, fault)):
        for window in windows.add(batch):
            found = extractor.extract(window)
            if found is None:
                continue
            answers = session.run([output], {name: rows[None] for name, rows in found.tensors.items()})
            (answer,) = judge(manifest, {output: answers[0]}, 1)
            if answer is None:
                continue
            values, kind, confidence = answer
            evidence = {key: float(value) for key, value in found.evidence.items()}
            prediction = Prediction(
                asset,
                manifest.name,
                1,
                window.start_ns,
                window.end_ns,
                values,
                kind,
                confidence,
                window.state,
                evidence,
            )
            alerts = [alert for alert in rules.judge(prediction) if alert.state is AlertState.OPEN]
            if alerts:
                return [made(fault, alerts[0])]
    return []


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=6, help="lives of the rig for each fault")
    rows = by_hand()
    for number in range(arguments.parse_args().seeds):
        for place, fault in enumerate(RIG_FAULTS):
            rows += of_the_rig(FIRST_SEED + 10 * number + place, fault)
            print(f"{len(rows)} alerts", file=sys.stderr)
    PATH.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
