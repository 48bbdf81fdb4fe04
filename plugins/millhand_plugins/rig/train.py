"""Train the rig's fault classifier: `python -m millhand_plugins.rig.train` in an environment with the extra `train`.

Simulated lives give the windows (seeds below); the product's own extractor gives the features; a small net learns soft
labels that fade from healthy to the fault as its severity grows. The net is then judged as it will be used: by the
rule of model.toml over whole lives of seeds that it never saw. Writes models/rig-fault/1/model.onnx and prints what
CARD.md states.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millhand.pipeline.judgement import judge
from millhand.pipeline.rules import RuleEngine
from millhand.pipeline.windows import WindowBuilder
from millhand.records import AlertState, Batch, Prediction
from millhand.serving.manifest import read_manifest
from millhand_plugins.rig.adapter import RigKind, RigOptions
from millhand_plugins.rig.asset import FAULTS, LIFE_MS, Fault, draw_traits
from millhand_plugins.rig.extractor import FEATURES, RigExtractor
from millhand_plugins.rig.lives import moments
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator

FOLDER = Path(__file__).parent / "models" / "rig-fault"
LABELS = ("healthy", "bearing_outer", "bearing_inner", "imbalance", "misalignment", "looseness")

# Seeds from 1,000,000 on are kept for benchmarks/eval/rig.py: no training or choice may look at them.
TRAIN_SEEDS = range(400)
VALIDATION_SEEDS = range(100_000, 100_020)
TORCH_SEED = 1

# Severity up to which a window counts as healthy, and from which it counts as the fault alone.
FADE: dict[Fault, tuple[float, float]] = {
    "bearing_outer": (0.015, 0.06),
    "bearing_inner": (0.02, 0.09),
    "imbalance": (0.06, 0.2),
    "misalignment": (0.04, 0.14),
    "looseness": (0.04, 0.14),
}
WINDOWS_OF_A_LIFE = {"none": 30}
WINDOWS_OF_A_FAULT = 14
HIDDEN = (64, 32)
EPOCHS, BATCH, RATE, DECAY, JITTER = 60, 256, 3e-3, 1e-4, 0.15


def share_of_fault(fault: Fault, severity: float) -> float:
    """How much of the label belongs to the fault."""
    if fault == "none":
        return 0.0
    low, high = FADE[fault]
    return float(np.clip((severity - low) / (high - low), 0, 1))


def sample_life(task: tuple[int, Fault]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features [n, FEATURES] and soft labels [n, len(LABELS)] of some windows of one life."""
    seed, fault = task
    simulator = Simulator(seed, fault)
    first = 1 if fault == "none" else simulator.traits.onset_ms // SNAPSHOT_MS + 1
    counters = np.arange(first, LIFE_MS // SNAPSHOT_MS + 1)
    wanted = min(WINDOWS_OF_A_LIFE.get(fault, WINDOWS_OF_A_FAULT), len(counters))
    chosen = np.random.default_rng([seed, FAULTS.index(fault)]).choice(counters, wanted, replace=False)
    extractor = RigExtractor()
    features, labels = [], []
    for moment in moments(simulator, sorted(chosen.tolist())):
        found = extractor.extract(moment.window)
        if found is None:
            continue
        label = np.zeros(len(LABELS), dtype=np.float32)
        share = share_of_fault(fault, moment.severity)
        label[LABELS.index(fault) if fault != "none" else 0] = share
        label[0] += 1 - share
        features.append(found.tensors["features"])
        labels.append(label)
    return np.asarray(features).reshape(-1, FEATURES), np.asarray(labels).reshape(-1, len(LABELS))


def train(features: NDArray[np.float32], labels: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Fit the net; return weights and biases with the normalisation of the inputs folded into the first layer."""
    import torch

    torch.manual_seed(TORCH_SEED)
    torch.set_num_threads(1)
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs, targets = torch.from_numpy((features - mean) / spread), torch.from_numpy(labels)
    sizes = (features.shape[1], *HIDDEN, labels.shape[1])
    layers: list[torch.nn.Module] = []
    for left, right in pairwise(sizes):
        layers += [torch.nn.Linear(left, right), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * (len(inputs) // BATCH + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            noisy = inputs[rows] + JITTER * torch.randn(len(rows), inputs.shape[1])
            loss = torch.nn.functional.cross_entropy(net(noisy), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    parameters = [parameter.detach().numpy().astype(np.float64) for parameter in net.parameters()]
    parameters[1] -= parameters[0] @ (mean / spread)
    parameters[0] = parameters[0] / spread
    return [parameter.astype(np.float32) for parameter in parameters]


def write_onnx(parameters: Sequence[NDArray[np.float32]], path: Path) -> None:
    """Write the net as Gemm and Relu: input `features` [batch, FEATURES], output `logits` [batch, labels]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, initializers, value = [], [], "features"
    layers = len(parameters) // 2
    for layer in range(layers):
        weight, bias = parameters[2 * layer], parameters[2 * layer + 1]
        initializers += [numpy_helper.from_array(weight, f"w{layer}"), numpy_helper.from_array(bias, f"b{layer}")]
        last = layer == layers - 1
        output = "logits" if last else f"z{layer}"
        nodes.append(helper.make_node("Gemm", [value, f"w{layer}", f"b{layer}"], [output], transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [output], [f"h{layer}"]))
            value = f"h{layer}"
    graph = helper.make_graph(
        nodes,
        "rig-fault",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name = "millhand"
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def judge_life(task: tuple[int, Fault, Path]) -> dict[str, object]:
    """Run one whole life through the product's own stages: adapter, windows, extractor, net, judgement, rules."""
    import onnxruntime

    seed, fault, path = task
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    manifest = read_manifest(FOLDER)
    assert manifest.window is not None
    windows, extractor, rules = WindowBuilder("rig", manifest.window), RigExtractor(), RuleEngine("rig", manifest)
    alerts = []
    for batch in asyncio.run(_play(seed, fault)):
        for window in windows.add(batch):
            found = extractor.extract(window)
            if found is None:
                continue
            outputs = session.run(["logits"], {"features": found.tensors["features"][None]})
            values, kind, confidence = judge(manifest, {"logits": outputs[0]}, 1)[0]
            times = (window.start_ns, window.end_ns)
            prediction = Prediction("rig", manifest.name, 1, *times, values, kind, confidence, window.state)
            alerts += [alert for alert in rules.judge(prediction) if alert.state is AlertState.OPEN]
    result: dict[str, object] = {"seed": seed, "fault": fault, "alerts": len(alerts)}
    if alerts:
        onset_ms = draw_traits(seed, fault).onset_ms
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
    return result.get("kind") == result["fault"] and 0 <= float(str(result["degradation"])) < 0.8


def summary(results: Sequence[dict[str, object]]) -> dict[str, object]:
    """The figures of the card. An alert before the onset is a false one."""
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
            if fault != "none"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FOLDER / "1" / "model.onnx")
    options = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes) as pool:
        tasks = [(seed, fault) for seed in TRAIN_SEEDS for fault in FAULTS]
        lives = list(pool.map(sample_life, tasks, chunksize=8))
        features, labels = (np.concatenate(parts) for parts in zip(*lives, strict=True))
        print(f"{len(features)} windows of {len(tasks)} lives after {time.monotonic() - started:.0f} s")
        write_onnx(train(features, labels), options.output)
        print(f"{options.output}: {options.output.stat().st_size} bytes after {time.monotonic() - started:.0f} s")
        judgements = [(seed, fault, options.output) for seed in VALIDATION_SEEDS for fault in FAULTS]
        results = list(pool.map(judge_life, judgements, chunksize=4))
    for result in results:
        if not right(result):
            print("wrong:", result)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
