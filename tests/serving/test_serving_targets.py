"""Which shelf a node's accelerators take their candidates from."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import millhand_profiles
from millhand.hardware.facts import Accelerator, Hardware, Jetson, Memory, MigInstance
from millhand.profiles import load_profiles, match
from millhand.workshop.targets import node_targets, target_name

GIB = 1 << 30
A30 = Accelerator(index=0, name="NVIDIA A30", uuid="GPU-a", compute_capability="8.0", memory_bytes=24 * GIB, ready=True)
SLICES = tuple(
    MigInstance(index=number, uuid=f"MIG-{number}", profile="1g.6gb", memory_bytes=6 * GIB) for number in (0, 1)
)


def targets(*accelerators, **facts):
    node = Hardware(accelerators=accelerators, memory=Memory(available_bytes=8 * GIB), **facts)
    return node_targets(node, match(load_profiles([Path(millhand_profiles.__file__).parent]), node))


@pytest.mark.parametrize(("capability", "name"), [("", "cpu"), ("8.0", "sm80"), ("8.7", "sm87"), ("12.0", "sm120")])
def test_names(capability, name):
    assert target_name(capability) == name


def test_a_node_without_a_gpu():
    (cpu,) = targets().values()
    assert (cpu.name, cpu.accelerator, cpu.memory_bytes, cpu.profile) == ("cpu", "cpu", 8 * GIB, "generic-cpu")


def test_each_gpu_and_each_slice_has_a_target():
    found = targets(A30, msgspec.structs.replace(A30, index=1, uuid="GPU-b"))
    assert {name: target.name for name, target in found.items()} == {"cpu": "cpu", "GPU-a": "sm80", "GPU-b": "sm80"}
    assert found["GPU-a"].precisions[0] == "fp16" and found["GPU-a"].memory_bytes == 24 * GIB
    found = targets(msgspec.structs.replace(A30, mig_enabled=True, mig=SLICES))
    assert {name: target.name for name, target in found.items()} == {"cpu": "cpu", "MIG-0": "sm80", "MIG-1": "sm80"}
    assert found["MIG-1"].memory_bytes == 6 * GIB and found["MIG-1"].accelerator == "MIG-1"


def test_a_gpu_of_an_unknown_kind_has_none():
    assert set(targets(msgspec.structs.replace(A30, name="New", compute_capability=""))) == {"cpu"}


def test_shared_memory_counts_as_what_is_available():
    orin = Accelerator(
        index=0, name="Orin", uuid="GPU-o", compute_capability="8.7", unified_memory=True, ready=True, memory_bytes=1
    )
    found = targets(orin, jetson=Jetson(module="Jetson AGX Orin 64GB"))
    assert (found["GPU-o"].name, found["GPU-o"].memory_bytes) == ("sm87", 8 * GIB)
