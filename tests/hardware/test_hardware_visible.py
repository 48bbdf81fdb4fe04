"""CUDA_VISIBLE_DEVICES: resolved once to UUIDs, narrows the workers, an unknown entry is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import millhand_profiles
from millhand.config import Config
from millhand.daemon import Daemon
from millhand.errors import ConfigError
from millhand.hardware import Hardware, discover
from millhand.hardware.visible import visible_devices
from millhand.profiles import load_profiles, match
from millhand.validation import validate

UUIDS = [f"GPU-{digit * 8}-2222-3333-4444-555555555555" for digit in "abcd"]
CARDS = "".join(f"GPU {index}: NVIDIA A30 (UUID: {uuid})\n" for index, uuid in enumerate(UUIDS))
SLICES = ["MIG-1b", "MIG-2c"]
MIG = (
    f"GPU 0: NVIDIA A30 (UUID: {UUIDS[0]})\n"
    f"  MIG 2g.12gb     Device  0: (UUID: {SLICES[0]})\n  MIG 2g.12gb     Device  1: (UUID: {SLICES[1]})\n"
    f"GPU 1: NVIDIA A30 (UUID: {UUIDS[1]})\n"
)


def recorded(root: Path, listing: str) -> Hardware:
    (root / "nvidia-smi-L.txt").write_text(listing)
    return discover(root)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (None, None),
        ("", ()),
        ("-1", ()),
        ("2,0", (UUIDS[2], UUIDS[0])),
        ("1, 1", (UUIDS[1],)),
        (f"{UUIDS[3]},0", (UUIDS[3], UUIDS[0])),
        ("GPU-bb", (UUIDS[1],)),
        ("3,-1,0", (UUIDS[3],)),
    ],
)
def test_numbers_and_uuids_become_uuids(tmp_path: Path, text: str | None, left: tuple[str, ...] | None) -> None:
    assert visible_devices(recorded(tmp_path, CARDS), text) == left


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", "'4', which names no GPU"),
        ("0,GPU-ff", "'GPU-ff', which names no"),
        ("GPU-", "more than one"),
        ("x", "'x'"),
    ],
)
def test_an_entry_that_names_no_gpu_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        visible_devices(recorded(tmp_path, CARDS), text)
    assert UUIDS[3] in caught.value.hint, "it says what there is"


def test_mig_slices(tmp_path: Path) -> None:
    hardware = recorded(tmp_path, MIG)
    assert visible_devices(hardware, SLICES[1]) == (SLICES[1],)
    assert visible_devices(hardware, "0") == tuple(SLICES), "a GPU in MIG mode stands for its slices"
    assert visible_devices(hardware, "1,MIG-1b") == (UUIDS[1], SLICES[0])


def test_a_node_without_a_driver_has_nothing_to_narrow() -> None:
    assert visible_devices(Hardware(), "0") == ()


def test_workers_are_narrowed_and_the_profile_stays(tmp_path: Path) -> None:
    profiles = load_profiles([Path(millhand_profiles.__file__).parent])
    hardware = recorded(tmp_path, CARDS)
    whole = match(profiles, hardware)
    assert [worker.accelerator for worker in whole.workers] == UUIDS
    narrowed = match(profiles, hardware, visible_devices(hardware, "3,1"))
    assert [worker.accelerator for worker in narrowed.workers] == [UUIDS[1], UUIDS[3]]
    assert narrowed.profile.name == whole.profile.name == "a30"
    assert any("CUDA_VISIBLE_DEVICES leaves" in reason for reason in narrowed.reasons)
    hidden = match(profiles, hardware, ())
    assert [worker.accelerator for worker in hidden.workers] == ["cpu"]


def test_the_daemon_honours_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = recorded(tmp_path, CARDS)
    daemon = Daemon(validate(Config, {"node": {"hardware_root": str(tmp_path)}}, "test"))
    daemon.hardware = hardware
    daemon.registry.load(daemon.config.plugin_tables())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-cc")
    assert [worker.accelerator for worker in daemon._match_profile().workers] == [UUIDS[2]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES has '7'"):
        daemon._match_profile()


def millhand(*arguments: str, visible: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millhand", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_commands_honour_it(tmp_path: Path) -> None:
    recorded(tmp_path, CARDS)
    shown = millhand("profile", "match", "--root", str(tmp_path), "--json", visible="2")
    assert [worker["accelerator"] for worker in json.loads(shown.stdout)["workers"]] == [UUIDS[2]]
    assert f"Visible     {UUIDS[2]}" in millhand("hw", "show", "--root", str(tmp_path), visible="2").stdout
    refused = millhand("hw", "show", "--root", str(tmp_path), visible="9")
    assert refused.returncode != 0
    assert "CUDA_VISIBLE_DEVICES has '9'" in refused.stderr
    assert "Try: this node has 0" in refused.stderr
