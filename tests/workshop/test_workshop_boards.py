"""What an owner's word for a target means."""

from __future__ import annotations

from pathlib import Path

import pytest

import millhand_profiles
from millhand.errors import ConfigError
from millhand.hardware import Accelerator, Hardware
from millhand.profiles import load_profiles, match
from millhand.workshop.boards import target_named
from millhand.workshop.targets import node_targets

PROFILES = load_profiles([Path(millhand_profiles.__file__).parent])
PLAIN = node_targets(Hardware(), match(PROFILES, Hardware()))
CARD = Accelerator(
    index=0, name="NVIDIA A100-SXM4-80GB", uuid="GPU-1", compute_capability="8.0", memory_bytes=80 << 30, ready=True
)
BOARD = Hardware(accelerators=(CARD,))


@pytest.mark.parametrize(
    ("word", "name", "profile"),
    [
        ("a30", "sm80", "a30"),
        ("a100", "sm80", "a100-40gb"),
        ("a100-80gb", "sm80", "a100-80gb"),
        ("orin", "sm87", "jetson-agx-orin-32gb"),
        ("h100", "sm90", "h100"),
        ("sm80", "sm80", ""),
        ("sm120", "sm120", ""),
    ],
)
def test_boards_and_chips_that_are_not_here(word: str, name: str, profile: str) -> None:
    target = target_named(word, PLAIN, PROFILES)
    assert (target.name, target.accelerator, target.profile) == (name, "", profile)
    assert not target.runs_here
    assert target.compute_capability.replace(".", "") == name.removeprefix("sm")
    if profile:
        assert target.precisions[0] == "fp16"


@pytest.mark.parametrize("word", ["cpu", "generic-cpu"])
def test_the_cpu_is_always_here(word: str) -> None:
    target = target_named(word, PLAIN, PROFILES)
    assert (target.name, target.accelerator, target.precisions) == ("cpu", "cpu", ("fp32", "int8"))


@pytest.mark.parametrize("word", ["a30", "a100", "sm80"])
def test_the_same_chip_is_here(word: str) -> None:
    """One build serves A30 and A100; on a node with either, it runs."""
    target = target_named(word, node_targets(BOARD, match(PROFILES, BOARD)), PROFILES)
    assert (target.name, target.accelerator, target.profile) == ("sm80", "GPU-1", "a100-80gb")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a101", "target 'a101' is not known"),
        ("orinn", "target 'orinn' is not known"),
        ("jetson", "target 'jetson' means several chips: .*generic-jetson"),
        ("generic-nvidia", "profile 'generic-nvidia' names no chip"),
    ],
)
def test_words_that_name_no_chip(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        target_named(word, PLAIN, PROFILES)
    assert error.value.hint
