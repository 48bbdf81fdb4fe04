"""A recording double of TensorRT's Python API, one for each version in captures/api.json.

A class has exactly the members that the real one of that version has: any other raises AttributeError, as a call that
is gone does. What a network computes here is y = 2 x + 1, whatever the file says. An engine is JSON behind the magic.
"""

from __future__ import annotations

import enum
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import trt_building
import trt_running
from trt_thing import Thing

SURFACES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "captures" / "api.json").read_text())
HALVES = (trt_building, trt_running)


class TrtDouble(ModuleType):
    """The module: enumerations and classes of one version, and what was called."""

    def __init__(self, version: str, gpu: Any) -> None:
        library, _, number = version.partition(" ")
        super().__init__(library.replace("-", "_"))
        self.surface = SURFACES[version]
        self.library, self.__version__, self.gpu = library, number, gpu
        self.__spec__ = ModuleSpec(self.__name__, None, origin="a double")
        self.calls: list[str] = []
        self.freed: list[str] = []
        self.build_fault: tuple[str, str] | None = None
        """Code and text that the next build fails with."""
        self.poison: set[str] = set()
        """Outputs that no kernel writes."""
        self.written_by = number
        self.flags = 0
        """EngineInvalidityDiagnostics of every engine."""
        self.silent = False
        """Whether an engine is refused without a word."""
        for name, members in self.surface.items():
            if isinstance(members, dict):
                setattr(self, name, enum.IntEnum(name, members))
        for kind in [one for half in HALVES for one in vars(half).values()]:
            if isinstance(kind, type) and issubclass(kind, Thing) and kind.__name__ in self.surface:
                setattr(self, kind.__name__, kind._of(self))
        self.ILogger, self.IErrorRecorder, self.IProgressMonitor = Logger, Listener, Listener


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Logger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Listener:
    def __init__(self) -> None:
        pass
