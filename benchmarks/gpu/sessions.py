"""One model's session in process: millhand's and ONNX Runtime's own, on the GPU and on the CPU.

    python benchmarks/gpu/sessions.py NAME [--cpu]

Prints one JSON line. On the GPU all ways alternate, round by round: millhand's session as a worker calls it, and ONNX
Runtime alone, host memory in and host memory out: `bound` copies into device buffers that are bound once, `rebound`
binds the request's array and takes the outputs from the binding, `run` binds nothing, `graph` is `bound` with a CUDA
graph. Each has a session of its own for each batch size, with the provider options that millhand gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from numpy.typing import NDArray
from shipped import Shipped, shipped

SIZES = (1, 256)
ROUNDS = 7
ROUND_S = 0.25
WARM_RUNS = 20
CPU_S = 0.5
TOLERANCE = 1e-3
OPTIONS = {
    "device_id": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    "use_tf32": "0",
    "arena_extend_strategy": "kSameAsRequested",
}
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Raw:
    """ONNX Runtime alone, for one batch size."""

    def __init__(self, model: Shipped, size: int, gpu: bool) -> None:
        import onnxruntime

        if gpu and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        self._runtime = onnxruntime
        self._model = model
        self._size = size
        self._gpu = gpu
        self.left_out: dict[str, str] = {}

    def runs(self) -> dict[str, Run]:
        made: dict[str, Run] = {"bound": self._bound({}), "rebound": self._rebound(), "run": self._plain()}
        if self._gpu:
            try:
                made["graph"] = self._bound({"enable_cuda_graph": "1"})
            except Exception as error:
                self.left_out["graph"] = str(error).splitlines()[0]
        return made

    def _open(self, more: dict[str, str]) -> Any:
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._gpu:
            providers.insert(0, ("CUDAExecutionProvider", {**OPTIONS, **more}))
        session = self._runtime.InferenceSession(self._model.artifact, providers=providers)
        if self._gpu and session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("ONNX Runtime left CUDA out")
        return session

    def _plain(self) -> Run:
        session, model = self._open({}), self._model
        return lambda rows: session.run([model.output], {model.input: rows})[0]

    def _rebound(self) -> Run:
        session, model = self._open({}), self._model
        binding = session.io_binding()

        def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
            binding.bind_cpu_input(model.input, rows)
            binding.bind_output(model.output)
            session.run_with_iobinding(binding)
            return binding.copy_outputs_to_cpu()[0]

        return run

    def _bound(self, more: dict[str, str]) -> Run:
        session, model = self._open(more), self._model
        device, width = "cuda" if self._gpu else "cpu", model.answers(model.rows(1)).shape[1]
        made = self._runtime.OrtValue.ortvalue_from_shape_and_type
        first = made([self._size, *model.shape], np.float32, device, 0)
        last = made([self._size, width], np.float32, device, 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input(model.input, first)
        binding.bind_ortvalue_output(model.output, last)

        def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
            first.update_inplace(rows)
            session.run_with_iobinding(binding)
            return last.numpy()

        return run


def millhand(model: Shipped, gpu: bool, threads: int = 1) -> tuple[Run, Any]:
    """Millhand's session as a worker holds it, and the session itself."""
    from millhand.serving.sessions import OneAtATime
    from millhand_plugins.onnxruntime.backend import OnnxruntimeBackend

    session = OnnxruntimeBackend().load(model.artifact, "GPU" if gpu else "cpu", {"threads": threads})
    called: Any = session
    if gpu:
        session.prove({model.input: ("float32", (-1, *model.shape))}, max(SIZES))
        called = OneAtATime(session)
    return lambda rows: called.run({model.input: rows})[model.output], session


def alternate(runs: dict[str, Run], rows: NDArray[np.float32]) -> dict[str, list[float]]:
    """The median of each round, microseconds."""
    for run in runs.values():
        for _ in range(WARM_RUNS):
            run(rows)
    names, found = list(runs), {name: [] for name in runs}
    for number in range(ROUNDS):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            found[name].append(median_us(runs[name], rows, ROUND_S))
    return found


def median_us(run: Run, rows: NDArray[np.float32], seconds: float) -> float:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter_ns()
        run(rows)
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1e3


def check(model: Shipped, name: str, run: Run, rows: NDArray[np.float32], answers: NDArray[np.float32]) -> float:
    """The largest difference from the CPU's answers, as a share of their largest value; ends the script beyond 1e-3."""
    share = float(np.abs(run(rows) - answers).max()) / float(np.abs(answers).max())
    if not share <= TOLERANCE:
        raise SystemExit(f"{model.name}: '{name}' is {share:g} away from the CPU's answers")
    return share


def measure(model: Shipped, size: int, gpu: bool) -> dict[str, Any]:
    """One batch size: microseconds of every way, and the ratio that counts."""
    rows = model.rows(size)
    answers = model.answers(rows)
    raw = Raw(model, size, gpu)
    ours, session = millhand(model, gpu)
    runs = {"millhand": ours, **raw.runs()}
    for run in runs.values():  # another batch in between: nothing may be left of it
        run(model.rows(size)[::-1].copy())
    differences = {name: check(model, name, run, rows, answers) for name, run in runs.items()}
    rounds = alternate(runs, rows)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    best = min(("bound", "rebound"), key=lambda name: medians[name])
    ratios = [a / b for a, b in zip(rounds["millhand"], rounds[best], strict=True)]
    found = {
        "us": {name: round(value, 1) for name, value in medians.items()},
        "raw": best,
        "ratio": round(statistics.median(ratios), 3),
        "max_difference": max(differences.values()),
        "left_out": raw.left_out,
        "proof": dict(getattr(session, "proof", {})),
    }
    session.close()
    return found


def on_cpu(model: Shipped) -> dict[str, float]:
    """Threads of one inference -> microseconds of the largest batch on the CPU."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)})
    rows, found = model.rows(max(SIZES)), {}
    for count in counts:
        run, session = millhand(model, False, count)
        run(rows)
        found[str(count)] = round(median_us(run, rows, CPU_S), 1)
        session.close()
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("name")
    options.add_argument("--cpu", action="store_true")
    chosen = options.parse_args()
    model = shipped(chosen.name)
    sizes = {str(size): measure(model, size, not chosen.cpu) for size in SIZES}
    print(json.dumps({"model": model.name, "sizes": sizes, "cpu_us": on_cpu(model)}))


if __name__ == "__main__":
    main()
