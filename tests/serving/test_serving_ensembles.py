"""Ensembles: good chains give what their parts give, bad ones are refused by name, all on real workers."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from proof_kit import prove
from serving_kit import action, backends, identity, save_onnx, scale, until, value, write_faulty, write_model

from millhand.errors import DeadlineError, InputError, ModelError, WorkerError
from millhand.pipeline.asset import AssetPipeline
from millhand.pipeline.settings import AssetSettings
from millhand.serving.ensemble import open_session
from millhand.serving.lanes import LoadedModel
from millhand.serving.load_request import load_request
from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.sessions import Sessions
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.store import Store
from millhand_plugins.orders.writer import DeterministicWriter, read_knowledge
from millhand_plugins.rig import millhand_models
from millhand_plugins.rig.adapter import RigKind, RigOptions
from millhand_plugins.rig.extractor import RigExtractor

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
MakePool = Callable[..., Awaitable[ModelPool]]

CHAIN = """
[[steps]]
transform = "normalise"
inputs = { x = "x" }
outputs = { y = "normal" }
options = { mean = [1, 2], deviation = [2, 4] }

[[steps]]
model = "scale"
inputs = { x = "normal" }
outputs = { y = "logits" }

[[steps]]
transform = "softmax"
inputs = { x = "logits" }
outputs = { y = "y" }
"""


def write_ensemble(root: Path, name: str, steps: str, **options: Any) -> Path:
    """An ensemble x [-1, 2] -> y [-1, 2]."""
    folder = write_model(root, name, **options)
    toml = folder / "model.toml"
    lines = [line for line in toml.read_text().splitlines() if not line.startswith(("backend", "artifact"))]
    toml.write_text("\n".join(lines) + "\n" + steps)
    return folder


def reason(root: Path, name: str) -> str:
    """Why the repository refuses a model."""
    return dict(Repository([root]).problems())[name]


def x(rows: int = 3) -> dict[str, Any]:
    return {"x": np.random.default_rng(rows).normal(size=(rows, 2)).astype(np.float32)}


async def test_a_chain_gives_what_its_parts_give_bit_for_bit(root: Path, make_pool: MakePool) -> None:
    artifact = write_model(root, "scale") / "1/model.onnx"
    scale(artifact, 3)
    write_ensemble(root, "chain", CHAIN)
    pool = await make_pool()
    inputs = x(5)
    outputs, version = await pool.infer("chain", inputs, deadline_ms=5000)
    normal = (inputs["x"] - np.float32([1, 2])) / np.float32([2, 4])
    (logits,) = onnxruntime.InferenceSession(artifact).run(["y"], {"x": normal})
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(outputs["y"], powers / powers.sum(axis=1, keepdims=True))
    assert list(outputs) == ["y"]
    assert version == 1


async def test_a_graph_may_branch_and_join_and_steps_may_be_ensembles(root: Path, make_pool: MakePool) -> None:
    for name, factor in (("twice", 2), ("thrice", 3)):
        scale(write_model(root, name) / "1/model.onnx", factor)
    inner = '[[steps]]\nmodel = "twice"\noutputs = { y = "t" }\n[[steps]]\nmodel = "thrice"\ninputs = { x = "t" }\n'
    write_ensemble(root, "six_times", inner)
    steps = """
    [[steps]]
    model = "twice"
    outputs = { y = "a" }
    [[steps]]
    model = "six_times"
    outputs = { y = "b" }
    [[steps]]
    transform = "concat"
    inputs = { first = "b", second = "a" }
    outputs = { y = "both" }
    [[steps]]
    transform = "select"
    inputs = { x = "both" }
    options = { indices = [0, 3] }
    """
    write_ensemble(root, "fork", steps)
    pool = await make_pool()
    inputs = x(2)
    outputs, _ = await pool.infer("fork", inputs, deadline_ms=5000)
    wanted = np.stack([inputs["x"][:, 0] * np.float32(2) * np.float32(3), inputs["x"][:, 1] * np.float32(2)], axis=1)
    np.testing.assert_array_equal(outputs["y"], wanted)


SOFTMAX = '[[steps]]\ntransform = "softmax"\n'


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ('[[steps]]\nmodel = "same"\ntransform = "softmax"\n', "table 'steps.0': give exactly one of model, transform"),
        ('[[steps]]\ninputs = { x = "x" }\n', "table 'steps.0': give exactly one of model, transform and artifact"),
        ('[[steps]]\nmodel = "same"\noptions = { threads = 2 }\n', "key 'options' goes with transform or artifact"),
        ('[[steps]]\ntransform = "softmax"\nversion = 2\n', "key 'version' goes with model only, not with transform"),
        ('[[steps]]\nmodel = "sane"\n', "step 1 (sane): model 'sane' is not known; did you mean 'same'?"),
        ('[[steps]]\nmodel = "same"\nversion = 7\n', "step 1 (same): model 'same' has no version 7; it has 1"),
        ('[[steps]]\nmodel = "empty"\n', "step 1 (empty): its model cannot be served: model 'empty' has no version"),
        ('[[steps]]\nmodel = "chain"\n', "step 1 (chain): model 'chain' would run itself: chain -> chain"),
        ('[[steps]]\ntransform = "sofmax"\n', "step 1 (sofmax): transform 'sofmax' is not known; did you mean 'softm"),
        (SOFTMAX + "options = { axis = 0 }\n", "step 1 (softmax): axis 0 of x is the batch: x has shape [-1, 2] (it"),
        (SOFTMAX + "options = { axes = 1 }\n", "step 1 (softmax): option 'axes' is not known; did you mean 'axis'?"),
        (SOFTMAX + 'inputs = { z = "x" }\n', "step 1 (softmax) has no input 'z'"),
        (SOFTMAX + 'outputs = { z = "y" }\n', "step 1 (softmax) has no output 'z'"),
        (SOFTMAX + 'inputs = { x = "xx" }\n', "step 1 (softmax): 'x' takes tensor 'xx', which no input and no step"),
        (
            SOFTMAX + 'inputs = { x = "a" }\n[[steps]]\nmodel = "same"\noutputs = { y = "a" }\n',
            "step 1 (softmax): 'x' takes tensor 'a', which step 2 (same) makes only later",
        ),
        (SOFTMAX + SOFTMAX, "step 2 (softmax): output 'y' makes tensor 'y', which step 1 (softmax) has made"),
        (SOFTMAX + 'outputs = { y = "x" }\n', "step 1 (softmax): output 'y' makes tensor 'x', which is an input of"),
        (SOFTMAX + 'outputs = { y = "z" }\n', "[[outputs]]: 'y' takes tensor 'y', which no input and no step makes"),
        (SOFTMAX + '[[steps]]\nmodel = "same"\noutputs = { y = "z" }\n', "tensor 'z' of step 2 (same) is used by no"),
        (
            '[[steps]]\nmodel = "numbers"\n',
            "step 1 (numbers): 'x' is INT64, but tensor 'x' of the ensemble's inputs is FP32",
        ),
        (
            '[[steps]]\nmodel = "wide"\n',
            "step 1 (wide): 'x' has shape [-1, 3], but tensor 'x' of the ensemble's inputs has shape [-1, 2]",
        ),
        (
            '[[steps]]\ntransform = "argmax"\n',
            "[[outputs]]: 'y' is FP32, but tensor 'y' of step 1 (argmax) is INT64",
        ),
        (
            '[[steps]]\ntransform = "reshape"\noptions = { shape = [2, 1] }\n',
            "[[outputs]]: 'y' has shape [-1, 2], but tensor 'y' of step 1 (reshape) has shape [-1, 2, 1]",
        ),
        ('[[steps]]\ntransform = "concat"\n', "step 1 (concat) names no inputs"),
        ('[[steps]]\nartifact = "pre.onnx"\ninputs = { x = "x" }\n', "step 1 (pre.onnx) names no outputs"),
    ],
)  # fmt: skip
async def test_a_bad_graph_is_refused_by_name(root: Path, make_pool: MakePool, steps: str, message: str) -> None:
    identity(write_model(root, "same") / "1/model.onnx")
    identity(write_model(root, "wide", columns=3) / "1/model.onnx", 3)
    identity(write_model(root, "numbers", datatype="INT64") / "1/model.onnx", kind=TensorProto.INT64)
    write_model(root, "empty")
    folder = write_ensemble(root, "chain", steps)
    identity(folder / "1/pre.onnx")
    assert message in reason(root, "chain")
    assert f"'{folder / 'model.toml'}'" in reason(root, "chain")
    assert set(Repository([root]).names()) == {"same", "wide", "numbers"}


async def test_a_bad_ensemble_is_listed_as_bad_and_cannot_be_loaded(root: Path, make_pool: MakePool) -> None:
    write_ensemble(root, "chain", SOFTMAX + 'inputs = { x = "xx" }\n')
    pool = await make_pool()
    (entry,) = pool.index()
    assert entry["state"] == "bad"
    assert "step 1 (softmax)" in entry["reason"]
    with pytest.raises(ModelError, match=r"model\.toml': step 1 \(softmax\): 'x' takes tensor 'xx'"):
        await pool.load("chain")


def test_an_ensemble_input_must_be_used_and_an_output_must_be_made(root: Path) -> None:
    folder = write_ensemble(root, "chain", SOFTMAX)
    toml = folder / "model.toml"
    good = toml.read_text()
    toml.write_text(good + '[[inputs]]\nname = "more"\nshape = [-1, 1]\n')
    assert "tensor 'more' of the ensemble's inputs is used by no step and is no output" in reason(root, "chain")
    toml.write_text(good + '[[outputs]]\nname = "x"\nshape = [-1, 2]\n')
    assert "output 'x' is an input of the ensemble, no step makes it" in reason(root, "chain")
    toml.write_text(good.replace('[[outputs]]\nname = "y"\ndatatype = "FP32"\nshape = [-1, 2]',
                                 '[[outputs]]\nname = "y"\nshape = [-1, -1]'))  # fmt: skip
    assert "output 'y' has shape [-1, 2] out of step 1 (softmax), [-1, -1] in [[outputs]]" in reason(root, "chain")
    for key in ('artifact = "model.onnx"', 'backend = "onnxruntime"', "options = { threads = 1 }"):
        toml.write_text(key + "\n" + good)
        assert f"key '{key.split()[0]}'" in reason(root, "chain")
        assert "does not go with [[steps]]" in reason(root, "chain")


def test_ensembles_that_lead_back_to_each_other_are_refused(root: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        write_ensemble(root, name, f'[[steps]]\nmodel = "{other}"\n')
    write_ensemble(root, "good", SOFTMAX)
    repository = Repository([root])
    assert repository.names() == ["good"]
    assert all("model 'a' would run itself: a -> b -> c -> a" in message for _, message in repository.problems())


def test_versions_of_an_ensemble(root: Path) -> None:
    folder = write_ensemble(root, "chain", SOFTMAX)
    assert Repository([root]).find("chain").versions == (1,)
    (folder / "4").mkdir()
    (folder / "7").mkdir()
    assert Repository([root]).find("chain").versions == (4, 7)
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace('transform = "softmax"',
        'artifact = "pre.onnx"\ninputs = { x = "x" }\noutputs = { y = "y" }'))  # fmt: skip
    assert f"no '{folder}/<number>/pre.onnx'" in reason(root, "chain")
    identity(folder / "7/pre.onnx")
    assert Repository([root]).find("chain").versions == (7,)


async def test_the_smallest_batch_of_the_steps_holds_for_the_ensemble(root: Path, make_pool: MakePool) -> None:
    scale(write_model(root, "scale", extra="max_batch = 4") / "1/model.onnx", 2)
    write_ensemble(root, "chain", CHAIN)
    pool = await make_pool()
    assert pool.metadata("chain")["max_batch"] == 4
    with pytest.raises(InputError, match="5 rows, allowed are 1 to 4") as caught:
        await pool.infer("chain", x(5))
    assert caught.value.hint == "split the request, or raise max_batch in model.toml of model 'scale'"


async def test_a_net_of_the_ensembles_own_is_a_step(root: Path, make_pool: MakePool) -> None:
    folder = write_ensemble(root, "chain", OWN_NET)
    scale(folder / "1/pre.onnx", 2)
    scale(folder / "2/pre.onnx", 4)
    pool = await make_pool()
    outputs, version = await pool.infer("chain", x(), deadline_ms=5000)
    assert version == 2
    np.testing.assert_array_equal(outputs["y"], np.clip(x()["x"] * np.float32(4), -1, 1))


OWN_NET = """
[[steps]]
artifact = "pre.onnx"
inputs = { x = "x" }
outputs = { y = "scaled" }
[[steps]]
transform = "clip"
inputs = { x = "scaled" }
options = { low = -1, high = 1 }
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('{ x = "x" }\noutputs', '{ z = "x" }\noutputs'), r"step 1 \(pre.onnx\) has no input 'z'"),
        (('{ y = "scaled" }', '{ z = "scaled" }'), r"step 1 \(pre.onnx\) has no output 'z'"),
        (('"pre.onnx"', '"wide.onnx"'), r"step 1 \(wide.onnx\): 'x' has shape \[-1, 3\], but tensor 'x' of the"),
        (('"pre.onnx"', '"one.onnx"'), r"step 1 \(one.onnx\): input 'x' has shape \[1, 2\], which has no free batch"),
        (('"pre.onnx"', '"bad.onnx"'), r"ensemble 'chain', step 1 \(bad.onnx\): '.*bad.onnx' cannot be loaded"),
        (('"pre.onnx"', '"pre.onnx"\nbackend = "onxruntime"'), r"step 1 \(pre.onnx\): key 'backend' = 'onxruntime' is"),
    ],
)
async def test_what_only_the_artifact_shows_is_refused_at_load(
    root: Path, make_pool: MakePool, change: tuple[str, str], message: str
) -> None:
    folder = write_ensemble(root, "chain", OWN_NET.replace(*change))
    identity(folder / "1/pre.onnx")
    identity(folder / "1/wide.onnx", 3)
    one = [value("x", [1, 2])], [value("y", [1, 2])]
    save_onnx(folder / "1/one.onnx", [helper.make_node("Identity", ["x"], ["y"])], *one)
    (folder / "1/bad.onnx").write_bytes(b"no model")
    pool = await make_pool()
    with pytest.raises(Exception, match=message):
        await pool.load("chain")
    assert pool.index()[0]["state"] == "failed"


async def test_one_batch_goes_through_all_steps_and_each_request_gets_its_rows(root: Path, make_pool: MakePool) -> None:
    write_model(root, "rows", backend="rows", outputs={"y": ("FP32", 2), "rows": ("INT64", 1)})
    (root / "rows/1").mkdir()
    (root / "rows/1/model.json").touch()
    steps = '[[steps]]\nmodel = "rows"\noutputs = { y = "t", rows = "rows" }\n[[steps]]\nmodel = "scale"\n'
    write_ensemble(root, "chain", steps + 'inputs = { x = "t" }\n', outputs={"y": ("FP32", 2), "rows": ("INT64", 1)})
    scale(write_model(root, "scale") / "1/model.onnx", 3)
    pool = await make_pool()
    asked = [action(number) for number in range(40)]
    answers = await asyncio.gather(*(pool.infer("chain", inputs, deadline_ms=10_000) for inputs in asked))
    for inputs, (outputs, _) in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(outputs["y"], inputs["x"] * 6)
    assert max(outputs["rows"][0, 0] for outputs, _ in answers) > 1

    async def counted() -> Any:
        """Answers go out before they are counted."""
        stats = {entry["model"]: entry for entry in (await pool.stats())["models"]}
        return stats if stats["chain"]["success"] == 40 else None

    stats = await until(counted)
    assert stats["chain"]["batches"] < 40
    assert stats["rows"]["success"] == stats["scale"]["success"] == 0, "three steps, one request"
    assert list(stats["chain"]["steps_ns"]) == ["1 (rows)", "2 (scale)"]
    assert stats["chain"]["steps_ns"]["1 (rows)"] >= 2e6 * stats["chain"]["batches"]


async def test_several_batches_at_once_keep_their_tensors_apart(root: Path, make_pool: MakePool) -> None:
    scale(write_model(root, "scale") / "1/model.onnx", 3)
    write_ensemble(root, "chain", CHAIN, extra="max_batch = 4")
    pool = await make_pool(runners=3)
    inputs = [x(1 + number % 4) for number in range(200)]
    for number, given in enumerate(inputs):
        given["x"][0, 0] = number
    answers = await asyncio.gather(*(pool.infer("chain", given, deadline_ms=20_000) for given in inputs))
    session = open_session(request_of(root, "chain"), Sessions())
    for given, (outputs, _) in zip(inputs, answers, strict=True):
        np.testing.assert_allclose(outputs["y"], session.run(given)["y"], rtol=1e-6)
    stats = next(entry for entry in (await pool.stats())["models"] if entry["model"] == "chain")
    assert (stats["success"], stats["failed"]) == (200, 0)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (3, r"ensemble 'chain', step 2 \(faulty\) failed: RuntimeError: the native library said no"),
        (4, r"ensemble 'chain', step 2 \(faulty\): output 'y' has shape \[0, 2\] for a batch of 1"),
    ],
)
async def test_a_failing_step_is_named(root: Path, make_pool: MakePool, number: int, message: str) -> None:
    write_faulty(root, "faulty")
    steps = '[[steps]]\ntransform = "fill"\noutputs = { y = "t" }\n[[steps]]\nmodel = "faulty"\ninputs = { x = "t" }\n'
    write_ensemble(root, "chain", steps)
    pool = await make_pool()
    with pytest.raises(ModelError, match=message):
        await pool.infer("chain", action(number))
    outputs, _ = await pool.infer("chain", action(0))
    np.testing.assert_array_equal(outputs["y"], [[0, 0]])


async def test_sizes_that_only_a_request_shows_are_checked_then(root: Path, make_pool: MakePool) -> None:
    identity(write_model(root, "same") / "1/model.onnx")
    steps = """
    [[steps]]
    transform = "slice"
    options = { step = 2 }
    outputs = { y = "half" }
    [[steps]]
    model = "same"
    inputs = { x = "half" }
    """
    toml = write_ensemble(root, "chain", steps) / "model.toml"
    toml.write_text(toml.read_text().replace("shape = [-1, 2]", "shape = [-1, -1]", 1))
    pool = await make_pool(load_timeout_s=5)
    entry = next(entry for entry in pool.index() if entry["name"] == "chain")
    assert entry["state"] == "failed", "its warm-up's one column gives half a column"
    toml.write_text("warmup = 0\n" + toml.read_text())
    await pool.load("chain")
    outputs, _ = await pool.infer("chain", {"x": np.float32([[1, 2, 3]])})
    np.testing.assert_array_equal(outputs["y"], [[1, 3]])
    with pytest.raises(InputError, match=r"step 2 \(same\): tensor 'half' has shape \[1, 3\], expected \[-1, 2\]"):
        await pool.infer("chain", {"x": np.zeros((1, 5), np.float32)})


async def test_the_example_of_the_docs_runs(root: Path, make_pool: MakePool) -> None:
    examples = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    press_health, press_leak = examples[0], next(example for example in examples if "[[steps]]" in example)
    for name, text in (("press-health", press_health), ("press-leak", press_leak)):
        (root / name).mkdir()
        (root / name / "model.toml").write_text(text)
    weights = np.random.default_rng(1).normal(size=(120, 3)).astype(np.float32)
    artifact = root / "press-health/1/model.onnx"
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    tensors = [value("input", ["n", 2, 60])], [value("logits", ["n", 3])]
    save_onnx(artifact, nodes, *tensors, [numpy_helper.from_array(weights, "w")])
    pool = await make_pool()
    readings = np.random.default_rng(2).normal([120, 14], [35, 3], size=(4, 60, 2)).astype(np.float32)
    readings[1, 5, 0] = np.nan
    outputs, _ = await pool.infer("press-leak", {"readings": readings}, deadline_ms=5000)
    scaled = (readings.transpose(0, 2, 1) - np.float32([[[120], [14]]])) / np.float32([[[35], [3]]])
    complete = np.where(np.isnan(scaled), np.float32(0), scaled)
    (logits,) = onnxruntime.InferenceSession(artifact).run(None, {"input": complete})
    np.testing.assert_array_equal(outputs["class"], logits.argmax(axis=1))
    np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1, rtol=1e-6)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(outputs["probabilities"], powers / powers.sum(axis=1, keepdims=True))


async def test_an_ensemble_keeps_the_versions_that_it_loaded_until_it_is_loaded_again(
    root: Path, make_pool: MakePool
) -> None:
    model = write_model(root, "scale")
    scale(model / "1/model.onnx", 2)
    write_ensemble(root, "chain", '[[steps]]\nmodel = "scale"\n')
    pool = await make_pool(load=["chain"], heartbeat_ms=20)
    assert pool.metadata("scale")["state"] == "unloaded"

    async def factor() -> float:
        outputs, version = await pool.infer("chain", {"x": np.ones((1, 2), np.float32)}, deadline_ms=5000)
        assert version == 1
        return float(outputs["y"][0, 0])

    assert await factor() == 2
    scale(model / "2/model.onnx", 5)
    await pool.load("scale")
    assert await factor() == 2
    assert [step["version"] for step in pool.metadata("chain")["steps"]] == [1]
    await pool.load("chain")
    assert await factor() == 5
    assert [step["version"] for step in pool.metadata("chain")["steps"]] == [2]
    await until(lambda: pool.metadata("chain")["steps"][0]["compute_us"])
    await pool.unload("scale")
    assert await factor() == 5, "it has a hold on what it shared"
    await pool.unload("chain")
    assert pool.metadata("chain")["steps"] == [{"step": "1 (scale)", "version": None, "compute_us": None}]


async def test_require_proof_asks_the_steps_models_and_the_ensemble(
    root: Path, tmp_path: Path, make_pool: MakePool
) -> None:
    folder = write_ensemble(root, "chain", OWN_NET + '[[steps]]\nmodel = "same"\ninputs = { x = "y" }\n'
                            'outputs = { y = "z" }\n', outputs={"z": ("FP32", 2)})  # fmt: skip
    identity(folder / "1/pre.onnx")
    artifact = write_model(root, "same") / "1/model.onnx"
    identity(artifact)
    pool = await make_pool(require_proof=True, load=[])

    models = Repository([root]).models
    with pytest.raises(ModelError, match="model 'chain' version 1 is unproved: there is no proof"):
        await pool.load("chain")
    prove(models["chain"].subject(1), tmp_path / "data")
    with pytest.raises(ModelError, match="model 'same' version 1 is unproved: there is no proof"):
        await pool.load("chain")
    prove(models["same"].subject(1), tmp_path / "data")
    await pool.load("chain")
    assert pool.metadata("chain")["artifacts"]["1"]["proof"] == "proved"
    toml = folder / "model.toml"
    for path, change in ((toml, lambda: toml.write_text(toml.read_text() + "\n")),
                         (folder / "1/pre.onnx", lambda: scale(folder / "1/pre.onnx", 2))):  # fmt: skip
        before = path.read_bytes()
        change()
        with pytest.raises(ModelError, match=r"model.toml' with 1 more files is not what was proved"):
            await pool.load("chain")
        path.write_bytes(before)
    scale(artifact, 2)
    with pytest.raises(ModelError, match=r"model 'same' version 1 is refused: .* is not what was proved"):
        await pool.load("chain")
    assert pool.metadata("chain")["versions"] == [1], "what was loaded serves on"


def request_of(root: Path, name: str) -> Any:
    repository = Repository([root])
    folder = repository.find(name)
    return load_request(folder, folder.chosen()[-1], repository, backends(), ModelSettings(), WorkerDefaults())


def test_what_several_use_is_loaded_once_and_closed_with_its_last_user(root: Path) -> None:
    artifact = write_model(root, "same") / "1/model.onnx"
    identity(artifact)
    sessions = Sessions()
    model = sessions.open(request_of(root, "same"))
    write_ensemble(root, "chain", '[[steps]]\nmodel = "same"\n')
    ensemble = open_session(request_of(root, "chain"), sessions)
    sessions.close(model)
    np.testing.assert_array_equal(ensemble.run(x())["y"], x()["x"])
    again = sessions.open(request_of(root, "same"))
    assert again is model
    sessions.close(again)
    identity(artifact)
    other = sessions.open(request_of(root, "same"))
    assert other is not model, "the file was replaced"
    sessions.close(other)
    sessions.close(ensemble)
    with pytest.raises(ModelError, match="the session is closed"):
        model.run(x())


def test_no_step_begins_after_the_deadline(root: Path) -> None:
    write_faulty(root, "faulty")
    steps = '[[steps]]\nmodel = "faulty"\noutputs = { y = "t" }\n[[steps]]\ntransform = "fill"\ninputs = { x = "t" }\n'
    write_ensemble(root, "chain", steps)
    session = open_session(request_of(root, "chain"), Sessions())
    slow = action(5)  # 200 ms
    session.run_until(slow, time.monotonic_ns() + 10**10)
    with pytest.raises(DeadlineError, match=r"the deadline passed before ensemble 'chain', step 2 \(fill\)"):
        session.run_until(slow, time.monotonic_ns() + 10**8)


def test_a_step_that_waits_for_something_outside_keeps_the_deadline_itself(root: Path) -> None:
    folder = write_faulty(root, "outside")
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace('"faulty"', '"declared"'))
    write_ensemble(root, "chain", '[[steps]]\nmodel = "outside"\n')
    model = LoadedModel(request_of(root, "chain"))  # its warm-up fails, which may be over by and by
    with pytest.raises(WorkerError, match=r"ensemble 'chain', step 1 \(outside\): ") as caught:
        model.session.run_until(action(0), 0)
    assert caught.value.retriable
    (folder / "1/gate").touch()
    left_ms = model.session.run_until(action(0), time.monotonic_ns() + 10**10)["y"][0, 0]
    assert 5_000 < left_ms <= 10_000


def test_a_session_that_bears_one_inference_takes_turns(root: Path) -> None:
    write_faulty(root, "faulty")
    write_ensemble(root, "chain", '[[steps]]\nmodel = "faulty"\n')
    sessions = Sessions()
    chains = [open_session(request_of(root, "chain"), sessions) for _ in range(2)]
    assert not chains[0].concurrent
    started = time.monotonic()
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda chain: chain.run(action(5)), chains))
    assert time.monotonic() - started >= 0.4, "200 ms each, one after the other"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "store.db")
    yield opened
    await opened.close()


async def test_an_asset_is_judged_by_an_ensemble_as_by_its_model(root: Path, make_pool: MakePool, store: Store) -> None:
    (shipped,) = millhand_models(None)
    shutil.copytree(shipped / "rig-fault", root / "rig-fault")
    toml = (root / "rig-fault/model.toml").read_text()
    for old, new in {
        'name = "rig-fault"': 'name = "rig-chance"',
        'backend = "onnxruntime"\nartifact = "model.onnx"\n': "",
        'name = "logits"': 'name = "chance"',
        'output = "logits"': 'output = "chance"',
        "softmax = true": "softmax = false",
    }.items():
        assert old in toml
        toml = toml.replace(old, new)
    steps = '[[steps]]\nmodel = "rig-fault"\n[[steps]]\ntransform = "softmax"\ninputs = { x = "logits" }\n'
    (root / "rig-chance").mkdir()
    (root / "rig-chance/model.toml").write_text(toml + steps + 'outputs = { y = "chance" }\n')
    pool = await make_pool()
    names = ("rig-fault", "rig-chance")
    settings = AssetSettings(name="skid", adapter="rig", models=names)
    models = [(pool.manifest(name), RigExtractor()) for name in names]
    writer = DeterministicWriter(read_knowledge(None))
    pipeline = AssetPipeline(settings, models=models, infer=pool.infer, store=store, writer=writer)
    adapter = RigKind().create("skid", RigOptions(seed=200_000, fault="bearing_outer", speed="full"))
    await adapter.open(None)
    batches = [batch async for batch in adapter.batches()]
    for batch in batches[400:600]:  # its bearing wears out there
        await pipeline.step(batch)
    assert pipeline.last_error is None
    one, other = [await store.predictions("skid", name) for name in names]
    assert len(one) == len(other) > 10
    for plain, chained in zip(one, other, strict=True):
        assert (plain.window_end_ns, plain.kind) == (chained.window_end_ns, chained.kind)
        assert chained.values == pytest.approx(plain.values, abs=1e-6)
    alerts = {alert.model: alert.kind for alert in await store.alerts()}
    assert alerts == dict.fromkeys(names, "bearing_outer")
