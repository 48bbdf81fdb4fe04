"""Train the turbofan model: five small nets, each on four fifths of the engines, averaged inside one ONNX file.

    python train.py --data FOLDER --out FOLDER [--seed N]

FOLDER holds train_FD001.txt ... train_FD004.txt (plain or .gz); no other file is opened. Writes fleet.json,
models/turbofan-rul/1/model.onnx and models/turbofan-rul/folds.json under --out, and prints a JSON line at the end.
Every figure in it is out of fold: an engine is judged only by the net that never saw it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from millhand_plugins.turbofan import cmapss, extractor, fleet

if TYPE_CHECKING:  # torch comes with the train extra alone; what reads the data works, and is tested, without it
    import onnx
    from torch import nn

RUL_CAP = 125.0
FOLDS = 5
HIDDEN = 128
DROPOUT = 0.2
BATCH = 2048
EPOCHS = 60
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-2
UNLIKELY_WEIGHT = 0.15
"""A cycle outside the test sets' ranges of history and remaining life is drawn this often, compared with others."""
LATE_WEIGHT = 0.25
"""How often an engine is shown as if the agent had come to it late, with its first cycles unseen."""
SENSOR_LOSS = 0.02
"""Each sensor of each drawn sample is taken away with this probability, so that a dead one is survived."""
NEW_CYCLES = 30
"""An engine counts as new for so many cycles: the fleet's levels are taken there."""
OPSET, IR_VERSION = 17, 8


class Samples:
    """Every cycle of every training engine as one sample; arrays are aligned by row.

    features: with the engine's whole history; late: with a random number of its first cycles unseen, [n, 86] each.
    """

    def __init__(self, engines: list[cmapss.Engine], constants: fleet.Fleet, seed: int) -> None:
        lives = np.array([len(engine.table) for engine in engines])
        self.engine = np.repeat(np.arange(len(engines)), lives)
        self.cycle = np.concatenate([np.arange(1, life + 1) for life in lives])
        self.rul = np.repeat(lives, lives) - self.cycle
        self.capped = np.minimum(self.rul, RUL_CAP)
        self.subset = np.array([engine.subset for engine in engines])[self.engine]
        longest = np.array([cmapss.LONGEST_RUL_CYCLES[engine.subset] for engine in engines])[self.engine]
        self.likely = (
            (self.rul >= cmapss.SHORTEST_RUL_CYCLES)
            & (self.rul <= longest)
            & (self.cycle >= cmapss.SHORTEST_HISTORY_CYCLES)
        )
        self.features = vectors(engines, constants, self.cycle)
        self.late = vectors(engines, constants, np.random.default_rng(seed).integers(1, self.cycle + 1))


def fit_fleet(engines: list[cmapss.Engine]) -> fleet.Fleet:
    """Regimes are the groups of whole altitudes; level and spread come from every engine's first cycles."""
    table = np.concatenate([engine.table for engine in engines])
    settings = table[:, [cmapss.COLUMNS.index(name) for name in fleet.SETTINGS]]
    sensors = table[:, [cmapss.COLUMNS.index(name) for name in fleet.SENSORS]]
    altitude = np.round(settings[:, 0])
    centres, level, spread = [], [], []
    for regime in np.unique(altitude):
        members = altitude == regime
        new = sensors[members & (table[:, 1] <= NEW_CYCLES)]
        centres.append(settings[members].mean(0))
        level.append(new.mean(0))
        spread.append(new.std(0))
    return fleet.Fleet(np.array(centres), np.array(level), np.array(spread))


def vectors(engines: list[cmapss.Engine], constants: fleet.Fleet, observed: np.ndarray) -> np.ndarray:
    """The model's input after each cycle of each engine, exactly as the running agent computes it: [n, 86].

    observed: [n], how many cycles up to this one the agent has seen.
    """
    extract = extractor.TurbofanExtractor(constants).extract
    cycles = [(engine, cycle) for engine in engines for cycle in range(1, len(engine.table) + 1)]
    features = np.empty((len(cycles), extractor.FEATURE_COUNT), np.float32)
    for row, ((engine, cycle), seen) in enumerate(zip(cycles, observed, strict=True)):
        found = extract(engine.window(cycle, min(int(seen), extractor.WINDOW_CYCLES)))
        assert found is not None, f"{engine.subset} unit {engine.unit} cycle {cycle} cannot be judged"
        features[row] = found.tensors["features"]
    return features


def split(engines: list[cmapss.Engine], seed: int) -> np.ndarray:
    """A fold 0..4 for each engine, balanced within each subset."""
    generator = np.random.default_rng(seed)
    folds = np.zeros(len(engines), int)
    subsets = np.array([engine.subset for engine in engines])
    for subset in cmapss.SUBSETS:
        members = np.flatnonzero(subsets == subset)
        folds[generator.permutation(members)] = np.arange(len(members)) % FOLDS
    return folds


def build_net(inputs: int) -> nn.Sequential:
    from torch import nn

    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, 1),
    )  # fmt: skip


def train_net(
    features: np.ndarray, target: np.ndarray, weight: np.ndarray, blank: np.ndarray, epochs: int, seed: int
) -> nn.Sequential:
    """Train one net with AdamW on one cycle of learning rates (Smith and Topin 2018).

    features: [n, 86] standardised; target: [n] in units of RUL_CAP; weight: [n], how often a sample is drawn;
    blank: [86], the standardised features of an engine without any sensor.
    """
    import torch

    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    steps = max(1, epochs * len(target) // (2 * BATCH))
    net = build_net(features.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    edges = np.cumsum(weight) / weight.sum()
    means, sensors = (features.shape[1] - 2) // len(fleet.SENSORS), len(fleet.SENSORS)
    for _ in range(steps):
        drawn = np.searchsorted(edges, generator.random(BATCH)).clip(max=len(target) - 1)
        lost = np.tile(generator.random((BATCH, sensors)) < SENSOR_LOSS, means)
        inputs = features[drawn]
        inputs[:, :-2] = np.where(lost, blank[:-2], inputs[:, :-2])
        answers = net(torch.from_numpy(inputs))[:, 0]
        loss = torch.nn.functional.mse_loss(answers, torch.from_numpy(target[drawn]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def predict(net: nn.Sequential, features: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return net(torch.from_numpy(features))[:, 0].numpy().clip(0, 1) * RUL_CAP


def build_onnx(nets: list[nn.Sequential], mean: np.ndarray, deviation: np.ndarray) -> onnx.ModelProto:
    """The nets side by side and their mean, clipped to 0..125. Standardising is folded into each first layer.

    The graph is written by hand so that the clipped answer of net k has the stable name `rul_<k>`: `folds.py` cuts a
    single net out by it.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], []

    def constant(name: str, value: np.ndarray | float) -> str:
        weights.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    low, high = constant("low", 0.0), constant("high", RUL_CAP)
    answers = []
    for k, net in enumerate(nets):
        layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in net[::3]]
        first, bias = layers[0]
        layers[0] = (first / deviation, bias - first @ (mean / deviation))
        layers[-1] = (layers[-1][0] * RUL_CAP, layers[-1][1] * RUL_CAP)
        flow = "features"
        for depth, (matrix, bias) in enumerate(layers):
            name = f"net_{k}_layer_{depth}"
            terms = [flow, constant(f"{name}_weight", matrix), constant(f"{name}_bias", bias)]
            flow = node("Gemm", terms, name, transB=1)
            if depth < len(layers) - 1:
                flow = node("Mul", [flow, node("Sigmoid", [flow], f"{name}_gate")], f"{name}_silu")
        answers.append(node("Clip", [flow, low, high], f"rul_{k}"))
    total = answers[0]
    for k, answer in enumerate(answers[1:], start=1):
        total = node("Add", [total, answer], f"sum_{k}")
    node("Mul", [total, constant("share", 1 / len(nets))], "rul")
    graph = helper.make_graph(
        nodes, "turbofan-rul",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", len(mean)])],
        [helper.make_tensor_value_info("rul", TensorProto.FLOAT, ["batch", 1])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def validation(samples: Samples, answers: np.ndarray, seed: int) -> dict[str, Any]:
    """Out-of-fold figures per subset, RUL capped.

    rmse: over all cuts that are distributed like the test sets', every engine with the same weight.
    rmse_one_cut: one random cut for each engine, drawn with `seed`; score: the PHM08 score of these cuts.
    """
    generator = np.random.default_rng(seed)
    per_engine = np.bincount(samples.engine, samples.likely)
    figures = {}
    for subset in cmapss.SUBSETS:
        rows = np.flatnonzero(samples.likely & (samples.subset == subset))
        square = (answers[rows] - samples.capped[rows]) ** 2
        cuts = [generator.choice(rows[samples.engine[rows] == engine]) for engine in np.unique(samples.engine[rows])]
        error = answers[cuts] - samples.capped[cuts]
        figures[subset] = {
            "rmse": round(float(np.sqrt(np.average(square, weights=1 / per_engine[samples.engine[rows]]))), 3),
            "rmse_one_cut": round(float(np.sqrt((error**2).mean())), 3),
            "score": round(cmapss.score(answers[cuts], samples.capped[cuts])),
        }
    return figures


def read_samples(data: Path, seed: int) -> tuple[list[cmapss.Engine], fleet.Fleet, Samples]:
    """Everything that training knows: the four train files of `data`, and nothing else."""
    engines = [engine for subset in cmapss.SUBSETS for engine in cmapss.read_engines(data, "train", subset)]
    constants = fit_fleet(engines)
    return engines, constants, Samples(engines, constants, seed)


def main() -> None:
    import torch

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="folder with train_FD001.txt ... train_FD004.txt")
    options.add_argument("--out", type=Path, required=True, help="folder that gets fleet.json and models/")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--epochs", type=int, default=EPOCHS)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    begin = time.monotonic()
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True)

    engines, constants, samples = read_samples(chosen.data, chosen.seed)
    print(f"{len(engines)} engines, {len(samples.rul)} cycles, {time.monotonic() - begin:.0f} s", flush=True)

    mean, deviation = samples.features.mean(0), samples.features.std(0)
    inputs, late = (samples.features - mean) / deviation, (samples.late - mean) / deviation
    target = (samples.capped / RUL_CAP).astype(np.float32)
    weight = np.where(samples.likely, 1.0, UNLIKELY_WEIGHT)
    folds = split(engines, chosen.seed)
    nets, answers, late_answers = [], np.zeros(len(samples.rul)), np.zeros(len(samples.rul))
    for k in range(FOLDS):
        held_out = folds[samples.engine] == k
        seen = ~held_out
        net = train_net(
            np.concatenate([inputs[seen], late[seen]]),
            np.tile(target[seen], 2),
            np.concatenate([weight[seen], weight[seen] * LATE_WEIGHT]),
            -mean / deviation,
            chosen.epochs,
            chosen.seed + k,
        )
        answers[held_out] = predict(net, inputs[held_out])
        late_answers[held_out] = predict(net, late[held_out])
        rows = held_out & samples.likely
        rmse = np.sqrt(((answers[rows] - samples.capped[rows]) ** 2).mean())
        print(f"net {k + 1} of {FOLDS}: held-out RMSE {rmse:.2f}, {time.monotonic() - begin:.0f} s", flush=True)
        nets.append(net)

    folder = chosen.out / "models" / "turbofan-rul"
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "model.onnx").write_bytes(build_onnx(nets, mean, deviation).SerializeToString())
    constants.write(chosen.out / "fleet.json")
    held = {
        subset: [
            sorted(
                engine.unit for engine, fold in zip(engines, folds, strict=True) if (engine.subset, fold) == (subset, k)
            )
            for k in range(FOLDS)
        ]
        for subset in cmapss.SUBSETS
    }
    lines = [f'"{subset}": {json.dumps(units)}' for subset, units in held.items()]
    (folder / "folds.json").write_text("{\n" + ",\n".join(lines).replace("], [", "],\n  [") + "\n}\n")
    report = {
        "name": "turbofan-rul",
        "seed": chosen.seed,
        "validation": validation(samples, answers, chosen.seed),
        "validation_late": validation(samples, late_answers, chosen.seed),
        "train_s": round(time.monotonic() - begin),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
