"""ONNX Runtime's CUDA provider alone, in process: what a batch costs, and what a change of the batch size costs.

Run by `python raw.py MODEL CONV_SEARCH`; prints one JSON line. `MODEL` takes `input` with a free first dimension.
"""

import json
import statistics
import sys
import time

import numpy as np
import onnxruntime

SIZES = (1, 8, 64)
REPEATS = 30
CHANGES = 10


def milliseconds(session: onnxruntime.InferenceSession, rows: np.ndarray) -> float:
    begin = time.perf_counter()
    session.run(None, {"input": rows})
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    path, search = sys.argv[1:]
    onnxruntime.preload_dlls()
    options = {"cudnn_conv_algo_search": search.upper(), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    session = onnxruntime.InferenceSession(path, providers=[("CUDAExecutionProvider", options), "CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape[1:]
    rows = np.random.default_rng(1).standard_normal((max(SIZES), *shape)).astype(np.float32)
    milliseconds(session, rows[:2])
    found: dict[str, float] = {}
    for size in SIZES:
        found[f"first_{size}_ms"] = milliseconds(session, rows[:size])
        found[f"run_{size}_ms"] = statistics.median(milliseconds(session, rows[:size]) for _ in range(REPEATS))
    # Both sizes have been seen before: what is left is what a change costs.
    milliseconds(session, rows[:63])
    changing = [milliseconds(session, rows[: 63 + number % 2]) for number in range(CHANGES)]
    found["changing_63_64_ms"] = statistics.median(changing)
    print(json.dumps({"providers": session.get_providers(), **found}))


if __name__ == "__main__":
    main()
