"""The catalogue: every entry counted, and what fits which board."""

from __future__ import annotations

from pathlib import Path

import pytest

from millhand.errors import ModelError
from millhand.language.catalogue import catalogue, entry_named
from millhand.language.fitting import Room
from millhand.profiles import Profile, load_profiles

WEIGHTS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}
"""As the releases' safetensors say."""
GIB = 1 << 30


@pytest.fixture(scope="module")
def profiles() -> dict[str, Profile]:
    import millhand_profiles

    return {profile.name: profile for profile in load_profiles([Path(millhand_profiles.__file__).parent])}


def test_every_shape_counts_the_weights_of_its_release() -> None:
    assert {name: entry.parameters for name, entry in catalogue().items()} == WEIGHTS


def test_seven_billion_fit_a_30_in_16_bits_and_a_slice_of_it_in_none(profiles: dict[str, Profile]) -> None:
    entry = entry_named("deepseek-r1-distill-qwen-7b")
    whole = Room(int(24 * GIB * 0.9), "the GPU", profiles["a30"])
    slice_ = Room(int(6 * GIB * 0.9), "the GPU", profiles["a30-mig"])
    assert whole.fits(entry.bytes("F16"), entry) is True
    assert slice_.fits(entry.bytes("Q8_0"), entry) is False
    assert slice_.fits(entry.bytes("Q4_K_M"), entry) is True
    with pytest.raises(ModelError, match=r"needs 14\.6 GiB of memory"):
        slice_.check("r1", entry.bytes("F16"), entry)


def test_speed_is_bandwidth_over_weights(profiles: dict[str, Profile]) -> None:
    entry = entry_named("qwen2.5-1.5b")
    room = Room(None, "the GPU", profiles["a30"])
    assert room.tokens_per_s(entry.bytes("F16")) == pytest.approx(933e9 / (2 * 1_543_714_304))
    assert room.fits(entry.bytes("F16"), entry) is None


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'qwen3-1\.7b'"):
        entry_named("qwen3-1.7")
