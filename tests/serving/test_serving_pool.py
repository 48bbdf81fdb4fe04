"""The pool with real workers: versions, reload, crashes, hangs, overload, cancellation."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import numpy as np
import psutil
import pytest
from serving_kit import action, identity, scale, until, write_faulty, write_model

from millhand.errors import DeadlineError, InputError, MillhandError, ModelError, OverloadError, WorkerError


def descriptors():
    return psutil.Process().num_fds()


def ones(rows=1):
    return {"x": np.ones((rows, 2), dtype=np.float32)}


async def process_of(pool, model):
    """The psutil process of a model's worker."""
    worker = pool._served[model].workers[0]
    await until(lambda: worker.process is not None and worker.ready)
    return psutil.Process(worker.process.pid)


async def test_infer_answers_with_the_latest_version(root, make_pool):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    scale(folder / "3/model.onnx", 5)
    pool = await make_pool()
    outputs, version = await pool.infer("scale", ones(3), deadline_ms=5000)
    assert version == 3
    np.testing.assert_array_equal(outputs["y"], np.full((3, 2), 5, dtype=np.float32))
    assert pool.index()[0]["versions"] == [3]


async def test_policies_choose_versions(root, make_pool):
    for name, extra in (("every", 'policy = "all"'), ("some", 'policy = "specific"\nversions = [1]')):
        folder = write_model(root, name, extra=extra)
        scale(folder / "1/model.onnx", 2)
        scale(folder / "2/model.onnx", 3)
    pool = await make_pool()
    assert {entry["name"]: entry["versions"] for entry in pool.index()} == {"every": [1, 2], "some": [1]}
    outputs, version = await pool.infer("every", ones(), version=1)
    assert version == 1 and outputs["y"][0, 0] == 2
    with pytest.raises(ModelError, match="no version 2; ready: 1"):
        await pool.infer("some", ones(), version=2)


async def test_wrong_tensors_are_named(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    with pytest.raises(InputError, match=r"'x' of model 'same' has shape \[1, 3\], expected \[-1, 2\]"):
        await pool.infer("same", {"x": np.ones((1, 3), dtype=np.float32)})
    with pytest.raises(InputError, match="is FP64, expected FP32"):
        await pool.infer("same", {"x": np.ones((1, 2))})
    with pytest.raises(InputError, match="has no input 'xx'; did you mean 'x'"):
        await pool.infer("same", {"xx": np.ones((1, 2), dtype=np.float32)})
    with pytest.raises(InputError, match="'x' of model 'same' is missing"):
        await pool.infer("same", {})
    with pytest.raises(InputError, match="65 rows, allowed are 1 to 64"):
        await pool.infer("same", ones(65))
    with pytest.raises(ModelError, match="model 'sane' is not known; did you mean 'same'"):
        await pool.infer("sane", ones())


async def test_kill_9_gives_a_retriable_error_and_the_model_comes_back(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    process = await process_of(pool, "faulty")
    request = asyncio.create_task(pool.infer("faulty", action(2), deadline_ms=60_000))
    await until(pool._workers["shared"].process.blackbox.running)
    process.kill()
    with pytest.raises(WorkerError) as caught:
        await request
    assert caught.value.retriable
    await until(lambda: pool.index()[0]["state"] == "ready")
    outputs, _ = await pool.infer("faulty", action(0))
    assert outputs["y"].shape == (1, 2)
    assert not process.is_running()
    assert (await pool.stats())["workers"][0]["restarts"] == 1


async def test_a_crash_in_one_model_does_not_stop_one_with_its_own_worker(root, make_pool):
    write_faulty(root, "faulty")
    write_faulty(root, "apart", extra='isolation = "own"')
    pool = await make_pool()
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(1))
    outputs, _ = await pool.infer("apart", action(0))
    assert outputs["y"][0, 0] == 0


async def test_a_hang_is_killed_and_started_again(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool(hang_ms=300, heartbeat_ms=50)
    process = await process_of(pool, "faulty")
    with pytest.raises(WorkerError):
        await pool.infer("faulty", action(2), deadline_ms=30_000)
    await until(lambda: not process.is_running())
    await until(lambda: pool.index()[0]["state"] == "ready")
    await pool.infer("faulty", action(0))


async def test_a_stopped_process_is_found_by_the_heartbeat(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool(hang_ms=300, heartbeat_ms=50)
    process = await process_of(pool, "faulty")
    process.send_signal(signal.SIGSTOP)
    await until(lambda: not process.is_running())
    await until(lambda: pool.index()[0]["state"] == "ready")


async def test_the_deadline_holds_even_while_the_worker_hangs(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    hanging = asyncio.create_task(pool.infer("faulty", action(2), deadline_ms=60_000))
    await until(pool._workers["shared"].process.blackbox.running)
    with pytest.raises(DeadlineError):
        async with asyncio.timeout(30):
            await pool.infer("faulty", action(0), deadline_ms=50)
    hanging.cancel()


async def test_an_expired_request_never_runs(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    busy = asyncio.create_task(pool.infer("faulty", action(5), deadline_ms=5000))
    await until(pool._workers["shared"].process.blackbox.running)
    with pytest.raises(DeadlineError):
        await pool.infer("faulty", action(0), deadline_ms=20)
    await busy
    stats = await pool.stats()
    assert stats["models"][0]["success"] == 1
    assert (stats["models"][0]["expired"], stats["models"][0]["cancelled"]) == (1, 0)


async def test_a_cancelled_request_never_runs_and_frees_its_slot(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    busy = asyncio.create_task(pool.infer("faulty", action(5), deadline_ms=5000))
    client = pool._workers["shared"].client
    await until(pool._workers["shared"].process.blackbox.running)
    waiting = asyncio.create_task(pool.infer("faulty", action(0), deadline_ms=5000))
    await until(lambda: client.in_flight == 2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await busy
    await until(lambda: client.in_flight == 0)
    assert client._exchange.ring.leased == 0
    stats = (await pool.stats())["models"][0]
    assert (stats["success"], stats["cancelled"]) == (1, 1)


async def test_a_full_queue_is_an_overload(root, make_pool):
    write_faulty(root, "faulty", extra="max_batch = 1")
    pool = await make_pool(queue=2)
    busy = asyncio.create_task(pool.infer("faulty", action(5), deadline_ms=10_000))
    await until(pool._workers["shared"].process.blackbox.running)
    outcomes = await asyncio.gather(
        *(pool.infer("faulty", action(0), deadline_ms=10_000) for _ in range(5)), return_exceptions=True
    )
    assert sum(isinstance(outcome, OverloadError) for outcome in outcomes) == 3
    await busy
    assert (await pool.stats())["models"][0]["rejected"] == 3


@pytest.mark.parametrize(
    ("number", "message"), [(3, "the native library said no"), (4, "has shape .0, 2. for a batch")]
)
async def test_a_backend_that_goes_wrong_is_a_model_error(root, make_pool, number, message):
    write_faulty(root, "faulty")
    pool = await make_pool()
    with pytest.raises(ModelError, match=message):
        await pool.infer("faulty", action(number))
    await pool.infer("faulty", action(0))


async def test_after_too_many_deaths_the_version_before_comes_back(root, make_pool):
    write_faulty(root, "faulty", versions={1: "", 2: ""})
    pool = await make_pool(deaths_cap=2)
    assert pool.index()[0]["versions"] == [2]
    for _ in range(2):
        await until(lambda: pool.index()[0]["state"] == "ready")
        with pytest.raises(WorkerError):
            await pool.infer("faulty", action(1))
    await until(lambda: pool.index()[0]["versions"] == [1])
    assert "version 2 took its worker down 2 times" in pool.index()[0]["reason"]
    assert "version 1 came back" in pool.index()[0]["reason"]
    assert (await pool.infer("faulty", action(0)))[1] == 1


async def test_without_a_version_before_the_model_fails_and_others_go_on(root, make_pool):
    write_faulty(root, "faulty")
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool(deaths_cap=2)
    for _ in range(2):
        await until(lambda: all(entry["state"] == "ready" for entry in pool.index()))
        with pytest.raises(WorkerError):
            await pool.infer("faulty", action(1))
    await until(lambda: pool._served["faulty"].state == "failed" and pool._served["same"].state == "ready")
    with pytest.raises(ModelError, match="is failed: version 1 took its worker down 2 times"):
        await pool.infer("faulty", action(0))
    await pool.infer("same", ones())
    await pool.load("faulty")
    await pool.infer("faulty", action(0))


@pytest.mark.parametrize("load", ["raise", "die", "hang"])
async def test_a_failed_reload_keeps_the_old_version(root, make_pool, load):
    write_faulty(root, "faulty")
    pool = await make_pool(load_timeout_s=6)
    write_faulty(root, "faulty", versions={2: load})
    with pytest.raises(MillhandError, match="version 2"):
        await pool.load("faulty")
    await until(lambda: pool.index()[0]["versions"] == [1])
    assert (await pool.infer("faulty", action(0)))[1] == 1
    assert "version 2" in pool.index()[0]["reason"]


async def test_a_reload_loses_no_request(root, make_pool):
    folder = write_model(root, "scale")
    scale(folder / "1/model.onnx", 2)
    pool = await make_pool()
    seen, stop = set(), asyncio.Event()

    async def ask():
        while not stop.is_set():
            outputs, version = await pool.infer("scale", ones(), deadline_ms=5000)
            assert outputs["y"][0, 0] == 1 + version
            seen.add(version)

    tasks = [asyncio.create_task(ask()) for _ in range(4)]
    await until(lambda: 1 in seen)
    scale(folder / "2/model.onnx", 3)
    await pool.load("scale")
    await until(lambda: 2 in seen)
    stop.set()
    await asyncio.gather(*tasks)
    assert pool.index()[0]["versions"] == [2]


async def test_unloading_the_last_model_ends_the_worker(root, make_pool):
    write_faulty(root, "faulty")
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    process = await process_of(pool, "faulty")
    await pool.unload("faulty")
    assert process.is_running()
    with pytest.raises(ModelError, match="'faulty' is unloaded"):
        await pool.infer("faulty", action(0))
    await pool.unload("same")
    assert not process.is_running()
    await pool.load("same")
    await pool.infer("same", ones())


async def test_stop_leaves_nothing_behind(root, make_pool, tmp_path):
    write_faulty(root, "faulty")
    before = descriptors()
    pool = await make_pool()
    process = await process_of(pool, "faulty")
    waiting = asyncio.create_task(pool.infer("faulty", action(5), deadline_ms=60_000))
    await until(pool._workers["shared"].process.blackbox.running)
    await pool.stop()
    assert (await waiting)[1] == 1  # what runs is answered
    assert not process.is_running()
    assert not list((tmp_path / "run").iterdir())
    gc.collect()
    assert descriptors() <= before


async def test_routes_follow_every_change(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool()
    watch = pool.watch_routes()
    first = await anext(watch)
    assert list(first["models"]["faulty"]["sockets"]) == ["1"]
    (await process_of(pool, "faulty")).kill()
    gone = await anext(watch)
    assert gone["generation"] > first["generation"]
    while not gone["models"]["faulty"]["sockets"]:
        gone = await anext(watch)
    assert gone["models"]["faulty"]["sockets"] != first["models"]["faulty"]["sockets"]
    await watch.aclose()


async def test_a_bad_interpreter_is_an_error_with_a_remedy(root, make_pool):
    write_faulty(root, "faulty")
    pool = await make_pool(interpreter="/nowhere/python3")
    assert "cannot be started with '/nowhere/python3'" in pool.index()[0]["reason"]
    with pytest.raises(ModelError, match="is failed"):
        await pool.infer("faulty", action(0))


async def test_a_foreign_interpreter_serves_with_its_own_packages(root, make_pool):
    """JetPack's TensorRT is for Python 3.10 only; FOREIGN_PYTHON names one with NumPy, msgspec and pluggy."""
    interpreter = os.environ.get("FOREIGN_PYTHON")
    if not interpreter:
        pytest.skip("FOREIGN_PYTHON names no other interpreter")
    write_faulty(root, "faulty")
    pool = await make_pool(interpreter=interpreter)
    assert (await pool.infer("faulty", action(0)))[1] == 1
    process = await process_of(pool, "faulty")
    assert interpreter in process.cmdline()
