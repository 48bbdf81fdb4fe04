"""An ensemble of three steps against three requests, and what sharing a model with an ensemble saves.

normalise -> `cnn` -> softmax, one row, through the worker protocol with one client: as one ensemble, as three models
that the client asks one after another, and in this process (ONNX Runtime and NumPy alone). Rounds alternate. Then the
worker's resident memory with `mlp` (19 MB), and beside it with an ensemble that uses it, or one that has a copy of it.
`python benchmarks/ensemble.py`; the last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
import psutil
from figures import Figure, parser, report
from models import CNN, MLP, cnn, mlp, write_model

from millhand.registry import Registry
from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults

HEAD = """
name = "{name}"
description = "made by a benchmark"
licence = "Apache-2.0"
[[inputs]]
name = "input"
shape = [-1, {shape}]
[[outputs]]
name = "{output}"
shape = [-1, {width}]
"""
NORMALISE = '[[steps]]\ntransform = "normalise"\ninputs = { x = "input" }\noutputs = { y = "normal" }\n'
SOFTMAX = '[[steps]]\ntransform = "softmax"\ninputs = { x = "logits" }\noutputs = { y = "chance" }\n'
ROUNDS = 7
REQUESTS = 300


def write_ensemble(root: Path, name: str, steps: str, *, shape: str, output: str, width: str) -> None:
    folder = root / name
    folder.mkdir()
    (folder / "model.toml").write_text(HEAD.format(name=name, shape=shape, output=output, width=width) + steps)


async def start(root: Path, run_dir: Path, load: list[str]) -> ModelPool:
    registry = Registry()
    registry.load({"onnxruntime": {}})
    settings = ModelSettings(paths=(root,), load=tuple(load))
    pool = ModelPool(Repository([root]), settings, [WorkerDefaults()], registry, run_dir)
    await pool.start()
    return pool


async def p50_us(ask: Callable[[], Awaitable[Any]]) -> float:
    times = []
    for _ in range(REQUESTS):
        begin = time.perf_counter()
        await ask()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


async def latency(folder: Path) -> list[Figure]:
    root = folder / "models"
    root.mkdir()
    artifact = cnn()
    write_model(root, CNN, artifact)
    shape = "1, 2048"
    steps = NORMALISE + '[[steps]]\nmodel = "cnn"\ninputs = { input = "normal" }\n' + SOFTMAX
    write_ensemble(root, "chain", steps, shape=shape, output="chance", width="4")
    write_ensemble(root, "before", NORMALISE, shape=shape, output="normal", width=shape)
    write_ensemble(root, "after", SOFTMAX.replace("logits", "input"), shape="4", output="chance", width="4")
    pool = await start(root, folder / "run", ["cnn", "chain", "before", "after"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    row = CNN.rows(1)

    async def chain() -> Any:
        outputs, _ = await pool.infer("chain", {"input": row}, deadline_ms=5000)
        return outputs["chance"]

    async def apart() -> Any:
        normal, _ = await pool.infer("before", {"input": row}, deadline_ms=5000)
        logits, _ = await pool.infer("cnn", {"input": normal["normal"]}, deadline_ms=5000)
        outputs, _ = await pool.infer("after", {"input": logits["logits"]}, deadline_ms=5000)
        return outputs["chance"]

    async def raw() -> Any:
        centred = row - row.mean(axis=-1, keepdims=True)
        normal = centred / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True))
        (logits,) = session.run(["logits"], {"input": normal})
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    np.testing.assert_array_equal(await chain(), await raw())
    np.testing.assert_array_equal(await apart(), await raw())
    rounds = [[await p50_us(ask) for ask in (chain, apart, raw)] for _ in range(ROUNDS)]
    await pool.stop()
    one, three, alone = (statistics.median(times) for times in zip(*rounds, strict=True))
    return [
        Figure("three steps, one request, p50", round(one), "us"),
        Figure("three steps, three requests, p50", round(three), "us"),
        Figure("the same in this process, p50", round(alone), "us"),
        Figure("three requests / one", round(three / one, 2), "", ">= 1.2"),
    ]


async def resident_mb(folder: Path, load: list[str]) -> float:
    """Of a fresh worker with these models."""
    pool = await start(folder / "mlps", folder / "run", load)
    stats = await pool.stats()
    megabytes = psutil.Process(stats["workers"][0]["pid"]).memory_info().rss / 1e6
    await pool.stop()
    return float(megabytes)


async def memory(folder: Path) -> list[Figure]:
    root = folder / "mlps"
    root.mkdir()
    artifact = mlp()
    for name in ("mlp", "copy"):
        write_model(root, MLP, artifact, name=name)
        steps = f'[[steps]]\nmodel = "{name}"\n' + SOFTMAX
        write_ensemble(root, f"{name}_chain", steps, shape="64", output="chance", width="16")
    alone = await resident_mb(folder, ["mlp"])
    shared = await resident_mb(folder, ["mlp", "mlp_chain"]) - alone
    copied = await resident_mb(folder, ["mlp", "copy_chain"]) - alone
    return [
        Figure("worker with a model of 19 MB", round(alone, 1), "MB"),
        Figure("more for an ensemble that uses it", round(shared, 1), "MB", "<= 2"),
        Figure("more for an ensemble with a copy of it", round(copied, 1), "MB"),
    ]


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as name:
        folder = Path(name)
        return report("ensemble", [*await latency(folder), *await memory(folder)])


if __name__ == "__main__":
    parser(__doc__).parse_args()
    sys.exit(asyncio.run(main()))
