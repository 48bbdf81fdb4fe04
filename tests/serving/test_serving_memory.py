"""What models take of memory: measured, limited, made room for, and given back."""

from __future__ import annotations

import asyncio

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from serving_kit import action, identity, save_onnx, until, value, write_faulty, write_model

from millhand.control import ControlServer
from millhand.errors import ModelError
from millhand.serving.budget import Holding, room_bytes, victims
from millhand.serving.routing import Routes

MIB = 1 << 20

holdings = st.lists(
    st.builds(Holding, st.uuids().map(str), st.integers(0, 100), st.integers(0, 10), st.booleans()), max_size=8
)


@given(holdings, st.integers(1, 300), st.integers(0, 100))
def test_victims_are_few_old_and_never_kept(held, cap, wanted):
    gone = victims(cap, held, wanted)
    left = [one for one in held if one.model not in gone]
    assert not any(one.kept for one in held if one.model in gone)
    if wanted <= room_bytes(cap, held):
        assert sum(one.bytes for one in left) + wanted <= cap
    if gone:  # without the last one it would not have fitted, and none that stayed was asked less recently
        last = next(one for one in held if one.model == gone[-1])
        assert sum(one.bytes for one in left) + last.bytes + wanted > cap
        assert all(one.used_ns >= last.used_ns for one in left if not one.kept and one.bytes)


def state(pool, name):
    return next(entry for entry in pool.index() if entry["name"] == name)


def taken(pool, name, version=1):
    return next(detail["memory_bytes"] for detail in state(pool, name)["details"] if detail["version"] == version)


def hold(root, name, mebibytes, extra=""):
    return write_faulty(root, name, extra=extra, versions={1: f"hold {mebibytes}"})


async def test_what_a_model_takes_is_told(root, make_pool):
    hold(root, "large", 40)
    pool = await make_pool()
    assert 40 * MIB <= taken(pool, "large") < 44 * MIB
    await pool.unload("large")
    assert taken(pool, "large") == 0


async def test_a_runtimes_own_memory_is_not_the_models(root, make_pool):
    for name in ("first", "second"):
        identity(write_model(root, name) / "1/model.onnx")
    pool = await make_pool()
    assert taken(pool, "first") < 16 * MIB  # code that it is the first to use; with the import it would be 27 MiB
    assert taken(pool, "second") < 2 * MIB


async def test_a_model_that_takes_more_than_its_cap_is_refused_and_the_old_serves_on(root, make_pool):
    hold(root, "large", 4, extra=f"memory_bytes_cap = {30 * MIB}")
    pool = await make_pool()
    process = psutil.Process(pool._workers["shared"].process.pid)
    before = process.memory_info().rss
    write_faulty(root, "large", extra=f"memory_bytes_cap = {30 * MIB}", versions={2: "hold 40"})
    with pytest.raises(ModelError, match=r"version 2 takes 4\d\.\d MiB of memory, allowed are 30\.0 MiB") as caught:
        await pool.load("large")
    assert caught.value.hint == "raise memory_bytes_cap in model.toml", "nobody else could make room for it"
    assert (await pool.infer("large", action(0)))[1] == 1
    assert process.memory_info().rss < before + 4 * MIB


async def test_a_cap_that_is_too_small_is_told_in_full(root, make_pool):
    hold(root, "large", 40, extra="memory_bytes_cap = 1000")
    pool = await make_pool()
    assert "MiB of memory, allowed are 1000 bytes" in state(pool, "large")["reason"]
    assert state(pool, "large")["hint"] == "raise memory_bytes_cap in model.toml"
    (root / "large/model.toml").write_text((root / "large/model.toml").read_text().replace("1000", f"{60 * MIB}"))
    await pool.load("large")
    assert state(pool, "large")["state"] == "ready"


async def test_the_model_that_was_asked_least_recently_makes_room(root, make_pool, tmp_path):
    for name in ("a", "b", "c"):
        hold(root, name, 40)
    pool = await make_pool(memory_bytes_cap=100 * MIB, load=("a", "b"))
    control = ControlServer(tmp_path / "c.sock", pool.control_handlers())
    await control.start()
    routes = Routes(tmp_path / "c.sock")
    follower = asyncio.create_task(routes.follow())
    await until(lambda: routes.known)
    await pool.infer("b", action(0))
    await pool.infer("a", action(0))
    await pool.load("c")
    assert {name: state(pool, name)["state"] for name in "abc"} == {"a": "ready", "b": "unloaded", "c": "ready"}
    assert state(pool, "b")["reason"] == "unloaded to make room for model 'c'"
    with pytest.raises(ModelError, match="'b' is unloaded: unloaded to make room for model 'c'") as caught:
        await pool.infer("b", action(0))
    assert caught.value.retriable and caught.value.hint == "millhand model load b"
    await until(lambda: not routes.model("b")["sockets"])
    with pytest.raises(ModelError, match="make room") as caught:
        await routes.infer("b", "", action(0), deadline_ms=1000, priority=0, wanted=())
    assert caught.value.retriable and caught.value.hint == "millhand model load b"
    await pool.load("b")
    assert {name: state(pool, name)["state"] for name in "abc"} == {"a": "unloaded", "b": "ready", "c": "ready"}
    assert state(pool, "b")["reason"] == ""
    routes.close()
    await control.stop()
    await follower


async def test_what_assets_use_and_the_owner_pinned_stays(root, make_pool):
    for name in ("used", "pinned", "more"):
        hold(root, name, 40)
    pool = await make_pool(memory_bytes_cap=100 * MIB, pin=("pinned",), load=("pinned",))
    await pool.need(["used"], [])
    with pytest.raises(ModelError, match=r"takes 40\.\d MiB of memory or more|allowed are 1\d\.\d") as caught:
        await pool.load("more")
    assert caught.value.hint == "unload others (millhand model list), or raise [models] memory_bytes_cap"
    assert {name: state(pool, name)["state"] for name in ("used", "pinned", "more")} == {
        "used": "ready",
        "pinned": "ready",
        "more": "failed",
    }
    await pool.need([], [])  # no asset uses it any more
    await pool.load("more")
    assert state(pool, "used")["state"] == "unloaded"


async def test_a_model_with_requests_under_way_stays(root, make_pool):
    hold(root, "busy", 40)
    hold(root, "more", 40)
    pool = await make_pool(memory_bytes_cap=60 * MIB, load=("busy",))
    refused = asyncio.Event()

    async def ask():
        while not refused.is_set():
            await pool.infer("busy", action(5), deadline_ms=20_000)

    requests = [asyncio.create_task(ask()) for _ in range(4)]
    await until(lambda: pool._workers["shared"].client.in_flight >= 4)
    with pytest.raises(ModelError):
        await pool.load("more")
    refused.set()
    await asyncio.gather(*requests)
    await pool.load("more")
    assert state(pool, "busy")["state"] == "unloaded"


async def test_at_the_start_nothing_that_runs_makes_room(root, make_pool):
    for name in ("a", "b", "c"):
        hold(root, name, 40)
    pool = await make_pool(memory_bytes_cap=100 * MIB)
    assert [state(pool, name)["state"] for name in "abc"] == ["ready", "ready", "failed"]
    assert "allowed are" in state(pool, "c")["reason"]


async def test_a_new_version_takes_the_place_of_the_old_within_the_budget(root, make_pool):
    hold(root, "a", 40)
    hold(root, "b", 40)
    pool = await make_pool(memory_bytes_cap=100 * MIB)
    write_faulty(root, "a", versions={2: "hold 50"})
    await pool.load("a")
    assert [state(pool, name)["versions"] for name in "ab"] == [[2], [1]]


async def test_after_a_restart_what_was_accepted_comes_back(root, make_pool):
    hold(root, "a", 40)
    pool = await make_pool(memory_bytes_cap=45 * MIB)
    psutil.Process(pool._workers["shared"].process.pid).kill()
    await until(lambda: state(pool, "a")["state"] != "ready")
    await until(lambda: state(pool, "a")["state"] == "ready")
    assert 40 * MIB <= taken(pool, "a") < 44 * MIB


def save_large(path, mebibytes):
    """y = x @ w @ v, with weights of that size."""
    columns = mebibytes * MIB // 16
    random = np.random.default_rng(0)
    w = numpy_helper.from_array(random.random((2, columns), dtype=np.float32), "w")
    v = numpy_helper.from_array(random.random((columns, 2), dtype=np.float32), "v")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    save_onnx(path, nodes, [value("x", ["n", 2])], [value("y", ["n", 2])], [w, v])


async def test_unload_gives_the_memory_back_ten_times_over(root, make_pool):
    save_large(write_model(root, "large") / "1/model.onnx", 60)
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool(load=("same",))
    process = psutil.Process(pool._workers["shared"].process.pid)
    after = []
    for _ in range(10):
        await pool.load("large")
        await pool.infer("large", {"x": np.ones((1, 2), dtype=np.float32)}, deadline_ms=10_000)
        assert taken(pool, "large") > 55 * MIB
        assert process.memory_info().rss > 55 * MIB
        await pool.unload("large")
        after.append(process.memory_info().rss)
    assert max(after) - after[0] < 4 * MIB, [rss / MIB for rss in after]
    await pool.unload("same")
    assert not process.is_running()
