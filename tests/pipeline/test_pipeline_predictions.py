"""What extractors and models hand over: odd numbers, growing shapes, and a real worker from end to end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import millhand_plugins.orders as orders
from millhand.pipeline.asset import AssetPipeline
from millhand.pipeline.features import FeatureSet, builtin_extractors
from millhand.records import AlertState
from millhand.registry import Registry
from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.store import Store

RAW = builtin_extractors()[0]
(WRITER,) = orders.millhand_order_writers(orders.OrdersConfig())


@pytest.fixture
async def store(kit, tmp_path: Path) -> AsyncIterator[Store]:
    async with kit.opened(tmp_path / "store.db") as opened:
        yield opened


def pipeline_of(kit: Any, store: Store, infer: Any, extractor: Any = RAW, **manifest: Any) -> AssetPipeline:
    models = [(kit.manifest(**manifest), extractor)]
    return AssetPipeline(kit.settings(), models=models, infer=infer, store=store, writer=WRITER)


async def newest_as_fault(model: str, tensors: Any) -> tuple[dict[str, Any], int]:
    newest = tensors["input"][:, 0, -1].astype(np.float64)
    return {"p": np.stack([1 - newest, newest, 0 * newest], axis=1)}, 1


async def test_answer_that_is_not_finite_costs_its_window_alone(kit, store: Store) -> None:
    async def infer(model: str, tensors: Any) -> tuple[dict[str, Any], int]:
        outputs, version = await newest_as_fault(model, tensors)
        outputs["p"][1] = np.nan
        return outputs, version

    pipeline = pipeline_of(kit, store, infer)
    await pipeline.step(kit.batch(*(kit.reading(second, 0.1) for second in range(5)), cursor=1))
    ends = [found.window_end_ns for found in await store.predictions("pump")]
    assert ends == [kit.at(1), kit.at(3), kit.at(4)]
    assert (pipeline.counters.predictions, pipeline.counters.predictions_failed) == (3, 1)


async def test_evidence_of_numpy_numbers_can_be_stored(kit, store: Store) -> None:
    class Extractor:
        name = "numpy"

        def extract(self, window: Any) -> FeatureSet:
            found = RAW.extract(window)
            assert found is not None
            return FeatureSet(found.tensors, {"level_mm_s": np.float32(1.5), "count": np.int64(3)})

    pipeline = pipeline_of(kit, store, newest_as_fault, Extractor())
    for second in range(3):
        await pipeline.step(kit.batch(kit.reading(second, 0.99), cursor=second))
    assert [found.evidence for found in await store.predictions("pump")] == [{"level_mm_s": 1.5, "count": 3.0}] * 2
    (order,) = await store.orders()
    assert order.evidence["facts"] == {"level_mm_s": 1.5, "count": 3.0}


async def test_evidence_that_is_no_number_is_the_extractors_error(kit, store: Store) -> None:
    class Extractor:
        name = "text"

        def extract(self, window: Any) -> FeatureSet:
            return FeatureSet({}, {"level": "high"})  # type: ignore[dict-item]

    pipeline = pipeline_of(kit, store, newest_as_fault, Extractor())
    await pipeline.step(kit.batch(kit.reading(0), kit.reading(1), cursor=0))
    assert pipeline.counters.extractor_errors == 1
    assert pipeline.last_error is not None
    assert "extractor 'text'" in pipeline.last_error.message
    assert (await store.resume("pump"))[0] == b"0"


async def test_growing_history_is_asked_shape_by_shape(kit, store: Store) -> None:
    shapes: list[tuple[int, ...]] = []

    async def infer(model: str, tensors: Any) -> tuple[dict[str, Any], int]:
        shapes.append(tensors["input"].shape)
        return await newest_as_fault(model, tensors)

    window = {"length": 3, "step": 1, "min_length": 1, "signals": ["x"]}
    pipeline = pipeline_of(kit, store, infer, window=window, max_batch=2)
    await pipeline.step(kit.batch(*(kit.reading(second, 0.1) for second in range(7)), cursor=1))
    assert shapes == [(1, 1, 1), (1, 1, 2), (2, 1, 3), (2, 1, 3), (1, 1, 3)]
    assert len(await store.predictions("pump")) == 7


async def test_full_speed_is_no_burden(kit, store: Store) -> None:
    """24 signals, 50 rows a batch, a window of 256 steps at every row, through a real store: far above 20,000 a second.

    The state that each step rewrites is a copy of the window and little more.
    """

    class Extractor:
        name = "none"

        def extract(self, window: Any) -> FeatureSet:
            return FeatureSet({"input": np.zeros((1, 1), np.float32)})

    names = [f"s{number}" for number in range(24)]
    window = {"length": 256, "step": 1, "min_length": 1, "signals": names}
    pipeline = pipeline_of(kit, store, newest_as_fault, Extractor(), window=window)
    batches = [
        kit.batch(*(kit.reading(50 * number + row, 1.0, name) for row in range(50) for name in names), cursor=number)
        for number in range(30)
    ]
    fastest_s = float("inf")
    for batch in batches:
        started_s = time.perf_counter()
        await pipeline.step(batch)
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
    assert pipeline.counters.predictions == 1500
    assert 24 * 50 / fastest_s > 20_000
    _, state = await store.resume("pump")
    assert state is not None
    assert len(state) < 256 * (24 + 1) * 8 + 2048


# ---- a real worker --------------------------------------------------------------------------------------------------

MODEL_TOML = """
name = "classifier"
description = "The mean of the last two x as the logit of a fault"
licence = "Apache-2.0"

[[inputs]]
name = "input"
shape = [-1, 1, 2]

[[outputs]]
name = "logits"
shape = [-1, 2]

[window]
length = 2
step = 1
signals = ["x"]

[prediction]
task = "classification"
output = "logits"
labels = ["healthy", "looseness"]
softmax = true

[[rules]]
name = "fault"
value = "fault"
raise_above = 0.9
clear_below = 0.5
raise_after = 2
clear_after = 2
"""


def write_model(root: Path) -> None:
    """[n, 1, 2] -> [n, 2]: the logit of a fault is the sum of the two values, that of health 0."""
    (root / "classifier" / "1").mkdir(parents=True)
    (root / "classifier" / "model.toml").write_text(MODEL_TOML)
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [2, 2], [0.0, 1.0, 0.0, 1.0])
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(root / "classifier" / "1" / "model.onnx"))


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[ModelPool]:
    root = tmp_path / "models"
    write_model(root)
    registry = Registry()
    registry.load({"onnxruntime": {}})
    settings = ModelSettings(paths=(root,), restart_delay_ms=20)
    pool = ModelPool(Repository([root], False), settings, [WorkerDefaults()], registry, tmp_path / "run")
    (tmp_path / "run").mkdir()
    await pool.start()
    yield pool
    await pool.stop()


async def test_life_through_a_real_worker_that_is_killed_equals_an_undisturbed_one(
    kit, tmp_path: Path, pool: ModelPool
) -> None:
    life = [-4.0] * 6 + [3.0] * 6 + [-4.0] * 6
    outcomes = []
    for name, kill_at in (("calm", None), ("killed", 8)):
        async with kit.opened(tmp_path / f"{name}.db") as store:
            models = [(pool.manifest("classifier"), RAW)]
            pipeline = AssetPipeline(kit.settings(), models=models, infer=pool.infer, store=store, writer=WRITER)
            await pipeline.restore()
            for second, value in enumerate(life):
                if second == kill_at:
                    worker = next(iter((await pool.stats())["workers"]))
                    os.kill(worker["pid"], signal.SIGKILL)
                await pipeline.step(kit.batch(kit.reading(second, value), cursor=second))
            predictions = [msgspec.structs.replace(found, latency_ms=0.0) for found in await store.predictions("pump")]
            outcomes.append((predictions, await store.alerts(), await store.orders()))
            assert pipeline.counters.predictions_failed == 0
    assert outcomes[0] == outcomes[1]
    predictions, (alert,), (order,) = outcomes[1]
    assert len(predictions) == len(life) - 1
    assert predictions[0].values["fault"] == pytest.approx(1 / (1 + np.exp(8)), rel=1e-4)
    assert (alert.kind, alert.raised_ns, alert.state) == ("looseness", kit.at(8), AlertState.CLEARED)
    assert alert.changed_ns == kit.at(13)
    assert order.alert_id == alert.id
    assert "loose" in order.likely_cause
