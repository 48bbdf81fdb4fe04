"""What candidates are tied to and what the machine has: real processes of makers that tell, crash and hang."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import pytest
from serving_kit import KIT, backends

from millhand.errors import ModelError, PluginError
from millhand.workshop import keys as keys_module
from millhand.workshop.keys import Keys
from millhand.workshop.recipe import Made, Target

CPU = Target()
GPU = Target(name="sm80", accelerator="GPU-1", compute_capability="8.0")
KEY = {"library": "10.3", "driver": "550"}


def made(**key: str) -> Made:
    return Made(artifact="model.plan", backend="faulty", key=key)


@pytest.fixture
async def keys(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(KIT), prepend=os.pathsep)
    monkeypatch.setenv("MILLHAND_TEST_KEY", json.dumps(KEY))
    found = Keys(backends())
    yield found
    await found.stop()


async def test_what_differs_is_named(keys):
    assert await keys.differences("keyed", made(library="10.3", driver="550", target="cpu"), CPU) == []
    found = await keys.differences("keyed", made(library="10.3", driver="535", gpu="A30"), CPU)
    assert found == ["driver was 535, is 550", "gpu was A30, is not here"]
    assert await keys.differences("keyed", made(target="cpu"), GPU) == ["target was cpu, is sm80"]


async def test_a_candidate_without_a_key_asks_nobody(keys):
    assert await keys.differences("nobody", made(), CPU) == []


async def test_a_maker_is_asked_once_for_a_target(keys, monkeypatch):
    assert (await keys.now("keyed", CPU))["driver"] == "550"
    monkeypatch.setenv("MILLHAND_TEST_KEY", json.dumps({"driver": "560"}))
    assert (await keys.now("keyed", CPU))["driver"] == "550"
    assert (await keys.now("keyed", GPU))["driver"] == "560"


@pytest.mark.parametrize(
    ("maker", "key", "message"),
    [
        ("keyed", {"raise": 1}, "there is no driver"),
        ("keyed", {"die": 1}, "took its process down"),
        ("keyless", {}, "maker 'keyless' does not tell"),
        ("keyd", {}, "no loaded plugin brings the maker 'keyd'; did you mean 'keyed'"),
    ],
)
async def test_what_cannot_be_told_is_an_error(keys, monkeypatch, maker, key, message):
    monkeypatch.setenv("MILLHAND_TEST_KEY", json.dumps(key))
    with pytest.raises((ModelError, PluginError), match=message):
        await keys.differences(maker, made(library="10.3"), CPU)


async def test_a_maker_that_hangs_is_ended(keys, monkeypatch):
    monkeypatch.setenv("MILLHAND_TEST_KEY", json.dumps({"hang": 1}))
    monkeypatch.setattr(keys_module, "DEADLINE_S", 0.5)
    with pytest.raises(ModelError, match=r"did not say within 0\.5 s"):
        await keys.now("keyed", CPU)
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in children if keys_module.MODULE in child.cmdline()]


async def test_a_foreign_interpreter_brings_its_own_packages(keys, tmp_path: Path):
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    foreign = Keys(backends(), python)
    assert (await foreign.now("keyed", CPU))["library"] == "10.3"
    await foreign.stop()


async def test_an_interpreter_that_is_missing(keys):
    foreign = Keys(backends(), Path("/nowhere/python3"))
    with pytest.raises(ModelError, match="cannot be asked with '/nowhere/python3': No such file"):
        await foreign.now("keyed", CPU)
    await foreign.stop()
