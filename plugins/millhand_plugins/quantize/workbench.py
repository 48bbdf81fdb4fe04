"""One job: the model is read, a recipe is carried out, and what each layer lost is written down. Needs onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from millhand.errors import ModelError
from millhand.workshop.recipe import CPU, Job, Made
from millhand_plugins.quantize.blocks import write_dequantized, write_matmul_nbits
from millhand_plugins.quantize.calibration import Calibration
from millhand_plugins.quantize.cpu import int8_key, weight_levels
from millhand_plugins.quantize.graph import Graph, Layer
from millhand_plugins.quantize.int4 import Int4, Rounded
from millhand_plugins.quantize.int8 import Int8
from millhand_plugins.quantize.library import dynamic, half, simplified
from millhand_plugins.quantize.losses import described, layer_losses, output_loss
from millhand_plugins.quantize.mixed import Mix, Mixture, fewest, promoted
from millhand_plugins.quantize.options import Options
from millhand_plugins.quantize.qdq import TENSORRT, Form

ARTIFACT = "model.onnx"
BACKEND = "onnxruntime"
BLOCKED_OPSET = 21
"""DequantizeLinear by blocks, and int4."""
MOST_NAMED = 5


class Workbench:
    """A model, its options, and the recipes."""

    def __init__(self, job: Job) -> None:
        """Raises ModelError where the model cannot be quantised."""
        self._job = job
        self._options = Options.read(job.options)
        self._graph = Graph.read(job.model)
        self._notes: list[str] = []
        self._key: dict[str, str] = {}

    def make(self, recipe: str) -> Made:
        """Carry out a recipe of that name. Raises ModelError naming what stands in the way, and the remedy."""
        recipes = {
            "int8-static": lambda: self._int8(Form(levels=self._levels(), symmetric=False, chained=True)),
            "int8-qdq": lambda: self._int8(TENSORRT),
            "int8-dynamic": self._dynamic,
            "fp16": self._half,
            "int4": lambda: self._int4(annealed=False),
            "int4-annealed": lambda: self._int4(annealed=True),
            "int4-qdq": lambda: self._int4(annealed=True, dequantized=True),
            "mixed": self._mixed,
        }
        return recipes[recipe]()

    @cached_property
    def _calibration(self) -> Calibration:
        options = self._options
        found = Calibration(self._job, options.min_rows, options.rows_cap, options.seed)
        self._notes += found.notes
        return found

    def _levels(self) -> int:
        self._key = int8_key() if self._options.weight_bits == "auto" else {}
        return weight_levels(self._options.weight_bits)

    def _int8(self, form: Form) -> Made:
        self._job.progress(0.0, "reading the calibration rows")
        calibration = self._calibration
        graph = simplified(self._graph)
        chosen = self._chosen(graph, convolutions=True)
        self._job.progress(0.1, "finding ranges")
        int8 = Int8(graph, chosen, calibration, self._options, form)
        self._notes += int8.notes
        made = int8.candidate(layer.name for layer in chosen)
        self._job.progress(0.7, "measuring each layer")
        return self._finish(made, int8.graph, {layer.name: "int8" for layer in chosen})

    def _dynamic(self) -> Made:
        chosen = self._chosen(self._graph, convolutions=False)
        made = dynamic(self._graph, chosen, self._levels() < 127)
        return self._finish(made, self._graph, {layer.name: "int8" for layer in chosen})

    def _half(self) -> Made:
        if self._job.target.name == CPU:
            self._notes.append("the CPU computes in float32: the file is half as large, and loads more slowly")
        made = half(self._graph)
        return self._finish(made, self._graph, {layer.name: "fp16" for layer in self._graph.layers()})

    def _int4(self, *, annealed: bool, dequantized: bool = False) -> Made:
        graph = self._graph.upgraded(BLOCKED_OPSET) if dequantized else self._graph
        chosen = self._chosen(graph, convolutions=False)
        int4 = Int4(graph, self._options, positive=dequantized)
        if annealed:
            calibration = self._calibration
            rounded = int4.annealed(chosen, calibration, lambda share, step: self._job.progress(0.9 * share, step))
        else:
            rounded = {layer.name: int4.nearest(layer) for layer in chosen}
        made = graph.copy()
        for layer in chosen:
            self._write(made, layer, rounded[layer.name], dequantized)
        return self._finish(made, graph, {layer.name: "int4" for layer in chosen})

    def _write(self, graph: Graph, layer: Layer, rounded: Rounded, dequantized: bool) -> None:
        if dequantized:
            write_dequantized(graph, layer, rounded.grid, rounded.integers)
        else:
            write_matmul_nbits(graph, layer, rounded.grid, rounded.integers, self._options.compute)

    def _mixed(self) -> Made:
        progress, calibration = self._job.progress, self._calibration
        graph = simplified(self._graph)
        chosen = self._chosen(graph, convolutions=True)
        form = Form(levels=self._levels(), symmetric=False, chained=True)
        int8 = Int8(graph, chosen, calibration, self._options, form)
        self._notes += int8.notes
        linear = [layer for layer in int8.layers if layer.linear]
        rounded = Int4(int8.graph, self._options).annealed(
            linear, calibration, lambda share, step: progress(0.1 + 0.4 * share, step), in_turn=False
        )
        mixture = Mixture(int8, rounded, self._options)
        promotions = mixture.promotions(calibration, lambda share, step: progress(0.5 + 0.2 * share, step))
        mixes = [promoted(mixture.lowest(), promotions[:count]) for count in range(len(promotions) + 1)]
        count = fewest(len(promotions), lambda count: self._passes(mixture, mixes[count], int8.graph))
        if count is None:
            raise ModelError(
                "no mix of precisions passes: not even float16 weights do",
                hint="give more calibration rows, or raise the gate's limit",
            )
        self._notes.append(f"{count} of {len(promotions)} promotions were needed")
        return self._finish(mixture.build(mixes[count]), int8.graph, mixes[count])

    def _passes(self, mixture: Mixture, mix: Mix, original: Graph) -> bool:
        """By the workshop's judge, or where it cannot judge here by what the output loses on the calibration rows."""
        counts = {precision: list(mix.values()).count(precision) for precision in sorted(set(mix.values()))}
        self._job.progress(0.7, f"judging {', '.join(f'{count} in {name}' for name, count in counts.items())}")
        graph = mixture.build(mix)
        if self._job.judge is None:
            return output_loss(original, graph.model, self._calibration) <= self._options.loss
        graph.write(self._job.folder / ARTIFACT)
        return self._job.judge(Made(artifact=ARTIFACT, backend=BACKEND)).passed

    def _chosen(self, graph: Graph, *, convolutions: bool) -> list[Layer]:
        """The layers that a recipe makes smaller; the others go into the notes. Raises ModelError where none is left.

        A convolution uses each weight at many places, so that it pays however small it is.
        """
        layers = graph.layers()
        chosen = [
            layer
            for layer in layers
            if (layer.linear and layer.size >= self._options.min_weights) or (convolutions and not layer.linear)
        ]
        if not chosen:
            kinds = "Conv, Gemm or MatMul" if convolutions else "Gemm or MatMul"
            raise ModelError(
                f"'{self._job.model}' has no {kinds} with {self._options.min_weights} constant float32 weights",
                hint="int8-static also takes convolutions; or lower [plugins.quantize] min_weights",
            )
        names = {layer.name for layer in chosen}
        left = [f"{layer.name} ({layer.operator})" for layer in layers if layer.name not in names]
        for label, items in (("left in float32", left), ("not quantised by any recipe", graph.untouched())):
            if items:
                more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
                self._notes.append(f"{label}: {', '.join(items[:MOST_NAMED])}{more}")
        return chosen

    def _finish(self, made: Graph, original: Graph, precisions: Mapping[str, str]) -> Made:
        """Write the artifact, and measure its layers where there are calibration rows."""
        made.write(self._job.folder / ARTIFACT)
        layers: Sequence[Layer] = original.layers()
        losses: Mapping[str, float] = {}
        if self._job.calibration and self._job.inputs:
            losses = layer_losses(original, made.model, layers, self._calibration)
        self._job.progress(1.0, "done")
        return Made(
            artifact=ARTIFACT,
            backend=BACKEND,
            key=self._key,
            layers=described(layers, precisions, losses),
            notes=tuple(self._notes),
        )
