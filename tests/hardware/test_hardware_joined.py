"""Which GPUs are joined best: made topologies, and the recorded ones of public captures."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

import millhand_profiles
from millhand.hardware import discover
from millhand.hardware.facts import Accelerator, Hardware, MigInstance, Topology
from millhand.hardware.joined import Joined, best_set, best_sets, largest_by_nvlink
from millhand.profiles import load_profiles, match

DATA = os.environ.get("MILLHAND_DATA")
FOLDER = Path(DATA or ".") / "hardware/nvidia"
needs_data = pytest.mark.skipif(not DATA, reason="MILLHAND_DATA does not name the folder of public data sets")
SHIPPED = load_profiles([Path(millhand_profiles.__file__).parent])


def topology(count: int, **links: str) -> Topology:
    """`_0_1="NV4"` joins GPUs 0 and 1; all others are across sockets."""
    named = {tuple(map(int, key[1:].split("_"))): link for key, link in links.items()}
    return Topology(
        links=tuple(
            tuple("X" if i == j else named.get((min(i, j), max(i, j)), "SYS") for j in range(count))
            for i in range(count)
        )
    )


def test_more_nvlinks_win_over_fewer_and_any_over_pcie() -> None:
    joined = topology(4, _0_1="PIX", _0_2="NV4", _1_3="NV12", _2_3="NV2")
    assert best_set(joined, 2, range(4)) == Joined((1, 3), "NV12")
    assert best_set(joined, 2, (0, 1, 2)) == Joined((0, 2), "NV4")
    assert best_set(joined, 2, (0, 1)) == Joined((0, 1), "PIX")
    assert largest_by_nvlink(joined, range(4)) == 2
    assert largest_by_nvlink(joined, (0, 1)) == 1


def test_the_worst_link_of_a_set_counts_first() -> None:
    """0, 1 and 2 have one superb link and a bad one; 3, 4 and 5 are joined evenly."""
    joined = topology(6, _0_1="NV18", _0_2="NV18", _3_4="NV1", _3_5="NV1", _4_5="NV1")
    assert best_set(joined, 3, range(6)) == Joined((3, 4, 5), "NV1")
    assert best_set(joined, 2, range(6)) == Joined((0, 1), "NV18")


def test_sizes_that_cannot_be_give_none() -> None:
    joined = topology(2)
    assert best_set(joined, 1, range(2)) is None and best_set(joined, 3, range(2)) is None
    assert best_sets(joined, []) == [] and best_sets(joined, [1]) == []
    assert largest_by_nvlink(joined, []) == 1


def test_a_topology_that_is_not_known_still_names_gpus() -> None:
    assert best_sets(Topology(), range(3)) == [Joined((0, 1), ""), Joined((0, 1, 2), "")]
    assert largest_by_nvlink(Topology(), range(8)) == 1


def test_thirty_two_gpus_in_quads_are_told_apart_in_little_time() -> None:
    quads = {f"_{i}_{j}": "NV6" for i, j in itertools.combinations(range(32), 2) if i % 8 == j % 8}
    joined = topology(32, **quads)
    assert best_set(joined, 4, range(32)) == Joined((0, 8, 16, 24), "NV6")
    assert best_set(joined, 4, range(1, 32)) == Joined((1, 9, 17, 25), "NV6")
    assert largest_by_nvlink(joined, range(32)) == 4


@needs_data
@pytest.mark.parametrize(("name", "expected"), [
    ("topo-m_8xA100_4nic.txt", [((0, 1), "NV12"), ((0, 1, 2, 3), "NV12"), (tuple(range(8)), "NV12")]),
    ("topo-m_8gpu_pcie_no_nvlink.txt", [((1, 2), "PHB"), ((1, 2, 3, 4), "NODE"), (tuple(range(8)), "SYS")]),
])  # fmt: skip
def test_recorded_boards(name: str, expected: list[tuple[tuple[int, ...], str]]) -> None:
    found = best_sets(discover(FOLDER / name).topology, range(8))
    assert [(one.gpus, one.link) for one in found] == expected


def test_what_is_visible_decides_which_cards_a_model_may_be_spread_over() -> None:
    """Four A100 in two pairs: the profile allows four, NVLink two, and the visible ones may be of different pairs."""
    gpus = tuple(
        Accelerator(
            index=i, name="NVIDIA A100-SXM4-80GB", uuid=f"GPU-{i}", memory_bytes=80 << 30, ready=True,
            compute_capability="8.0", mig_enabled=i == 4, mig=(MigInstance(uuid="MIG-0"),) if i == 4 else (),
        )
        for i in range(5)
    )  # fmt: skip
    node = Hardware(accelerators=gpus, topology=topology(5, _0_1="NV12", _2_3="NV12"))

    def found(visible: list[str] | None) -> tuple[int, list[tuple[int, ...]]]:
        made = match(SHIPPED, node, visible)
        return made.tensor_parallel, [joined.gpus for joined in made.joined]

    assert found(None) == (2, [(0, 1), (0, 1, 2, 3)])
    assert found(["GPU-2", "GPU-3", "MIG-0"]) == (2, [(2, 3)])
    assert found(["GPU-0", "GPU-2"]) == (1, [(0, 2)])
    assert found(["GPU-0", "MIG-0"]) == (1, [])
