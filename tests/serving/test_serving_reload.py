"""Load and unload on command: what changed on disk is taken, what fails leaves the old, no request is lost over it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import psutil
import pytest
from proof_kit import prove
from serving_kit import action, identity, scale, until, write_faulty, write_model

from millhand.control import ControlServer
from millhand.errors import MillhandError, ModelError
from millhand.serving.routing import Routes

ONES = np.ones((1, 2), dtype=np.float32)


async def factor(pool, **options):
    """(What the model multiplies by, the version that answered)."""
    outputs, version = await pool.infer("scale", {"x": ONES}, deadline_ms=5000, **options)
    return float(outputs["y"][0, 0]), version


def replace(path: Path, number: float) -> None:
    """Put an artifact into place in one step, as docs/models.md asks."""
    scale(path.with_suffix(".new"), number)
    path.with_suffix(".new").replace(path)


def details(pool, name):
    (entry,) = [entry for entry in pool.index() if entry["name"] == name]
    return {detail["version"]: detail for detail in entry["details"]}


async def test_fifty_reloads_lose_no_request_and_mix_up_no_version(root, make_pool, tmp_path):
    """Each step brings a new version, or the same version with another artifact, while clients ask without pause."""
    folder = write_model(root, "scale")
    allowed = {1: {10.0}}
    scale(folder / "1/model.onnx", 10)
    pool = await make_pool()
    control = ControlServer(tmp_path / "c.sock", pool.control_handlers())
    await control.start()
    routes = Routes(tmp_path / "c.sock")
    follower = asyncio.create_task(routes.follow())
    await until(lambda: routes.known)
    asked, seen, done, newest = 0, set(), asyncio.Event(), 10.0

    async def ask_pool():
        return await factor(pool)

    async def ask_worker():  # as the HTTP process does
        answer = await routes.infer("scale", "", {"x": ONES}, deadline_ms=5000, priority=0, wanted=())
        return float(answer.outputs["y"][0, 0]), answer.version

    async def ask(question):
        nonlocal asked
        while not done.is_set():
            oldest = newest
            number, version = await question()
            assert number in allowed[version] and number >= oldest
            seen.add(number)
            asked += 1

    tasks = [asyncio.create_task(ask(question)) for question in (ask_pool, ask_pool, ask_worker, ask_worker)]
    version = 1
    for step in range(50):
        if step % 2:
            version += 1
        number = 11.0 + step
        allowed.setdefault(version, set()).add(number)
        replace(folder / str(version) / "model.onnx", number)
        entry = await pool.load("scale")
        assert entry["versions"] == [version]
        newest = number  # from now on, none may be answered with what was before
        await until(lambda number=number: number in seen)
    done.set()
    await asyncio.gather(*tasks)
    assert asked > 50
    assert (await pool.stats())["workers"][0]["restarts"] == 0
    routes.close()
    await control.stop()
    await follower


async def test_what_has_not_changed_is_not_loaded_again(root, make_pool, tmp_path):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    pool = await make_pool()
    worker = pool._served["scale"].workers[0]
    loaded = worker.ready["scale", 1]
    prove(pool._repository.find("scale").subject(1), tmp_path / "data")
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace("made by a test", "described anew"))
    assert (await pool.load("scale"))["description"] == "described anew"
    assert worker.ready["scale", 1] is loaded
    toml.write_text("max_batch = 2\n" + toml.read_text())
    await pool.load("scale")
    assert worker.ready["scale", 1]["max_batch"] == 2


async def test_a_failed_load_of_a_changed_artifact_keeps_the_old(root, make_pool):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    pool = await make_pool()
    (folder / "1/model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot be loaded"):
        await pool.load("scale")
    assert await factor(pool) == (2, 1)
    assert details(pool, "scale")[1]["state"] == "ready"
    assert "cannot be loaded" in details(pool, "scale")[1]["reason"]
    scale(folder / "1/model.onnx", 3)
    entry = await pool.load("scale")
    assert await factor(pool) == (3, 1)
    assert entry["reason"] == ""


async def test_a_model_toml_that_goes_bad_keeps_the_old(root, make_pool):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    pool = await make_pool()
    (folder / "model.toml").write_text("name = [")
    with pytest.raises(MillhandError, match="is not valid TOML"):
        await pool.load("scale")
    assert await factor(pool) == (2, 1)
    (entry,) = pool.index()
    assert entry["state"] == "ready" and "is not valid TOML" in entry["reason"]


async def test_versions_stand_or_fall_alone(root, make_pool):
    write_faulty(root, "faulty", extra='policy = "all"', versions={1: "", 2: "raise", 3: ""})
    pool = await make_pool()
    states = details(pool, "faulty")
    assert {number: detail["state"] for number, detail in states.items()} == {1: "ready", 2: "failed", 3: "ready"}
    assert "the native library said no" in states[2]["reason"]
    assert (await pool.infer("faulty", action(0)))[1] == 3
    assert (await pool.infer("faulty", action(0), version=1))[1] == 1


async def test_one_version_is_unloaded(root, make_pool):
    folder = write_model(root, "scale", extra='policy = "all"')
    for number in (1, 2):
        scale(folder / f"{number}/model.onnx", number)
    pool = await make_pool()
    entry = await pool.unload("scale", 2)
    assert entry["versions"] == [1] and entry["state"] == "ready"
    assert await factor(pool) == (1, 1)
    assert details(pool, "scale")[2]["state"] == "unloaded"
    with pytest.raises(ModelError, match="no version 2 loaded") as caught:
        await pool.unload("scale", 2)
    assert caught.value.hint == "loaded: 1"
    with pytest.raises(ModelError, match="'scal' is not known; did you mean 'scale'"):
        await pool.unload("scal")


async def test_an_older_version_is_served_on_command(root, make_pool):
    folder = write_model(root, "scale")
    for number in (1, 2):
        scale(folder / f"{number}/model.onnx", number)
    pool = await make_pool()
    assert await factor(pool) == (2, 2)
    await pool.load("scale", 1)
    assert await factor(pool) == (1, 1)
    with pytest.raises(ModelError, match="no version 7") as caught:
        await pool.load("scale", 7)
    assert caught.value.hint == "its folder holds 1, 2"
    await pool.load("scale")
    assert await factor(pool) == (2, 2)


async def test_a_model_moves_to_a_worker_of_its_own_without_a_gap(root, make_pool):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    done = asyncio.Event()

    async def ask():
        while not done.is_set():
            assert await factor(pool) == (2, 1)

    task = asyncio.create_task(ask())
    toml = folder / "model.toml"
    toml.write_text('isolation = "own"\n' + toml.read_text())
    entry = await pool.load("scale")
    done.set()
    await task
    assert entry["worker"] == "scale"
    pids = {worker["name"]: worker["pid"] for worker in (await pool.stats())["workers"]}
    assert set(pids) == {"shared", "scale"} and all(pids.values())
    toml.write_text(toml.read_text().replace('"own"', '"shared"'))
    assert (await pool.load("scale"))["worker"] == "shared"
    assert not psutil.pid_exists(pids["scale"])
    assert await factor(pool) == (2, 1)
