"""What the quantize plugin's candidates win and lose, against the originals, on this CPU.

    python benchmarks/quantize.py [--data DIR] [--forms]

DIR holds the C-MAPSS files (default: $MILLHAND_DATA/cmapss); without it turbofan-rul is left out. Speed: original and
candidate in turn through the product's backend, one thread, a few milliseconds each, the median of the ratios; it is
CPU time, so that what else runs on the machine does not count. What was fitted saw calibration rows alone; metrics are
those of the models' evaluations, on held rows. `--forms` also times the forms that an int8 net can be written in.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, parser, progress, report
from models import CNN, Graph, Net, cnn
from numpy.typing import NDArray

from millhand.hookspecs import Examples, Session
from millhand.registry import Registry
from millhand.serving.manifest import read_manifest
from millhand.workshop.recipe import Job, Made, Target
from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend
from millhand_plugins.quantize.maker import QuantizeMaker
from millhand_plugins.quantize.settings import QuantizeSettings

TURN_S, TURNS = 0.004, 300
"""One turn of each, and the turns of a comparison."""
SEEDS = (1, 2, 3)
WIDE = Net(
    "wide",
    "Four feed-forward blocks of a transformer: 1,024 to 4,096 to 1,024, 33.6 million weights",
    (1024,),
    1024,
    16,
)
Rows = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Subject:
    """A model, the rows it is fitted to, and what it is judged by."""

    name: str
    artifact: Path
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    examples: Examples | None
    metric: str
    calibration: Rows

    def make(self, recipe: str, folder: Path, **options: Any) -> tuple[Path, Made]:
        maker, target = QuantizeMaker(), Target()
        chosen = next(item for item in maker.recipes(target) if item.name == recipe)
        place = Path(tempfile.mkdtemp(prefix=f"{recipe}-", dir=folder))
        job = Job(
            model=self.artifact,
            folder=place,
            target=target,
            inputs=self.inputs,
            calibration=self.calibration if chosen.calibrated else {},
            max_batch=16,
            typical_batch=1,
            options=QuantizeSettings(**options).model_dump(mode="json"),
            cache=place,
        )
        made = maker.make(chosen, job)
        return place / made.artifact, made

    def score(self, artifact: Path) -> float:
        """Accuracy in percent, or RMSE."""
        assert self.examples is not None
        session, held = opened(artifact), self.examples.held
        count = len(self.examples.truth)
        parts = [session.run({name: rows[i : i + 16] for name, rows in held.items()}) for i in range(0, count, 16)]
        answers = np.concatenate([next(iter(part.values())) for part in parts]).reshape(count, -1)
        if self.metric == "accuracy":
            return float(100 * (answers.argmax(axis=1) == self.examples.truth).mean())
        return float(np.sqrt(((answers[:, 0] - self.examples.truth) ** 2).mean()))


def opened(artifact: Path) -> Session:
    return OnnxruntimeBackend().load(artifact, "cpu", {"threads": 1})


def shipped(model: str, data: Path | None) -> Subject | None:
    """A model that a plugin ships, with the rows of its evaluation; None where none of that name ships."""
    registry = Registry()
    registry.load({"rig": {}, "turbofan": {}})
    evaluations = [item for _, item in registry.collect("millhand_evaluations")]
    folders = [root / model for _, root in registry.collect("millhand_models")]
    folder = next((item for item in folders if item.is_dir()), None)
    if folder is None:
        return None
    evaluation = next(item for item in evaluations if item.model == model)
    manifest = read_manifest(folder)
    inputs = {item.name: ("float32", tuple(item.shape)) for item in manifest.inputs}
    examples = evaluation.examples(data)
    return Subject(model, folder / "1" / manifest.artifact, inputs, examples, evaluation.metric, examples.calibration)


def drawn(net: Net, model: bytes, folder: Path) -> Subject:
    """A net that was never trained: it has a speed and a size, but no metric."""
    path = folder / f"{net.name}.onnx"
    path.write_bytes(model)
    return Subject(net.name, path, {"input": ("float32", (-1, *net.shape))}, None, "", {"input": net.rows(64)})


def wide() -> bytes:
    graph = Graph(0)
    for block in range(4):
        graph.gemm(1024, 4096)
        graph.plain("Relu")
        graph.gemm(4096, 1024, "logits" if block == 3 else "")
    return graph.model(WIDE)


def times_faster(original: Path, candidate: Path, rows: Rows, batch: int) -> tuple[float, float, float]:
    """The median of the ratios, and both medians in milliseconds an inference."""
    feed = {name: array[:batch] for name, array in rows.items()}
    sessions = [opened(original), opened(candidate)]
    counts = []
    for session in sessions:  # warm, and find how many inferences make a turn
        begin = time.process_time()
        for _ in range(20):
            session.run(feed)
        counts.append(max(1, round(TURN_S / ((time.process_time() - begin) / 20))))
    turns: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for session, count, spent in zip(sessions, counts, turns, strict=True):
            begin = time.process_time()
            for _ in range(count):
                session.run(feed)
            spent.append((time.process_time() - begin) / count * 1000)
    ratio = statistics.median(slow / fast for slow, fast in zip(*turns, strict=True))
    return ratio, statistics.median(turns[0]), statistics.median(turns[1])


def size_percent(original: Path, candidate: Path) -> float:
    return 100 * candidate.stat().st_size / original.stat().st_size


def speed_figures(subject: Subject, candidate: Path, label: str, goal: str) -> list[Figure]:
    figures = []
    for batch in (1, 16):
        ratio, before, after = times_faster(subject.artifact, candidate, subject.calibration, batch)
        name = f"{subject.name} {label}: times faster, batch {batch}"
        peer = f"float32 {before:.4f} ms, {label} {after:.4f} ms"
        figures.append(Figure(name, round(ratio, 2), "times", goal if batch == 1 else "", peer))
    percent = size_percent(subject.artifact, candidate)
    figures.append(Figure(f"{subject.name} {label}: size", round(percent, 1), "% of float32", "<= 32"))
    return figures


def classifier(subject: Subject, folder: Path) -> list[Figure]:
    """int8 on the rig's waveform classifier, or on an untrained net of its kind where it does not ship."""
    progress(f"{subject.name}: int8-static")
    candidate, _ = subject.make("int8-static", folder)
    figures = speed_figures(subject, candidate, "int8", ">= 3.5")
    if subject.examples is not None:
        whole, rounded = subject.score(subject.artifact), subject.score(candidate)
        peer = f"{whole:.2f} to {rounded:.2f} % of {len(subject.examples.truth)} rows"
        figures.append(
            Figure(f"{subject.name} int8: accuracy lost", round(whole - rounded, 2), "points", "<= 0.5", peer)
        )
    return figures


def regression(subject: Subject, folder: Path) -> list[Figure]:
    progress(f"{subject.name}: int8-static, int8-dynamic, mixed")
    whole = subject.score(subject.artifact)
    candidate, _ = subject.make("int8-static", folder)
    figures = speed_figures(subject, candidate, "int8", ">= 1")
    rounded = subject.score(candidate)
    lost = 100 * (rounded / whole - 1)
    peer = f"{whole:.3f} to {rounded:.3f} cycles"
    figures.append(Figure(f"{subject.name} int8: RMSE lost", round(lost, 2), "%", "<= 1.2", peer))
    for recipe in ("int8-dynamic", "mixed"):
        other, _ = subject.make(recipe, folder)
        lost = 100 * (subject.score(other) / whole - 1)
        figures.append(Figure(f"{subject.name} {recipe}: RMSE lost", round(lost, 2), "%"))
        percent = size_percent(subject.artifact, other)
        figures.append(Figure(f"{subject.name} {recipe}: size", round(percent, 1), "% of float32"))
    return figures


def annealed(subject: Subject, folder: Path) -> list[Figure]:
    """int4 with one scale for up to 128 inputs, where rounding to nearest visibly loses; three draws of the rows."""
    whole = subject.score(subject.artifact)
    nearest = subject.score(subject.make("int4", folder, block=128)[0])
    figures = [Figure(f"{subject.name} int4, block 128: RMSE lost", round(100 * (nearest / whole - 1), 2), "%")]
    won = []
    for seed in SEEDS:
        progress(f"{subject.name}: int4-annealed, seed {seed}")
        learned = subject.score(subject.make("int4-annealed", folder, block=128, seed=seed, rows_cap=400)[0])
        won.append(100 * (nearest - learned) / (nearest - whole))
        name = f"{subject.name} int4-annealed, block 128, seed {seed}: RMSE lost"
        figures.append(Figure(name, round(100 * (learned / whole - 1), 2), "%"))
    name = f"{subject.name} int4-annealed: of that loss won back, the least of {len(SEEDS)}"
    figures.append(Figure(name, round(min(won), 1), "%", ">= 50"))
    return figures


def large(folder: Path) -> list[Figure]:
    subject = drawn(WIDE, wide(), folder)
    progress(f"{subject.name}: int4")
    candidate, _ = subject.make("int4", folder)
    figures = [Figure("wide int4: size", round(size_percent(subject.artifact, candidate), 1), "% of float32", "<= 16")]
    for batch in (1, 16):
        ratio, before, after = times_faster(subject.artifact, candidate, subject.calibration, batch)
        peer = f"float32 {before:.2f} ms, int4 {after:.2f} ms"
        figures.append(Figure(f"wide int4: times faster, batch {batch}", round(ratio, 2), "times", "", peer))
    return figures


def forms(subject: Subject, folder: Path) -> list[Figure]:
    """The same net as int8-static writes it, and by ONNX Runtime's own quantizer in each of its forms."""
    from forms import FORMS

    candidates = {"int8-static": subject.make("int8-static", folder)[0]}
    for name, write in FORMS.items():
        candidates[name] = folder / f"{name.replace(' ', '-')}.onnx"
        write(subject.artifact, candidates[name], subject.calibration)
    figures = []
    for name, path in candidates.items():
        progress(f"{subject.name}: {name}")
        ratio, _, after = times_faster(subject.artifact, path, subject.calibration, 1)
        figures.append(Figure(f"form: {name}", round(ratio, 2), "times faster", "", f"{after:.4f} ms"))
    return figures


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder of the C-MAPSS files")
    arguments.add_argument("--forms", action="store_true")
    options = arguments.parse_args()
    root = os.environ.get("MILLHAND_DATA")
    data = options.data or (Path(root) / "cmapss" if root else None)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="quantize-") as name:
        folder = Path(name)
        net = drawn(CNN, cnn(), folder)
        wave = shipped("rig-wave", None)
        if wave is None:
            progress("rig-wave does not ship here: an untrained net of its kind stands for it")
        figures += classifier(wave or net, folder)
        if options.forms:
            figures += forms(net, folder)
        if data is None:
            progress("MILLHAND_DATA is not set: turbofan-rul is left out")
        else:
            turbofan = shipped("turbofan-rul", data)
            assert turbofan is not None
            figures += regression(turbofan, folder) + annealed(turbofan, folder)
        figures += large(folder)
    return report("quantize", figures)


if __name__ == "__main__":
    sys.exit(main())
