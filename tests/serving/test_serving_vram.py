"""The memory of GPUs, on a node that has one: measured at the load, limited, given back, and where models go."""

from __future__ import annotations

import json
import shutil
import subprocess

import psutil
import pytest
from serving_kit import action, until, write_model

from millhand.errors import ModelError
from millhand.serving.device_memory import device_memory
from millhand.serving.settings import WorkerDefaults

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here"),
]

MIB = 1 << 20
NOISE = 32 * MIB


def gpus():
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def hosts(count=1, bytes_cap=0):
    if len(gpus()) < count:
        pytest.skip(f"fewer than {count} GPUs")
    return [WorkerDefaults(accelerator=uuid, memory_bytes_cap=bytes_cap) for uuid in gpus()[:count]]


def hold(root, name, mebibytes, version=1, extra=""):
    folder = write_model(root, name, backend="vram", extra=extra)
    (folder / str(version)).mkdir()
    (folder / str(version) / "model.json").write_text(json.dumps({"hold": mebibytes}))


def state(pool, name):
    return next(entry for entry in pool.index() if entry["name"] == name)


def taken(pool, name):
    return sum(detail["memory_bytes"] for detail in state(pool, name)["details"])


async def test_a_load_is_measured_and_an_unload_gives_all_back(root, make_pool):
    (host,) = hosts()
    before = device_memory(host.accelerator).used
    hold(root, "large", 2048)
    pool = await make_pool(hosts=[host])
    print(f"2048 MiB and a context take {taken(pool, 'large') / MIB:.0f} MiB")
    assert 2048 * MIB <= taken(pool, "large") < 4096 * MIB
    assert abs(device_memory(host.accelerator).used - before - taken(pool, "large")) < NOISE
    await pool.infer("large", action(0))
    await pool.unload("large")
    await until(lambda: device_memory(host.accelerator).used < before + NOISE)


async def test_an_unloaded_version_gives_its_memory_back_while_the_worker_lives(root, make_pool):
    (host,) = hosts()
    hold(root, "large", 512, extra='policy = "all"')
    hold(root, "large", 1024, version=2, extra='policy = "all"')
    pool = await make_pool(hosts=[host])
    both = device_memory(host.accelerator).used
    await pool.unload("large", 2)
    assert abs(both - device_memory(host.accelerator).used - 1024 * MIB) < NOISE


async def test_the_accelerators_budget_lets_the_least_recently_asked_make_room(root, make_pool):
    hold(root, "a", 2048)
    probe = await make_pool(hosts=hosts())
    one = taken(probe, "a")
    await probe.stop()
    hold(root, "b", 2048)
    hold(root, "c", 2048)
    pool = await make_pool(hosts=hosts(bytes_cap=int(2.5 * one)), load=("a", "b"))
    await pool.infer("b", action(0))
    await pool.infer("a", action(0))
    await pool.load("c")
    assert {name: state(pool, name)["state"] for name in "abc"} == {"a": "ready", "b": "unloaded", "c": "ready"}
    hold(root, "d", 16_384)
    with pytest.raises(ModelError, match="allowed are"):
        await pool.load("d")
    assert state(pool, "d")["state"] == "failed"


async def test_a_model_goes_to_the_gpu_with_the_most_free_memory(root, make_pool):
    two = hosts(2)
    for name in ("a", "b"):
        hold(root, name, 2048)
    hold(root, "spread", 256, extra="spread = true")
    pool = await make_pool(hosts=two)
    assert {state(pool, name)["worker"][-2:] for name in "ab"} == {"@0", "@1"}
    assert state(pool, "spread")["worker"] == "spread@0, spread@1"
    for worker in pool._workers.values():
        environment = psutil.Process(worker.process.pid).environ()
        assert environment["CUDA_VISIBLE_DEVICES"] == worker.host.accelerator
