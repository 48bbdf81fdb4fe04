"""Trials of backends' parts, in real worker processes."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime
import pytest
from serving_kit import KIT, backends, identity, write_faulty, write_model

from millhand.serving.repository import Repository
from millhand.serving.selftest import SelfTest
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand_plugins.onnxruntime.probe import NET
from millhand_plugins.onnxruntime.probe_net import probe_net

CPU_ONLY = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
GPU = WorkerDefaults(accelerator="GPU-12345678-0000-0000-0000-000000000000")


@pytest.fixture
def planned(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A self-test of what `root` holds then."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(KIT), prepend=os.pathsep)

    def plan(*hosts: WorkerDefaults, **settings: object) -> SelfTest:
        made = ModelSettings(paths=(root,), **settings)
        return SelfTest(backends(), made, hosts or [WorkerDefaults()], Repository([root]), ())

    return plan


def test_the_probe_is_what_its_script_writes() -> None:
    assert NET.read_bytes() == probe_net()


async def test_the_cpu_is_tried_and_found_to_work(root, planned):
    identity(write_model(root, "same") / "1/model.onnx")
    test = planned()
    assert not test.worthwhile, "each load on the CPU shows the same"
    (tried,) = await test.run()
    assert (tried.backend, tried.part, tried.accelerator, tried.works) == ("onnxruntime", "cpu", "cpu", True)
    assert tried.message.startswith("works on the CPU: computes, loaded in ")
    assert test.tried == [tried]


async def test_nothing_is_tried_that_no_model_needs(root, planned):
    write_faulty(root, "faulty")
    assert await planned().run() == []


@pytest.mark.skipif(not CPU_ONLY, reason="this ONNX Runtime has CUDA")
async def test_each_provider_is_tried_by_itself_and_says_why_it_does_not_work(root, planned):
    identity(write_model(root, "same") / "1/model.onnx")
    test = planned(GPU)
    assert test.worthwhile
    cuda, cpu = await test.run()
    assert (cuda.part, cuda.works, cpu.part, cpu.works) == ("cuda", False, "cpu", True)
    assert not cuda.needed and cuda.message.endswith("; the CPU computes"), "nobody asked for it"
    assert f"does not work on {GPU.accelerator}: this build of ONNX Runtime has no provider 'cuda'" in cuda.message
    assert "onnxruntime-gpu" in cuda.hint


@pytest.mark.skipif(not CPU_ONLY, reason="this ONNX Runtime has CUDA")
async def test_what_the_owner_asked_for_is_needed(root, planned):
    identity(write_model(root, "same", extra='[options]\nproviders = ["cuda", "cpu"]\n') / "1/model.onnx")
    cuda, _ = await planned(GPU).run()
    assert cuda.needed and not cuda.works


async def test_a_models_own_list_is_tried_once_whoever_asks_for_it(root, planned):
    own = '[options]\nproviders = ["tensorrt", "cpu"]\n'
    for name in ("a", "b"):
        identity(write_model(root, name, extra=f"accelerator = 'cpu'\n{own}") / "1/model.onnx")
    found = await planned(GPU).run()
    assert [(one.part, one.accelerator, one.works) for one in found] == [
        ("tensorrt", "cpu", False),
        ("cpu", "cpu", True),
    ]


async def test_a_list_that_cannot_be_is_told_with_its_model(root, planned):
    identity(write_model(root, "odd", extra='[options]\nproviders = ["cudaa"]\n') / "1/model.onnx")
    (tried,) = await planned().run()
    assert (tried.part, tried.works) == ("model 'odd'", False) and "did you mean 'cuda'" in tried.message


async def test_a_backend_that_raises_hides_no_other(root, planned):
    write_model(root, "odd", backend="tried", extra='[options]\nraise = "out of ideas"\n')
    (root / "odd/1").mkdir()
    (root / "odd/1/model.json").write_text("{}")
    identity(write_model(root, "same") / "1/model.onnx")
    found = {one.backend: one for one in await planned().run()}
    assert found["tried"].message == "RuntimeError: out of ideas" and not found["tried"].works
    assert found["onnxruntime"].works


async def test_an_interpreter_that_cannot_run_a_worker_is_told_for_each_part(root, planned, tmp_path):
    identity(write_model(root, "same") / "1/model.onnx")
    found = await planned(GPU, interpreter=tmp_path / "no-python").run()
    assert [one.works for one in found] == [False, False]
    assert all("no-python" in one.message and "interpreter" in one.hint for one in found)


async def test_models_that_cannot_be_served_hide_no_other(root, planned):
    identity(write_model(root, "same") / "1/model.onnx")
    write_model(root, "empty")
    assert [one.works for one in await planned().run()] == [True]
