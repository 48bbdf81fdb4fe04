"""Where models live: one worker for each host that the profile gives, pinned where it says so."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from serving_kit import action, identity, until, write_faulty, write_model

import millhand_profiles
from millhand.errors import InputError, MillhandError, WorkerError
from millhand.hardware import discover
from millhand.hardware.visible import visible_devices
from millhand.profiles import load_profiles, match
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
        with pytest.raises(InputError, match="has 0 rows") as caught:
            await pool.infer(name, {"x": np.zeros((0, 2), np.float32)})
        assert caught.value.hint == "send at least one row in every tensor"


# ---- several GPUs ---------------------------------------------------------------------------------------------------

DATA = os.environ.get("MILLHAND_DATA")
MIXED = ("GPU-0", "GPU-1", "MIG-2a", "MIG-2b")


@pytest.fixture
def cards(root, tmp_path):
    """Four accelerators that can be taken away, two of them slices; returns their folder, the hosts, and a model."""
    folder = tmp_path / "cards"
    folder.mkdir()
    for name in MIXED:
        (folder / name).touch()

    def model(name, extra=""):
        made = write_model(root, name, backend="card", extra=extra)
        for version in (1, 2):
            (made / str(version)).mkdir()
            (made / f"{version}/model.json").write_text(json.dumps({"cards": str(folder)}))

    return folder, [WorkerDefaults(accelerator=name) for name in MIXED], model


def entry(pool, name):
    return next(one for one in pool.index() if one["name"] == name)


async def ask_until_stopped(pool, name, stop):
    """Ask one after the other; returns how many answers came. Only retriable errors may come instead."""
    number = right = 0
    while not stop.is_set():
        number += 1
        try:
            outputs, _ = await pool.infer(name, action(number, rows=3))
        except MillhandError as error:
            assert error.retriable, error
            await asyncio.sleep(0.002)
            continue
        np.testing.assert_array_equal(outputs["y"], np.full((3, 2), 3 * number, dtype=np.float32))
        right += 1
    return right


async def test_gpus_and_slices_share_a_models_requests(cards, make_pool):
    _, hosts, model = cards
    model("spread", "spread = true\nmax_batch = 1")
    pool = await make_pool(hosts=hosts)
    assert entry(pool, "spread")["worker"] == "spread@0, spread@1, spread@2, spread@3"
    seen = {worker.host.accelerator: worker.process.pid for worker in pool._workers.values()}
    assert set(seen) == set(MIXED)
    for accelerator, number in seen.items():
        assert psutil.Process(number).environ()["CUDA_VISIBLE_DEVICES"] == accelerator
    await asyncio.gather(*(pool.infer("spread", action(1), deadline_ms=10_000) for _ in range(40)))
    counts = [one["success"] for one in (await pool.stats())["models"]]
    assert sum(counts) == 40 and min(counts) >= 5


@pytest.mark.parametrize("spread", [False, True])
async def test_a_card_that_is_taken_away_while_it_serves_costs_no_wrong_answer(spread, cards, make_pool):
    folder, hosts, model = cards
    model("busy", f"spread = {str(spread).lower()}")
    pool = await make_pool(hosts=hosts)
    stop = asyncio.Event()
    asking = [asyncio.create_task(ask_until_stopped(pool, "busy", stop)) for _ in range(4)]
    lost = next(worker for worker in pool._workers.values() if worker.wanted)
    await until(lambda: lost.ledger.running.get(("busy", 2)), 20)
    (folder / lost.host.accelerator).unlink()

    def elsewhere():
        said = f"left {lost.host.accelerator}: it could not be loaded" in entry(pool, "busy")["reason"]
        return said and pool._served["busy"].holders(2) and lost.process is None

    await until(elsewhere)
    assert lost not in pool._served["busy"].holders(2) and entry(pool, "busy")["state"] == "ready"
    before = [one["success"] for one in (await pool.stats())["models"]]
    await until(lambda: any_more(pool, before))
    stop.set()
    assert sum(await asyncio.gather(*asking)) > 0
    assert len(pool._served["busy"].holders(2)) == (3 if spread else 1)
    await pool.load("busy")  # the lost one is left alone for a while
    assert lost.process is None and len(pool._served["busy"].holders(2)) == (3 if spread else 1)


async def any_more(pool, before):
    return sum(one["success"] for one in (await pool.stats())["models"]) > sum(before)


async def test_every_model_of_a_lost_card_finds_another(cards, make_pool):
    folder, hosts, model = cards
    for name in ("a", "b", "c"):
        model(name, 'policy = "all"')
    pool = await make_pool(hosts=hosts[:2])
    assert entry(pool, "a")["worker"] == "a@0" and entry(pool, "c")["worker"] == "c@0"
    (folder / "GPU-0").unlink()
    for name in ("a", "c"):
        with pytest.raises(MillhandError) as caught:
            await pool.infer(name, action(1))
        assert caught.value.retriable
    await until(lambda: all(entry(pool, name)["worker"] == f"{name}@1" for name in "abc"))
    await until(lambda: all(entry(pool, name)["versions"] == [1, 2] for name in "abc"))
    assert (await pool.infer("a", action(2)))[0]["y"][0, 0] == 6


async def test_without_another_card_the_version_is_given_up_and_says_why(cards, make_pool):
    folder, hosts, model = cards
    model("alone")
    pool = await make_pool(hosts=hosts[:1])
    (folder / "GPU-0").unlink()
    with pytest.raises(MillhandError):
        await pool.infer("alone", action(1))
    await until(lambda: entry(pool, "alone")["state"] == "failed")
    assert "no CUDA-capable device" in entry(pool, "alone")["reason"]
    (folder / "GPU-0").touch()
    await pool.load("alone")
    assert entry(pool, "alone")["state"] == "ready"


async def test_an_unload_ends_a_move(cards, make_pool):
    folder, hosts, model = cards
    model("gone")
    pool = await make_pool(hosts=hosts[:2])
    (folder / "GPU-0").unlink()
    (folder / "GPU-1").unlink()
    with pytest.raises(MillhandError):
        await pool.infer("gone", action(1))
    await pool.unload("gone")
    for name in MIXED[:2]:
        (folder / name).touch()
    await until(lambda: all(worker.process is None for worker in pool._workers.values()))
    assert entry(pool, "gone")["state"] == "unloaded"


@pytest.mark.skipif(not DATA, reason="MILLHAND_DATA does not name the folder of public data sets")
async def test_a_recorded_card_in_slices_gets_a_worker_for_each(cards, make_pool):
    folder, _, model = cards
    node = discover(Path(DATA) / "hardware/nvidia/a30_mig_L_three_instances.txt")
    profiles = load_profiles([Path(millhand_profiles.__file__).parent])
    slices = [part.uuid for part in node.accelerators[0].mig]
    visible = visible_devices(node, ",".join(slices[1:]))
    workers = match(profiles, node, visible).workers
    assert [host.accelerator for host in workers] == slices[1:] and len(slices) == 3
    for name in slices:
        (folder / name).touch()
    model("sliced", "spread = true")
    pool = await make_pool(hosts=workers)
    assert {worker.host.accelerator for worker in pool._served["sliced"].holders(2)} == set(slices[1:])
