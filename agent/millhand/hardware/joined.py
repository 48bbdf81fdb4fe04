"""Which GPUs of a node are joined best: for one model that is spread over several of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec

from millhand.hardware.facts import Topology

# As `nvidia-smi topo -m` explains them: within one PCIe switch, across several, across a host bridge, across host
# bridges of one NUMA node, across the link between sockets. An NVLink is worth more than any, several more than one.
PCIE_RANK = {"PIX": 0.5, "PXB": 0.4, "PHB": 0.3, "NODE": 0.2, "SYS": 0.1}
SETS_CAP = 2000
"""Where there are more sets of a size than this, they are grown one GPU at a time instead of all compared."""


class Joined(msgspec.Struct, frozen=True):
    """GPUs by index, ascending, and the worst link between any two of them; "" where it is not known."""

    gpus: tuple[int, ...]
    link: str

    @property
    def by_nvlink(self) -> bool:
        return self.link.startswith("NV")


def best_set(topology: Topology, count: int, among: Sequence[int]) -> Joined | None:
    """The `count` GPUs of `among` whose worst link is the best, then whose links are the best together.

    Of equals the first in order of the indices. None where there are fewer, or one or none is asked for.
    """
    usable = sorted(set(among))
    if not 2 <= count <= len(usable):
        return None
    if math.comb(len(usable), count) <= SETS_CAP:
        sets = [*itertools.combinations(usable, count)]
    else:
        sets = [_grown(topology, first, count, usable) for first in usable]
    best = max(sets, key=lambda gpus: _worth(topology, gpus))
    return Joined(best, min(_links(topology, best), key=_rank))


def best_sets(topology: Topology, among: Sequence[int]) -> list[Joined]:
    """The best sets of 2, 4, 8, ... GPUs, and of all of them."""
    total = len(set(among))
    counts = {2**power for power in range(1, total.bit_length()) if 2**power <= total} | {total}
    return [found for count in sorted(counts) if (found := best_set(topology, count, among)) is not None]


def largest_by_nvlink(topology: Topology, among: Sequence[int]) -> int:
    """How many GPUs each reach each other one by NVLink; 1 where none does."""
    counts = range(len(set(among)), 1, -1)
    sets = (best_set(topology, count, among) for count in counts)
    return next((len(found.gpus) for found in sets if found is not None and found.by_nvlink), 1)


def _grown(topology: Topology, first: int, count: int, usable: Sequence[int]) -> tuple[int, ...]:
    """A set around one GPU, each time with the one that joins it best."""
    gpus: tuple[int, ...] = (first,)
    while len(gpus) < count:
        others = [gpu for gpu in usable if gpu not in gpus]
        chosen = max(others, key=lambda other: _worth(topology, (*gpus, other)))
        gpus = (*gpus, chosen)
    return tuple(sorted(gpus))


def _worth(topology: Topology, gpus: Sequence[int]) -> tuple[float, float]:
    ranks = [_rank(link) for link in _links(topology, gpus)]
    return min(ranks), sum(ranks)


def _links(topology: Topology, gpus: Sequence[int]) -> list[str]:
    return [_link(topology, one, other) for one, other in itertools.combinations(gpus, 2)]


def _link(topology: Topology, one: int, other: int) -> str:
    try:
        return topology.links[one][other]
    except IndexError:
        return ""


def _rank(link: str) -> float:
    if link.startswith("NV"):
        return float(link[2:]) if link[2:].isdecimal() else 1.0
    return PCIE_RANK.get(link, 0.0)
