"""What happens to a worker that dies, hangs or will not end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from serving_kit import action, identity, until, write_faulty, write_model

from millhand.errors import MillhandError, ModelError, WorkerError
from millhand.serving.process import WorkerProcess
from millhand.serving.settings import ModelSettings, WorkerDefaults


def entry(pool, name="faulty"):
    return next(one for one in pool.index() if one["name"] == name)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def pid_of(pool, worker="shared"):
    await until(lambda: pool._workers[worker].client is not None)
    return pool._workers[worker].process.pid


async def test_the_back_off_grows_while_the_only_version_cannot_be_loaded(root, make_pool):
    folder = write_faulty(root, "faulty")
    pool = await make_pool(restart_delay_ms=400, restart_delay_cap_ms=60_000, deaths_cap=100)
    worker = pool._workers["shared"]
    (folder / "1/model.json").write_text(json.dumps({"load": "die"}))
    psutil.Process(await pid_of(pool)).kill()
    pauses, deaths = [], pool._served["faulty"].deaths
    for number in range(1, 4):
        await until(lambda number=number: len(deaths) == number)
        died_s = time.monotonic()
        await until(lambda number=number: worker.restarts == number + 1)
        pauses.append(time.monotonic() - died_s)
    assert all(later > 1.2 * earlier for earlier, later in itertools.pairwise(pauses)), pauses
    await until(lambda: worker.process is None)
    assert entry(pool)["state"] == "restarting"
    assert "died of SIGKILL while model 'faulty' version 1 ran" in entry(pool)["reason"]
    with pytest.raises(WorkerError) as caught:
        await pool.infer("faulty", action(0))
    assert caught.value.retriable


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_an_end_that_is_cancelled_still_collects_the_process(tmp_path, turns):
    process = await WorkerProcess.start("worker", tmp_path / "w.sock", ModelSettings(), WorkerDefaults())
    ending = asyncio.create_task(process.kill())
    await asyncio.sleep(0)  # begun
    for _ in range(turns):
        await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert not psutil.pid_exists(process.pid) and not process.path.exists()
    assert await process.stop() == [] and await process.kill() in (0, -signal.SIGKILL)


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_a_stop_that_is_cancelled_still_ends_the_process(tmp_path, turns):
    process = await WorkerProcess.start("worker", tmp_path / "w.sock", ModelSettings(), WorkerDefaults())
    stopping = asyncio.create_task(process.stop())
    for _ in range(turns + 1):
        await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not psutil.pid_exists(process.pid) and not process.path.exists()


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("turns", [1, 2, 3, 5, 20])
async def test_a_start_that_is_cancelled_leaves_nothing(tmp_path, turns, times):
    before, others = descriptors(), set(psutil.Process().children())
    starting = asyncio.create_task(
        WorkerProcess.start("worker", tmp_path / "w.sock", ModelSettings(), WorkerDefaults())
    )
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(times):
        starting.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await starting
    gc.collect()  # what nobody collected says so now
    await until(lambda: set(psutil.Process().children()) <= others)
    assert not list(tmp_path.iterdir())
    await until(lambda: descriptors() <= before)


async def test_a_version_that_cannot_come_back_fails_and_a_load_tries_again(root, make_pool):
    folder = write_faulty(root, "faulty")
    pool = await make_pool(deaths_cap=3)
    (folder / "1/model.json").write_text(json.dumps({"load": "die"}))
    psutil.Process(await pid_of(pool)).kill()
    await until(lambda: entry(pool)["state"] == "failed")
    assert "version 1 took its worker down 3 times" in entry(pool)["reason"]
    assert pool._workers["shared"].process is None
    with pytest.raises(MillhandError, match="worker 'shared' died of SIGKILL while it loaded model 'faulty' ver"):
        await pool.load("faulty")
    assert entry(pool)["state"] == "failed"
    (folder / "1/model.json").write_text("{}")
    assert (await pool.load("faulty"))["state"] == "ready"
    assert entry(pool)["reason"] == ""
    await pool.infer("faulty", action(0))


async def test_a_load_does_not_wait_for_the_back_off(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool(restart_delay_ms=60_000, restart_delay_cap_ms=60_000)
    psutil.Process(await pid_of(pool)).kill()
    await until(lambda: entry(pool)["state"] == "restarting")
    async with asyncio.timeout(20):
        assert (await pool.load("faulty"))["state"] == "ready"
    await pool.infer("faulty", action(0))


async def test_a_version_that_cannot_be_loaded_after_a_restart_gives_way_to_the_one_before(root, make_pool):
    folder = write_faulty(root, "faulty", versions={1: "", 2: ""})
    pool = await make_pool()
    (folder / "2/model.json").write_text(json.dumps({"load": "raise"}))
    psutil.Process(await pid_of(pool)).kill()
    await until(lambda: entry(pool)["versions"] == [1])
    assert "version 2 could not be loaded after a restart" in entry(pool)["reason"]
    assert entry(pool)["reason"].endswith("version 1 came back")


async def test_a_load_that_takes_too_long_is_told_apart_from_one_that_kills(root, make_pool):
    write_faulty(root, "long", versions={1: "hang"}, extra='isolation = "own"')
    write_faulty(root, "fatal", versions={1: "die"}, extra='isolation = "own"')
    pool = await make_pool(load_timeout_s=5)
    found = {entry["name"]: (entry["reason"], entry["hint"]) for entry in pool.index()}
    assert found == {
        "long": ("model 'long' version 1 did not load within 5 s", "raise [models] load_timeout_s for a large model"),
        "fatal": (
            "worker 'fatal' died of SIGKILL while it loaded model 'fatal' version 1",
            "look at the log, then load it again",
        ),
    }


async def test_a_models_own_limit_finds_its_hang(root, make_pool):
    write_faulty(root, "faulty", extra="hang_ms = 1000")
    write_faulty(root, "slow")
    pool = await make_pool(heartbeat_ms=50)
    await pool.infer("slow", action(5), deadline_ms=60_000)  # 200 ms: within the node's limit
    pid = await pid_of(pool)
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(2), deadline_ms=60_000)
    await until(lambda: not psutil.pid_exists(pid))
    await until(lambda: "model 'faulty' version 1 runs for more than 1000 ms" in pool._workers["shared"].last_death)
    assert [version for _, version in pool._served["faulty"].deaths] == [1]


async def test_of_several_that_run_the_one_that_crashes_is_blamed(root, make_pool, caplog):
    write_faulty(root, "faulty")
    write_faulty(root, "slow")
    pool = await make_pool(runners=2, deaths_cap=1)
    slow = asyncio.create_task(pool.infer("slow", action(2), deadline_ms=60_000))
    await until(pool._workers["shared"].process.blackbox.running)
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(1))
    with pytest.raises(WorkerError):
        await slow
    await until(lambda: entry(pool)["state"] == "failed")
    await until(lambda: entry(pool, "slow")["state"] == "ready")
    assert "died of SIGSEGV while model 'faulty' version 1 ran" in entry(pool)["reason"]
    assert not pool._served["slow"].deaths
    assert "millhand_faulty.py" in caplog.text.partition("where worker 'shared' crashed:")[2]


async def test_a_hang_is_not_blamed_on_another_that_has_run_for_longer(root, make_pool):
    write_faulty(root, "faulty", extra="hang_ms = 1000")
    write_faulty(root, "slow")
    pool = await make_pool(runners=2, deaths_cap=1, heartbeat_ms=50)
    slow = asyncio.create_task(pool.infer("slow", action(2), deadline_ms=60_000))
    await until(pool._workers["shared"].process.blackbox.running)
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(2), deadline_ms=60_000)
    await asyncio.gather(slow, return_exceptions=True)
    await until(lambda: entry(pool)["state"] == "failed")
    assert not pool._served["slow"].deaths


async def stopped_s(pool):
    started_s = time.monotonic()
    await pool.stop()
    return time.monotonic() - started_s


async def test_a_stop_does_not_wait_for_a_worker_that_hangs(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    hanging = asyncio.create_task(pool.infer("faulty", action(2), deadline_ms=60_000))
    await until(pool._workers["shared"].process.blackbox.running)
    assert await stopped_s(pool) < 2.5
    with pytest.raises(WorkerError):
        await hanging


async def test_a_stop_does_not_wait_for_a_worker_that_is_frozen(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    os.kill(await pid_of(pool), signal.SIGSTOP)
    assert await stopped_s(pool) < 2.5


async def test_a_stop_does_not_wait_for_a_load_that_hangs(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    write_faulty(root, "faulty", versions={1: "hang"})
    loading = asyncio.create_task(pool.load("faulty"))
    await until(pool._workers["shared"].process.blackbox.loading)
    assert await stopped_s(pool) < 4
    with pytest.raises(MillhandError):
        await loading


async def test_a_stop_lets_what_waits_run(root, make_pool):
    write_faulty(root, "faulty", extra="max_batch = 1")
    pool = await make_pool()
    waiting = [asyncio.create_task(pool.infer("faulty", action(5), deadline_ms=60_000)) for _ in range(8)]
    await until(lambda: pool._workers["shared"].client.in_flight == 8)
    assert await stopped_s(pool) > 1  # 8 * 0.2 s, longer than one alone would be waited for
    assert all(version == 1 for _, version in await asyncio.gather(*waiting))


async def test_one_load_that_hangs_does_not_keep_another_model_from_being_unloaded(root, make_pool):
    write_faulty(root, "apart", extra='isolation = "own"')
    pool = await make_pool()
    write_faulty(root, "faulty", versions={1: "hang"})
    loading = asyncio.create_task(pool.load("faulty"))
    await until(lambda: "faulty" in pool._served and entry(pool)["state"] == "loading")
    async with asyncio.timeout(30):
        assert (await pool.unload("apart"))["state"] == "unloaded"
    with pytest.raises(ModelError, match="'faulty' is loading"):
        await pool.infer("faulty", action(0))
    await pool.stop()
    await asyncio.gather(loading, return_exceptions=True)


async def test_nothing_is_started_after_a_stop(root, make_pool, tmp_path):
    before = set(psutil.Process().children())
    write_faulty(root, "apart", extra='isolation = "own"')
    write_faulty(root, "faulty")
    pool = await make_pool(load=("apart",))
    loads = [asyncio.create_task(pool.load(name)) for name in ("faulty", "apart", "faulty")]
    await asyncio.sleep(0)
    await pool.stop()
    await asyncio.gather(*loads, return_exceptions=True)
    with pytest.raises(WorkerError, match="is stopping"):
        await pool.load("faulty")
    assert not list((tmp_path / "run").glob("worker-*"))
    started = set(psutil.Process().children()) - before
    assert not [child for child in started if child.status() != psutil.STATUS_ZOMBIE]
