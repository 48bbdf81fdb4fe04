"""Where models live: one worker for each host that the profile gives, pinned where it says so."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
from serving_kit import action, identity, until, write_faulty, write_model

from millhand.errors import InputError, WorkerError
from millhand.serving.settings import WorkerDefaults

CPUS = sorted(os.sched_getaffinity(0))
needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU only")


def pid(pool, name):
    return pool._workers[name].process.pid


def hosts():
    return [WorkerDefaults(cpus=(CPUS[0],)), WorkerDefaults(cpus=(CPUS[1],))]


@needs_two_cpus
async def test_a_spread_model_lives_on_every_host_and_shares_out_its_requests(root, make_pool):
    write_faulty(root, "faulty", extra='isolation = "own"\nspread = true\nmax_batch = 1')
    pool = await make_pool(hosts=hosts())
    assert pool.index()[0]["worker"] == "faulty@0, faulty@1"
    (sockets,) = pool.routes()["models"]["faulty"]["sockets"].values()
    assert len(set(sockets)) == 2
    await asyncio.gather(*(pool.infer("faulty", action(5), deadline_ms=10_000) for _ in range(4)))
    counts = [entry["success"] for entry in (await pool.stats())["models"]]
    assert counts == [2, 2]


@needs_two_cpus
async def test_a_spread_model_outlives_one_of_its_workers(root, make_pool):
    write_faulty(root, "faulty", extra='isolation = "own"\nspread = true')
    pool = await make_pool(hosts=hosts(), restart_delay_ms=5000)
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(1))
    await until(lambda: len(pool._served["faulty"].holders(1)) == 1)
    for _ in range(4):
        await pool.infer("faulty", action(0))
    assert pool.index()[0]["state"] == "ready"


@needs_two_cpus
async def test_a_bad_version_leaves_every_worker(root, make_pool):
    write_faulty(root, "faulty", extra='isolation = "own"\nspread = true', versions={1: "", 2: ""})
    pool = await make_pool(hosts=hosts(), deaths_cap=1)
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(1))
    await until(lambda: len(pool._served["faulty"].holders(1)) == 2 and not pool._served["faulty"].holders(2))
    assert "version 2 took its worker down 1 times" in pool.index()[0]["reason"]
    assert (await pool.infer("faulty", action(0)))[1] == 1


@needs_two_cpus
async def test_models_go_where_fewer_are_and_stay_there(root, make_pool):
    for name in ("a", "b", "c"):
        identity(write_model(root, name, extra='isolation = "own"') / "1/model.onnx")
    pool = await make_pool(hosts=hosts())
    places = {entry["name"]: entry["worker"] for entry in pool.index()}
    assert places == {"a": "a@0", "b": "b@1", "c": "c@0"}
    await pool.unload("a")
    identity(root / "b/2/model.onnx")
    assert (await pool.load("b"))["worker"] == "b@1"
    assert (await pool.load("a"))["worker"] == "a@0"


@needs_two_cpus
async def test_a_worker_runs_on_the_cpus_that_it_is_given(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool(hosts=[WorkerDefaults(cpus=(CPUS[1],))])
    assert os.sched_getaffinity(pid(pool, "shared")) == {CPUS[1]}


@needs_two_cpus
async def test_the_owners_cpus_win_over_the_profiles(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool(hosts=[WorkerDefaults(cpus=(CPUS[1],))], cpus=(CPUS[0],))
    assert os.sched_getaffinity(pid(pool, "shared")) == {CPUS[0]}


async def test_nothing_is_pinned_unless_told(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    assert os.sched_getaffinity(pid(pool, "shared")) == set(CPUS)


async def test_the_profiles_batch_and_delay_hold_where_the_model_says_nothing(root, make_pool):
    identity(write_model(root, "plain") / "1/model.onnx")
    identity(write_model(root, "told", extra="max_batch = 2\nmax_delay_us = 0") / "1/model.onnx")
    pool = await make_pool(hosts=[WorkerDefaults(max_batch=8, max_delay_us=700)])
    requests = {name: pool._workers["shared"].wanted[name, 1] for name in ("plain", "told")}
    assert {name: (one.max_batch, one.max_delay_us) for name, one in requests.items()} == {
        "plain": (8, 700),
        "told": (2, 0),
    }


async def test_too_many_rows_name_what_rules(root, make_pool):
    identity(write_model(root, "plain") / "1/model.onnx")
    identity(write_model(root, "told", extra="max_batch = 2") / "1/model.onnx")
    pool = await make_pool(hosts=[WorkerDefaults(profile="lathe", max_batch=8)])
    keys = {"plain": "[worker] max_batch in profile 'lathe', see docs/hardware.md", "told": "max_batch in model.toml"}
    for name, key in keys.items():
        with pytest.raises(InputError, match="has 9 rows, allowed are 1 to ") as caught:
            await pool.infer(name, {"x": np.zeros((9, 2), np.float32)})
        assert caught.value.hint == f"split the request, or raise {key}"
        assert pool.metadata(name)["max_batch_key"] == key
        with pytest.raises(InputError, match="has no row") as caught:
            await pool.infer(name, {"x": np.zeros((0, 2), np.float32)})
        assert caught.value.hint == "send at least one row in every tensor"
