"""What makers and the workshop tell each other. Imported by the workshop's processes: Python 3.10."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

CPU = "cpu"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate shall run on. Its name is that of a shelf: `cpu`, or `sm80` for compute capability 8.0."""

    name: str = CPU
    accelerator: str = CPU
    """`cpu`, the UUID of a GPU or MIG slice, or "" where the target is not in this machine: built, not run."""
    compute_capability: str = ""
    """`8.0`; empty for the CPU."""
    profile: str = ""
    precisions: tuple[str, ...] = ()
    """Those that suit the hardware, best first, as the profile says: `fp16`, `int8` ..."""
    memory_bytes: int = 0
    """Of the accelerator, or available on the node where both are one; 0 where it is not known."""

    @property
    def runs_here(self) -> bool:
        return bool(self.accelerator)


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One way to make a candidate."""

    name: str
    """The candidate's name, such as `int8-static` or `engine-fp16`; unique among all makers of a node."""
    precision: str
    """`fp32`, `fp16`, `int8`, `int4` or `mixed`."""
    description: str
    """One line for a technician."""
    source: str = ""
    """The recipe whose artifact it begins from; empty begins from the model's own."""
    calibrated: bool = False
    """Whether it needs calibration data."""
    engine: bool = False
    """Whether it makes an engine for the target's chip rather than a file that any hardware may serve."""
    minutes: float = 1.0
    """About how long it takes on two cores, to plan a budget; the deadline is the workshop's."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What a maker made, in its job's folder."""

    artifact: str
    """File name in the folder."""
    backend: str
    """The backend that serves it."""
    options: dict[str, Any] = {}
    """Backend options that it needs."""
    key: dict[str, str] = {}
    """What it is tied to beside the target, such as `library`, `driver`, `gpu`; where one differs it is stale."""
    layers: tuple[dict[str, Any], ...] = ()
    """For the proof: `name`, `operator`, `precision`, `error` (share of the layer's output power that is lost)."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as layers that were left as they were, and why."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """How a candidate did on data that nothing was fitted to."""

    value: float
    drop_percent: float
    """How much worse than the original, as a share of the original's value; below 0 is better."""
    passed: bool


@dataclass(frozen=True)
class Job:
    """One task for a maker."""

    model: Path
    """The artifact to begin from; read only."""
    folder: Path
    """Where to write; empty, on the same file system as the shelf."""
    target: Target
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    """As model.toml declares them: name -> (NumPy dtype name, shape with -1 for free dimensions)."""
    calibration: Mapping[str, NDArray[Any]]
    """Recorded rows, input name -> array with the batch first; empty where the recipe needs none."""
    max_batch: int
    typical_batch: int
    """The batch that traffic brings most often."""
    options: Mapping[str, Any]
    """The keys of the maker's own table `[plugins.<name>]`."""
    cache: Path
    """A folder that outlives jobs, one for each target: timing and runtime caches."""
    progress: Callable[[float, str], None] = field(default=lambda share, step: None)
    """Call with a share of 0 to 1 and the step's name; raises InterruptedError when the job shall end."""
    judge: Callable[[Made], Judgement] | None = None
    """Judge something written to `folder`; None where the target does not run here."""
