"""Train the rig's fault classifier: `python -m millhand_plugins.rig.train` in an environment with the extra `train`.

Simulated lives give the windows (seeds below); the product's own extractor gives the features; a small net learns soft
labels that fade from healthy to the fault as its severity grows. The net is then judged as it will be used: by the
rule of model.toml over whole lives of seeds that it never saw. Writes models/rig-fault/1/model.onnx and prints what
CARD.md states.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.rig.asset import FAULTS, LIFE_MS, Fault
from millhand_plugins.rig.extractor import FEATURES, RigExtractor
from millhand_plugins.rig.labels import LABELS, soft_label
from millhand_plugins.rig.lives import moments
from millhand_plugins.rig.simulator import SNAPSHOT_MS, Simulator
from millhand_plugins.rig.trial import Trial, judge_life, right, summary

FOLDER = Path(__file__).parent / "models" / "rig-fault"

# Seeds from 1,000,000 on are kept for benchmarks/eval/rig.py: no training or choice may look at them.
TRAIN_SEEDS = range(400)
VALIDATION_SEEDS = range(100_000, 100_020)
TORCH_SEED = 1

WINDOWS_OF_A_LIFE = {"none": 30}
WINDOWS_OF_A_FAULT = 14
HIDDEN = (64, 32)
EPOCHS, BATCH, RATE, DECAY, JITTER = 60, 256, 3e-3, 1e-4, 0.15


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
        features.append(found.tensors["features"])
        labels.append(soft_label(fault, moment.severity))
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
    for width, next_width in pairwise(sizes):
        layers += [torch.nn.Linear(width, next_width), torch.nn.ReLU()]
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
        trials = [Trial(seed, fault, FOLDER, options.output) for seed in VALIDATION_SEEDS for fault in FAULTS]
        results = list(pool.map(judge_life, trials, chunksize=4))
    for result in results:
        if not right(result):
            print("wrong:", result)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
