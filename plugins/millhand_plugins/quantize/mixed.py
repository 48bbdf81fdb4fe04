"""Mixed precision: every layer as small as the task allows, the most sensitive ones promoted first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from millhand_plugins.quantize.blocks import store_half, write_matmul_nbits
from millhand_plugins.quantize.calibration import Calibration
from millhand_plugins.quantize.graph import Graph
from millhand_plugins.quantize.int4 import Progress, Rounded
from millhand_plugins.quantize.int8 import Int8
from millhand_plugins.quantize.losses import output_loss
from millhand_plugins.quantize.options import Options

LADDER = ("int4", "int8", "fp16")
"""From small to exact. fp16 keeps weights as float16 and computes in float32."""
BYTES = {"int4": 0.5, "int8": 1.0, "fp16": 2.0}
Mix = Mapping[str, str]
"""Layer name -> precision."""


@dataclass(frozen=True)
class Promotion:
    """One layer, one step up the ladder."""

    layer: str
    precision: str


class Mixture:
    """All mixes of one graph."""

    def __init__(self, int8: Int8, rounded: Mapping[str, Rounded], options: Options) -> None:
        """int8: of every layer that may be lowered. rounded: int4 weights of its linear layers, each on its own."""
        self._int8, self._rounded, self._options = int8, rounded, options
        self.layers = int8.layers

    def lowest(self) -> dict[str, str]:
        """Everything at the foot of the ladder: int4, or int8 where there is no int4 kernel (convolutions)."""
        return {layer.name: "int4" if layer.name in self._rounded else "int8" for layer in self.layers}

    def build(self, mix: Mix) -> Graph:
        """The model in this mix; layers that it does not name stay float32."""
        graph = self._int8.candidate(name for name, precision in mix.items() if precision == "int8")
        for layer in self.layers:
            if mix.get(layer.name) == "int4":
                rounded = self._rounded[layer.name]
                write_matmul_nbits(graph, layer, rounded.grid, rounded.integers, self._options.compute)
            elif mix.get(layer.name) == "fp16":
                store_half(graph, layer)
        return graph

    def promotions(self, calibration: Calibration, progress: Progress) -> list[Promotion]:
        """All steps up from `lowest`, the one that wins most for a byte first.

        A layer's sensitivity at a precision is what the model's output loses where that layer alone has it.
        """
        losses: dict[str, dict[str, float]] = {}
        for number, layer in enumerate(self.layers):
            progress(number / len(self.layers), f"how much '{layer.name}' matters")
            steps = LADDER[LADDER.index(self.lowest()[layer.name]) : -1]
            losses[layer.name] = {
                step: output_loss(self._int8.graph, self.build({layer.name: step}).model, calibration) for step in steps
            }
        return ranked({layer.name: layer.size for layer in self.layers}, losses)


def promoted(lowest: Mix, promotions: Sequence[Promotion]) -> dict[str, str]:
    return {**lowest, **{promotion.layer: promotion.precision for promotion in promotions}}


def fewest(count: int, passes: Callable[[int], bool]) -> int | None:
    """The smallest number of promotions from 0 to `count` that passes; None where not even all do.

    Halves the rest at each trial: that more bits are never worse is taken for granted, and what is returned was tried.
    """
    if passes(0):
        return 0
    if count == 0 or not passes(count):
        return None
    fails, holds = 0, count
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if passes(middle):
            holds = middle
        else:
            fails = middle
    return holds


def ranked(sizes: Mapping[str, int], losses: Mapping[str, Mapping[str, float]]) -> list[Promotion]:
    """All promotions in the order in which they pay. sizes: weights of each layer; losses: by layer and precision."""
    rest = {name: list(steps) for name, steps in losses.items()}

    def worth(name: str) -> float:
        """Loss that a layer's next promotion takes away, for a byte."""
        now = rest[name][0]
        following = LADDER[LADDER.index(now) + 1]
        won = losses[name][now] - losses[name].get(following, 0.0)
        return won / (sizes[name] * (BYTES[following] - BYTES[now]))

    order: list[Promotion] = []
    while any(rest.values()):
        name = max((name for name, steps in rest.items() if steps), key=worth)
        now = rest[name].pop(0)
        order.append(Promotion(name, LADDER[LADDER.index(now) + 1]))
    return order
