"""Train the rig's waveform classifier: `python -m millhand_plugins.rig.train_wave` with the extra `train`.

Simulated lives give the snapshots (seeds below); a small one-dimensional convolutional net learns soft labels that
fade from healthy to the fault as its severity grows. Any 2048 samples of a snapshot in a row show the same machine, and
so does each channel upside down: both are drawn anew each time. The net is then judged as it will be used: by the rule
of model.toml over whole lives of seeds that it never saw. Writes models/rig-wave/1/model.onnx and prints what CARD.md
states. The same machine and the same versions give the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millhand_plugins.rig.asset import FAULTS, LIFE_MS, Fault
from millhand_plugins.rig.labels import LABELS, soft_label
from millhand_plugins.rig.operation import GRID_MS, RUNNING
from millhand_plugins.rig.simulator import G_PER_COUNT, SNAPSHOT_MS, Simulator
from millhand_plugins.rig.trial import Trial, judge_life, right, summary
from millhand_plugins.rig.vibration import SAMPLES
from millhand_plugins.rig.waveform import KNEE_G, WAVEFORM_SAMPLES

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = Path(__file__).parent / "models" / "rig-wave"

# Seeds from 1,000,000 on are kept for benchmarks/eval/rig.py: no training or choice may look at them.
TRAIN_SEEDS = range(400)
VALIDATION_SEEDS = range(100_000, 100_020)
TORCH_SEED = 1
WINDOWS_OF_A_LIFE = {"none": 30}
WINDOWS_OF_A_FAULT = 14

CONVOLUTIONS = ((32, 64, 8), (64, 9, 4), (128, 5, 2), (192, 3, 2), (192, 3, 1))
"""Channels, samples of the kernel, stride."""
HIDDEN = 64
EPOCHS, BATCH, RATE, DECAY = 8, 64, 3e-3, 1e-2


def sample_life(task: tuple[int, Fault]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Counts [n, 2, SAMPLES] and soft labels [n, len(LABELS)] of some snapshots of one life while it runs."""
    seed, fault = task
    simulator = Simulator(seed, fault)
    first = 1 if fault == "none" else simulator.traits.onset_ms // SNAPSHOT_MS + 1
    counters = np.arange(first, LIFE_MS // SNAPSHOT_MS + 1)
    wanted = min(WINDOWS_OF_A_LIFE.get(fault, WINDOWS_OF_A_FAULT), len(counters))
    chosen = np.random.default_rng([seed, FAULTS.index(fault)]).choice(counters, wanted, replace=False)
    counts, labels = [], []
    for counter in sorted(chosen.tolist()):
        snapshot = simulator.snapshot(counter)
        place = snapshot.time_ms // GRID_MS
        if np.isnan(snapshot.g_per_count) or simulator.operation.state[place] != RUNNING:
            continue
        counts.append(snapshot.counts)
        labels.append(soft_label(fault, float(simulator.operation.severity[place])))
    return (
        np.asarray(counts, np.int16).reshape(-1, 2, SAMPLES),
        np.asarray(labels, np.float32).reshape(-1, len(LABELS)),
    )


def build_net() -> nn.Sequential:
    from torch import nn

    layers: list[nn.Module] = []
    channels = 2
    for wider, kernel, stride in CONVOLUTIONS:
        layers += [
            nn.Conv1d(channels, wider, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm1d(wider),
            nn.ReLU(),
        ]
        channels = wider
    layers += [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, len(LABELS)))


def some_samples(counts: Tensor) -> Tensor:
    """The net's input from counts [n, 2, SAMPLES]: as the extractor bends them, cut and turned over at random."""
    import torch

    start = int(torch.randint(SAMPLES - WAVEFORM_SAMPLES + 1, ()))
    signs = torch.randint(2, (len(counts), 2, 1)) * 2 - 1
    part = counts[:, :, start : start + WAVEFORM_SAMPLES]
    return torch.asinh(signs * part * (G_PER_COUNT / KNEE_G))


def train(counts: NDArray[np.int16], labels: NDArray[np.float32]) -> nn.Sequential:
    """Fit the net with AdamW on one cycle of learning rates (Smith and Topin 2018)."""
    import torch

    torch.manual_seed(TORCH_SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    inputs, targets = torch.from_numpy(counts), torch.from_numpy(labels)
    net = build_net()
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    started = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(inputs)).split(BATCH)[: steps // EPOCHS]:
            loss = torch.nn.functional.cross_entropy(net(some_samples(inputs[rows])), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        loss_of_epoch = total / (steps // EPOCHS)
        print(f"epoch {epoch + 1}: loss {loss_of_epoch:.4f} after {time.monotonic() - started:.0f} s", flush=True)
    return net.eval()


def folded(net: nn.Sequential) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weight and bias of each layer that has any, with the batch normalisation folded into the convolution before."""
    from torch import nn

    layers = []
    for place, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            layers.append((layer.weight.detach().numpy(), layer.bias.detach().numpy()))
        elif isinstance(layer, nn.Conv1d):
            norm = net[place + 1]
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
            bias = (norm.bias - norm.running_mean * (norm.weight / (norm.running_var + norm.eps).sqrt())).detach()
            layers.append((layer.weight.detach().numpy() * scale[:, None, None], bias.numpy()))
    return layers


def write_onnx(layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]], path: Path) -> None:
    """Write the net: input `waveform` [batch, 2, WAVEFORM_SAMPLES], output `logits` [batch, labels].

    The convolutions are written with a height of 1: ONNX Runtime's fast kernels for the CPU take images alone.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, value: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    flow = node("Unsqueeze", ["waveform", constant("height", np.array([2], np.int64))], "image")
    for place, (_, kernel, stride) in enumerate(CONVOLUTIONS):
        weight, bias = layers[place]
        terms = [flow, constant(f"conv_{place}_weight", weight[:, :, None]), constant(f"conv_{place}_bias", bias)]
        shape = {"kernel_shape": [1, kernel], "strides": [1, stride], "pads": [0, kernel // 2] * 2}
        flow = node("Relu", [node("Conv", terms, f"conv_{place}", **shape)], f"relu_{place}")
    flow = node("Flatten", [node("GlobalAveragePool", [flow], "mean")], "channels")
    for place, (weight, bias) in enumerate(layers[len(CONVOLUTIONS) :]):
        terms = [flow, constant(f"dense_{place}_weight", weight), constant(f"dense_{place}_bias", bias)]
        last = place == len(layers) - len(CONVOLUTIONS) - 1
        flow = node("Gemm", terms, "logits" if last else f"dense_{place}", transB=1)
        if not last:
            flow = node("Relu", [flow], f"dense_{place}_relu")
    graph = helper.make_graph(
        nodes,
        "rig-wave",
        [helper.make_tensor_value_info("waveform", TensorProto.FLOAT, ["batch", 2, WAVEFORM_SAMPLES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model.producer_name = "millhand"
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=FOLDER / "1" / "model.onnx")
    options = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes) as pool:
        tasks = [(seed, fault) for seed in TRAIN_SEEDS for fault in FAULTS]
        lives = list(pool.map(sample_life, tasks, chunksize=8))
        counts, labels = (np.concatenate(parts) for parts in zip(*lives, strict=True))
        print(f"{len(counts)} snapshots of {len(tasks)} lives after {time.monotonic() - started:.0f} s", flush=True)
        write_onnx(folded(train(counts, labels)), options.output)
        print(f"{options.output}: {options.output.stat().st_size} bytes after {time.monotonic() - started:.0f} s")
        trials = [Trial(seed, fault, FOLDER, options.output) for seed in VALIDATION_SEEDS for fault in FAULTS]
        results = list(pool.map(judge_life, trials, chunksize=4))
    for result in results:
        if not right(result):
            print("wrong:", result)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
