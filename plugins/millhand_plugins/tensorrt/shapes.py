"""Optimisation profiles: the sizes that an engine takes, and those that it is fastest at. Python 3.10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millhand.errors import ModelError
from millhand.serving.tensors import Specs


@dataclass(frozen=True)
class NetworkInput:
    """An input as the ONNX file has it."""

    name: str
    shape: tuple[int, ...]
    """-1 for free dimensions."""
    dimensions: tuple[str, ...]
    """Their names, "" for none."""


@dataclass(frozen=True)
class Extent:
    """Shapes of one input in one profile."""

    lowest: tuple[int, ...]
    usual: tuple[int, ...]
    highest: tuple[int, ...]


Profile = Mapping[str, Extent]
"""Input name -> its shapes."""


@dataclass(frozen=True)
class Traffic:
    """What the engine shall take."""

    max_batch: int
    typical_batch: int
    ranges: Mapping[str, Sequence[int]]
    """The key `ranges` of the plugin's table."""


def make_profiles(
    inputs: Sequence[NetworkInput], declared: Specs, traffic: Traffic, *, profile_of_one: bool
) -> list[Profile]:
    """Profiles for all inputs: one from a batch of one to `max_batch`, before it perhaps one for a batch of one alone.

    declared: as model.toml has the inputs; sizes that it fixes hold. Raises ModelError naming the input, the dimension
    and the key to set, where a dimension is free and has no range; and where the batch is not free.
    """
    typical = min(max(1, traffic.typical_batch), traffic.max_batch)
    batches = [(1, typical, traffic.max_batch)]
    if profile_of_one and traffic.max_batch > 1:
        batches.insert(0, (1, 1, 1))
    return [{item.name: _extent(item, declared, traffic.ranges, batch) for item in inputs} for batch in batches]


def _extent(
    item: NetworkInput, declared: Specs, ranges: Mapping[str, Sequence[int]], batch: tuple[int, int, int]
) -> Extent:
    if not item.shape or item.shape[0] != -1:
        raise ModelError(
            f"input '{item.name}' has shape {list(item.shape)}: its first dimension is not a free batch",
            hint="export the model with a free first dimension on every input and output",
        )
    sizes = [batch, *(_sizes(item, axis, declared, ranges) for axis in range(1, len(item.shape)))]
    lowest, usual, highest = (tuple(size[place] for size in sizes) for place in range(3))
    return Extent(lowest, usual, highest)


def _sizes(item: NetworkInput, axis: int, declared: Specs, ranges: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    size = item.shape[axis]
    if size == -1 and item.name in declared:
        size = declared[item.name][1][axis]
    if size != -1:
        return size, size, size
    place, dimension = f"{item.name}.{axis}", item.dimensions[axis]
    for key in (place, dimension):
        if key and key in ranges:
            low, best, high = ranges[key]
            return low, best, high
    named = f" ('{dimension}')" if dimension else ""
    key = dimension if dimension.isidentifier() else f'"{place}"'
    raise ModelError(
        f"input '{item.name}' is free in dimension {axis}{named}, and no range is set for it",
        hint=f"set [plugins.tensorrt.ranges] {key} = [lowest, usual, highest], or fix the size in model.toml",
    )
