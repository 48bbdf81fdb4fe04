"""The limit: ONNX Runtime in process, one thread, one row after the other. Prints one JSON line.

Run by `python raw.py MODEL SECONDS`.
"""

import json
import sys
import time

import numpy as np
import onnxruntime


def main() -> None:
    path, seconds = sys.argv[1], float(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape[1:]
    x = np.random.default_rng(1).standard_normal((1, *shape)).astype(np.float32)
    for _ in range(100):
        session.run(None, {"input": x})
    times: list[float] = []
    begin, spent = time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < begin + seconds:
        session.run(None, {"input": x})
        times.append((time.perf_counter() - now) * 1e3)
    found = {"requests": len(times), "seconds": time.perf_counter() - begin, "cpu_s": time.process_time() - spent}
    times.sort()
    print(json.dumps({**found, "p50_ms": times[len(times) // 2], "p99_ms": times[len(times) * 99 // 100]}))


if __name__ == "__main__":
    main()
