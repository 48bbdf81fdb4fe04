"""Where a model's rows come from: a plugin's evaluation, the owner's file, or what this node has recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from millhand.errors import InputError
from millhand.pipeline.recorded import recorded_path
from millhand.serving.manifest import Manifest
from millhand.workshop.jobs import ExamplesAnswer, ExamplesJob, load_examples
from millhand.workshop.judge import PluginRef
from millhand.workshop.process import Line, own_runner
from millhand.workshop.rows import Parts, Rows, checked, owner_parts, read_arrays, recorded_parts
from millhand.workshop.site import Site


def gather(site: Site, manifest: Manifest, data: Path | None, scratch: Path, on_line: Callable[[Line], None]) -> Rows:
    """The rows of a model. An .npz or a folder of arrays that are named as its inputs is the owner's own; any other
    `data` is for the plugin that knows how the model is judged.

    Raises InputError naming what is missing and what to do.
    """
    evaluation = _evaluation(site, manifest.name)
    if data is not None and (evaluation is None or _names_inputs(data, manifest)):
        return checked(manifest, owner_parts(data, manifest))
    missing: InputError | None = None
    if evaluation is not None:
        try:
            return _evaluated(site, manifest, evaluation, data, scratch, on_line)
        except InputError as error:
            if data is not None:
                raise
            missing = InputError(error.message, hint=f"{error.hint}, with --data")
    try:
        return checked(manifest, recorded_parts(recorded_path(site.config.node.data_dir, manifest.name), manifest))
    except FileNotFoundError as error:
        if missing is not None:
            raise missing from error
        raise InputError(
            f"there are no rows to judge candidates of '{manifest.name}' by: no plugin brings any, and nothing is "
            "recorded on this node",
            hint="give an .npz with --data (docs/building.md), or let an asset use the model for a while",
        ) from error


def _evaluation(site: Site, model: str) -> tuple[str, PluginRef] | None:
    """The plugin that knows how the model is judged."""
    for plugin, evaluation in site.registry.collect("millhand_evaluations"):
        if evaluation.model == model:
            return plugin, site.plugin(plugin)
    return None


def _names_inputs(data: Path, manifest: Manifest) -> bool:
    """Whether the owner's data are plain arrays, one for each input."""
    if not data.is_dir() and data.suffix != ".npz":
        return False
    return {tensor.name for tensor in manifest.inputs} <= set(read_arrays(data))


def _evaluated(
    site: Site,
    manifest: Manifest,
    evaluation: tuple[str, PluginRef],
    data: Path | None,
    scratch: Path,
    on_line: Callable[[Line], None],
) -> Rows:
    """Ask the plugin, in a process of its own."""
    name, plugin = evaluation
    path = scratch / "examples.npz"
    job = ExamplesJob(plugin=plugin, model=manifest.name, data=None if data is None else str(data), rows=str(path))
    answer = own_runner(site.config.workshop.deadline_s).run(job, ExamplesAnswer, on_line=on_line)
    calibration, held, truth = load_examples(path)
    path.unlink()
    parts = Parts(f"plugin '{name}'", calibration, held, truth, answer.source)
    return checked(manifest, parts, answer.metric)
