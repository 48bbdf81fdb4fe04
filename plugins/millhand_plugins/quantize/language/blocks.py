"""Round a language model block by block, each layer on the inputs that it will get once all before it is rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from millhand_plugins.quantize.grid import Grid
from millhand_plugins.quantize.language.net import STAGES, tensor_name
from millhand_plugins.quantize.rounding import Annealing, Moments, anneal

MakeGrid = Callable[[Any], Grid]
"""Weights [outputs, inputs] -> the grid to round them to."""


def round_nearest(model: Any, make_grid: MakeGrid) -> None:
    """Round every matrix of every block to nearest (RTN), in place; embedding and head stay."""
    for block in model.model.layers:
        for stage in STAGES:
            for name in stage:
                weights = block.get_submodule(name).weight.data
                grid = make_grid(weights)
                weights.copy_(grid.values(grid.nearest(weights)))


def round_annealed(
    model: Any,
    parts: Sequence[Any],
    make_grid: MakeGrid,
    schedule: Annealing,
    progress: Callable[[float, str], None] = lambda share, step: None,
) -> Iterator[tuple[str, Any, Grid]]:
    """Round every matrix of every block in place; yields (GGUF's name without `.weight`, whole numbers, grid).

    parts: calibration tokens, int64 [rows, window] each, on the model's device. The whole numbers are in the model's
    own order of rows (see net.gguf_rows).
    """
    import torch

    blocks = model.model.layers
    with torch.no_grad():
        told = [_first_inputs(model, part) for part in parts]
        original = [hidden for hidden, _ in told]
        rounded = list(original)
        for number, block in enumerate(blocks):
            wanted, original = _watch(block, original, told, [next(iter(stage)) for stage in STAGES])
            for stage in STAGES:
                first = next(iter(stage))
                seen, _ = _watch(block, rounded, told, [first])
                moments = _moments(seen[first], wanted.pop(first))
                progress(number / len(blocks), f"block {number}, {first}")
                matrices = [block.get_submodule(name).weight.data for name in stage]
                together = torch.cat(matrices)  # the rows of a layer know nothing of each other
                grid = make_grid(together)
                integers = anneal(together, grid, moments, schedule)
                values = grid.values(integers)
                start = 0
                for short, weights in zip(stage.values(), matrices, strict=True):
                    rows = slice(start, start + len(weights))
                    weights.copy_(values[rows])
                    yield tensor_name(number, short), integers[rows], _rows(grid, rows)
                    start = rows.stop
            _, rounded = _watch(block, rounded, told, [])
    progress(1.0, "done")


def _rows(grid: Grid, rows: slice) -> Grid:
    return Grid(grid.scale[rows], grid.offset[rows], grid.low, grid.high, grid.block, grid.xp)


def _first_inputs(model: Any, part: Any) -> tuple[Any, Mapping[str, Any]]:
    """What the first block is called with: (hidden states, the rest, which is the same for every block)."""
    caught: list[tuple[Any, Mapping[str, Any]]] = []

    class Caught(Exception):
        pass

    def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        caught.append((args[0] if args else kwargs["hidden_states"], rest))
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with contextlib.suppress(Caught):
            model(input_ids=part, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def _watch(
    block: Any, inputs: Sequence[Any], told: Sequence[tuple[Any, Mapping[str, Any]]], names: Sequence[str]
) -> tuple[dict[str, list[Any]], list[Any]]:
    """Run a block over all parts: (name -> the named layers' inputs, [tokens, inputs] a part; the block's outputs)."""
    seen: dict[str, list[Any]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        outputs = [block(hidden, **rest) for hidden, (_, rest) in zip(inputs, told, strict=True)]
    finally:
        for handle in handles:
            handle.remove()
    return seen, [output[0] if isinstance(output, tuple) else output for output in outputs]


def _moments(rounded: Sequence[Any], original: Sequence[Any]) -> Moments:
    """Second moments over all parts, summed part by part."""
    rows = sum(len(part) for part in rounded)
    own = sum(part.T @ part for part in rounded) / rows
    cross = sum(before.T @ after for before, after in zip(original, rounded, strict=True)) / rows
    return Moments(own, cross)
