"""The two libraries with one Python API: TensorRT and TensorRT-RTX. Python 3.10; imported only when one is loaded.

Everything in which they differ for us stands in LIBRARIES, so that the rest of the plugin has one path.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from millhand.errors import ModelError

AUTO = "auto"
FULL = "tensorrt"
RTX = "tensorrt-rtx"


@dataclass(frozen=True)
class Traits:
    """What one library can do, and how it is found."""

    title: str
    module: str
    """Its own package."""
    bindings: str = ""
    """The Python API where that comes without the native libraries."""
    carrier: str = ""
    """The package that holds the native libraries for `bindings`."""
    natives: tuple[str, ...] = ()
    """Their names in it, in the order in which they must be loaded."""
    oldest: tuple[int, int] = (0, 0)
    """The oldest version whose calls are those that are made here."""
    install: str = ""
    """What to do where it is missing."""
    magic: bytes = b""
    """How its engines begin; empty: not known for sure."""
    ahead: frozenset[str] = frozenset()
    """Compute capabilities that it builds for without the GPU; a library with any builds for no others."""
    timing_cache: bool = False
    """Kernels are chosen by timing them at the build; else they are compiled at the first inference (runtime cache)."""
    hardware_levels: bool = False
    """Knows `hardware_compatibility_level`."""
    lean_runtime: bool = False
    """Version compatible engines bring a runtime of their own."""
    profile_of_one: bool = False
    """A batch of one gains from an optimisation profile of its own: weights are shared, kernels are chosen by shape."""
    own_graphs: bool = False
    """Captures CUDA graphs itself."""
    opsets: tuple[tuple[tuple[int, int], int], ...] = ()
    """Version from which on -> the newest opset that its ONNX parser documents (docs/operators.md of onnx-tensorrt),
    newest first."""


LIBRARIES = {
    FULL: Traits(
        title="TensorRT",
        module="tensorrt",
        oldest=(10, 3),
        install="install TensorRT for the workers' interpreter: JetPack and NVIDIA's containers bring it, or "
        "`pip install tensorrt`",
        timing_cache=True,
        hardware_levels=True,
        lean_runtime=True,
        profile_of_one=True,
        # 10.0 documents 20, and takes INT4, which ONNX has from 21 on.
        opsets=(((10, 15), 24), ((10, 0), 21)),
    ),
    RTX: Traits(
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        bindings="tensorrt_rtx_bindings",
        carrier="onnxruntime_ep_nv_tensorrt_rtx",
        natives=("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"),
        install="pip install 'millhand[tensorrt-rtx]'",
        magic=b"vtrt",
        ahead=frozenset({"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}),
        own_graphs=True,
        opsets=(((1, 0), 24),),
    ),
}


@dataclass(frozen=True)
class Library:
    """A library that is loaded."""

    name: str
    traits: Traits
    trt: Any
    """The Python API: the module `tensorrt`, or one with the same classes."""

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def title(self) -> str:
        return f"{self.traits.title} {self.version}"

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def newest_opset(self) -> int:
        return next((opset for since, opset in self.traits.opsets if self.release >= since), 0)


def installed(name: str) -> bool:
    """Whether this interpreter has a library, told without importing it."""
    traits = LIBRARIES[name]
    return _importable(traits.module) or (
        bool(traits.bindings) and _importable(traits.bindings) and _importable(traits.carrier)
    )


def library_of(engine: bytes, wanted: str = AUTO) -> str:
    """The name of the library that runs an engine, told by its first bytes where it is not told."""
    if wanted != AUTO:
        return wanted
    return next((name for name, traits in LIBRARIES.items() if traits.magic and engine.startswith(traits.magic)), FULL)


@functools.cache
def load_library(name: str) -> Library:
    """Import a library; takes some tenths of a second and 300 MB of address space.

    Raises ModelError where it is not installed, or does not load.
    """
    traits = LIBRARIES[name]
    if not installed(name):
        raise ModelError(f"{traits.title} is not installed", hint=traits.install)
    try:
        library = Library(name, traits, _import(traits))
    except (ImportError, OSError) as error:
        raise ModelError(f"{traits.title} does not load: {error}", hint=traits.install) from error
    if library.release < traits.oldest:
        oldest = ".".join(map(str, traits.oldest))
        raise ModelError(
            f"{library.title} is too old: {oldest} is the oldest that is known here",
            hint=f"take {traits.title} {oldest} or later (JetPack 6.1), or the backend onnxruntime",
        )
    return library


def _importable(module: str) -> bool:
    """A folder without `__init__` (stubs, leftovers) counts for nothing."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _import(traits: Traits) -> Any:
    """Its own package, else the bindings with the native libraries of another. Raises ImportError or OSError."""
    if _importable(traits.module):
        return importlib.import_module(traits.module)
    version = _preload(traits)
    trt = importlib.import_module(traits.bindings)
    if not str(trt.__version__).startswith(version):
        raise ImportError(
            f"'{traits.carrier}' holds {version}, '{traits.bindings}' is for {trt.__version__}: "
            "install versions that belong together"
        )
    return trt


def _preload(traits: Traits) -> str:
    """Load the native libraries, so that the bindings find their symbols; return their version."""
    spec = find_spec(traits.carrier)
    folder = Path((spec.origin if spec else None) or "").parent
    version = ""
    for name in traits.natives:
        files = _versions(folder, name)
        if not files:
            raise OSError(f"'{folder}' holds no {name}.so")
        ctypes.CDLL(str(files[-1]), mode=ctypes.RTLD_GLOBAL)
        version = files[-1].name.partition(".so.")[2]
    return version


def _versions(folder: Path, name: str) -> Sequence[Path]:
    """Files `name.so.<version>` with a whole version, the newest last."""
    files = [path for path in folder.glob(f"{name}.so.*.*") if path.suffix[1:].isdecimal()]
    return sorted(files, key=lambda path: [int(part) for part in path.name.partition(".so.")[2].split(".")])
