"""`Maker` of engines. Python 3.10; the library is imported inside `make` and `key` only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from millhand.errors import ModelError
from millhand.workshop.recipe import Job, Made, Recipe, Target
from millhand_plugins.tensorrt.build import build_plan
from millhand_plugins.tensorrt.cache import CacheFile
from millhand_plugins.tensorrt.driver import this_gpu
from millhand_plugins.tensorrt.library import AUTO, LIBRARIES, RTX, Library, installed, load_library

ARTIFACT = "model.engine"
BACKEND = "tensorrt"
TIMING_CACHE, RUNTIME_CACHE = "timing.cache", "runtime.cache"
CAPABILITY_MIN = (7, 5)
"""Turing: neither library holds code for older GPUs (TensorRT since 10.5)."""

RECIPES = (
    Recipe(
        name="engine-fp16", precision="fp16", description="an engine in half precision", source="fp16",
        engine=True, minutes=2,
    ),
    Recipe(
        name="engine-int8", precision="int8", description="an engine from the int8 file (QDQ)", source="int8-qdq",
        engine=True, minutes=2,
    ),
    Recipe(
        name="engine-int4", precision="int4", description="an engine with int4 weights in blocks", source="int4-qdq",
        engine=True, minutes=2,
    ),
    Recipe(
        name="engine-fp32", precision="fp32", description="an engine that computes as the model does",
        engine=True, minutes=2,
    ),
)  # fmt: skip


class TensorrtMaker:
    """`KeyedMaker` of the recipes above, the target's favourite precisions first."""

    name = "tensorrt"

    def __init__(self, config: Any) -> None:
        """config: the validated table `[plugins.tensorrt]`, or its keys as attributes."""
        self._wanted = str(config.library)

    def recipes(self, target: Target) -> Sequence[Recipe]:
        """Empty where no library is installed that builds for the target. Raises ModelError where the key `library`
        names one that cannot."""
        if not target.compute_capability:
            return ()
        name = self._choose(target)
        if name is None or not installed(name):
            return ()
        order = {precision: place for place, precision in enumerate(target.precisions)}
        return sorted(RECIPES, key=lambda recipe: order.get(recipe.precision, len(order)))

    def key(self, target: Target) -> Mapping[str, str]:
        """Version of the library that would build now, and where the target is in this machine its GPU and driver.

        Only that one is imported: the two export the same symbols.
        """
        found = {}
        name = self._choose(target)
        if name is not None and installed(name):
            library = load_library(name)
            found = {name: library.version, _major(name): str(library.release[0])}
        if target.runs_here:
            gpu = this_gpu()
            found |= {"gpu": gpu.name, "driver": gpu.driver}
        return found

    def make(self, recipe: Recipe, job: Job) -> Made:
        """Build one engine, `model.engine` in the job's folder.

        Raises ModelError naming the node of the graph and the remedy; InterruptedError where the job shall end.
        """
        name = self._choose(job.target)
        if name is None:
            raise ModelError(
                f"no library builds engines for compute capability {job.target.compute_capability} here",
                hint=f"build on the target itself with TensorRT, or for {_ahead(RTX)} with TensorRT-RTX",
            )
        library = load_library(name)
        job.progress(0.0, "reading the model")
        plan, notes = build_plan(library, job, _timing_cache(library, job))
        (job.folder / ARTIFACT).write_bytes(plan)
        job.progress(1.0, "engine written")
        return Made(
            artifact=ARTIFACT,
            backend=BACKEND,
            options=_options(library, job),
            key=_key(library, job),
            notes=notes,
        )

    def _choose(self, target: Target) -> str | None:
        """The library for a target. Raises ModelError where the key `library` names one that cannot build for it."""
        if self._wanted != AUTO:
            why = _cannot(self._wanted, target)
            if why:
                raise ModelError(
                    f"[plugins.tensorrt] library = '{self._wanted}' builds nothing for target '{target.name}': {why}",
                    hint="set library = 'auto', or build for another target",
                )
            return self._wanted
        fitting = [name for name in LIBRARIES if not _cannot(name, target)]
        return next((name for name in fitting if installed(name)), fitting[0] if fitting else None)


def _timing_cache(library: Library, job: Job) -> CacheFile | None:
    """The cache of kernels' times, for a library that has one."""
    if not library.traits.timing_cache:
        return None
    gpu = this_gpu()
    return CacheFile(job.cache / TIMING_CACHE, {"library": library.title, "driver": gpu.driver, "gpu": gpu.name})


def _cannot(name: str, target: Target) -> str:
    """Why a library cannot build for a target; empty where it can."""
    traits, capability = LIBRARIES[name], target.compute_capability
    if tuple(int(part) for part in capability.split(".")) < CAPABILITY_MIN:
        return f"{traits.title} holds no code for compute capability {capability}"
    if traits.ahead:
        return "" if capability in traits.ahead else f"{traits.title} builds for compute capability {_ahead(name)} only"
    return "" if target.runs_here else f"{traits.title} builds only for a GPU of the machine that it runs on"


def _ahead(name: str) -> str:
    """The compute capabilities that a library builds for without the GPU."""
    return ", ".join(sorted(LIBRARIES[name].ahead, key=float))


def _options(library: Library, job: Job) -> dict[str, Any]:
    """What the backend needs to know of this engine."""
    options: dict[str, Any] = {"library": library.name}
    if not library.traits.timing_cache:
        # As it lies from the candidate's folder, so that a shelf can be moved to another node.
        options["runtime_cache"] = os.path.relpath(job.cache / RUNTIME_CACHE, job.folder)
    return options


def _major(name: str) -> str:
    return f"{name} major"


def _key(library: Library, job: Job) -> dict[str, str]:
    """What makes the engine stale. The compute capability is the shelf's."""
    compatible = bool(job.options.get("version_compatible"))
    key = {_major(library.name): str(library.release[0])} if compatible else {library.name: library.version}
    if library.traits.ahead:
        return key
    gpu = this_gpu()
    key["driver"] = gpu.driver
    if job.options.get("hardware_compatibility", "none") == "none":
        key["gpu"] = gpu.name
    return key
