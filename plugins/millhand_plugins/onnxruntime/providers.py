"""Which execution providers a list names: those of ONNX Runtime's build, and those of plugin libraries.

Imported in workers: Python 3.10, and onnxruntime only where a function says so. Plugin libraries are ONNX Runtime's own
interface from 1.22 on (`register_execution_provider_library`): a library says itself which devices of this machine it
can use.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millhand.errors import ModelError, suggestion

CPU = "cpu"
CPU_PROVIDER = "CPUExecutionProvider"
BUILT_IN = {CPU: CPU_PROVIDER, "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SUFFIX = "ExecutionProvider"
"""Any other provider of a build goes by ONNX Runtime's own name, which ends so."""
ORIGIN = re.compile(r"^(?:\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(?:cc|h):\d+ )+")
LINE_CHARACTERS = 300
LIBRARY_KEYS = ("path", "package", "device", "vendor")
DEVICES = ("", "cpu", "gpu", "npu")
LIBRARY_PATH = ("get_library_path", "library_path")
"""What packages of plugin libraries call the function that tells their path."""


@dataclass(frozen=True)
class Library:
    """A plugin library, and which of its devices to take."""

    name: str
    path: str = ""
    package: str = ""
    """The Python package that brings it; one of `path` and `package` is given."""
    device: str = ""
    """`cpu`, `gpu` or `npu`; empty takes any."""
    vendor: str = ""
    """Part of the device's vendor name, or its PCI number (`0x10de`); empty takes any."""


@dataclass(frozen=True)
class Provider:
    """One entry of a list."""

    name: str
    label: str = ""
    """ONNX Runtime's name; empty for a library's, whose devices tell it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What the owner says; it wins over what millhand sets."""
    library: Library | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether its tensors lie in CUDA's memory."""
        return self.name in ("cuda", "tensorrt")


def first_line(error: Exception) -> str:
    """What an error of ONNX Runtime says, without its own code and the place in its source."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ORIGIN.sub("", line)[:LINE_CHARACTERS]


def default_providers(accelerator: str) -> tuple[str, ...]:
    """What is used where nobody says: `accelerator` is "cpu" or a GPU's UUID."""
    return (CPU,) if accelerator == CPU else ("cuda", CPU)


def built_in(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the names that the installed build has. For workers: it imports onnxruntime."""
    import onnxruntime  # type: ignore[import-untyped]

    available = onnxruntime.get_available_providers()
    return tuple(name for name in names if BUILT_IN[name] in available)


def known(name: str, libraries: Mapping[str, Any]) -> bool:
    """Whether a list may name a provider so."""
    return name in BUILT_IN or name in libraries or name.endswith(SUFFIX)


def read_providers(names: Sequence[str], options: Mapping[str, Any]) -> tuple[Provider, ...]:
    """The providers of a list. options: the keys of `[plugins.onnxruntime]`, which model.toml may have changed.

    Raises ModelError naming the key.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"key 'providers' = {names!r} is no list of names", hint='write providers = ["cuda", "cpu"]')
    libraries = {name: _library(name, table) for name, table in _tables(options, "libraries").items()}
    told = _tables(options, "provider_options")
    for name in (*names, *told):
        if not known(name, libraries):
            raise unknown(name, libraries)
    if len(set(names)) < len(names) or CPU in names[:-1]:
        raise ModelError(
            f"key 'providers' = {list(names)}: each may stand once, and what follows 'cpu' would never be used",
            hint="put 'cpu' last",
        )
    return tuple(_provider(name, libraries, told.get(name, {})) for name in names)


def unknown(name: str, libraries: Mapping[str, Any]) -> ModelError:
    """The error for a name that is not `known`."""
    names = [*BUILT_IN, *libraries]
    return ModelError(
        f"provider '{name}' is not known{suggestion(name, names)}",
        hint=f"known are {', '.join(names)}; others by ONNX Runtime's name (…{SUFFIX}), or as a table "
        f"[plugins.onnxruntime.libraries.{name}]",
    )


def _tables(options: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    tables = options.get(key) or {}
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise ModelError(f"key '{key}' = {tables!r} is no table of tables", hint=f"write [options.{key}.<provider>]")
    return tables


def _provider(name: str, libraries: Mapping[str, Library], told: Mapping[str, Any]) -> Provider:
    values = {key: _text(value) for key, value in told.items()}
    library = libraries.get(name)
    return Provider(name, "" if library else BUILT_IN.get(name, name), values, library)


def _library(name: str, table: Mapping[str, Any]) -> Library:
    where = f"library '{name}' of the providers"
    hint = "its keys are path or package, and device and vendor"
    if name in BUILT_IN:
        raise ModelError(f"{where} has the name of a built-in provider", hint="give it another")
    for key in table:
        if key not in LIBRARY_KEYS:
            raise ModelError(f"{where}: key '{key}' is not known{suggestion(key, LIBRARY_KEYS)}", hint=hint)
    library = Library(name, **{key: str(value or "") for key, value in table.items()})
    if bool(library.path) == bool(library.package):
        raise ModelError(f"{where}: give either path or package", hint=hint)
    if library.device not in DEVICES:
        known = ", ".join(filter(None, DEVICES))
        raise ModelError(f"{where}: device = '{library.device}' is not known", hint=f"devices are {known}")
    return library


def _text(value: Any) -> str:
    """ONNX Runtime takes every option as text, flags as 0 and 1."""
    return str(int(value)) if isinstance(value, bool) else str(value)


# ---- libraries ------------------------------------------------------------------------------------------------------

_registered: dict[str, list[Any]] = {}
"""Path -> the devices that a library of this process lists: each is registered once, and never taken out again."""
_registering = threading.Lock()


def library_device(onnxruntime: Any, library: Library) -> Any:
    """The device (OrtEpDevice) of a library that was asked for, the first of several; registers the library.

    Raises ModelError where the library does not load, lists no device, or none of that type and vendor.
    """
    path = _path(library)
    with _registering:
        if path not in _registered:
            _registered[path] = _register(onnxruntime, library, path)
    listed = _registered[path]
    if not listed:
        raise ModelError(
            f"provider '{library.name}': its library '{path}' is loaded, but lists no device on this machine",
            hint="check the device and its driver (nvidia-smi), or take the provider out of `providers`",
        )
    for device in listed:
        if _wanted(device.device, library):
            return device
    raise ModelError(
        f"provider '{library.name}': no device is {_describe(library.device, library.vendor)}; its library lists "
        + ", ".join(sorted({_describe(_type(one.device), one.device.vendor) for one in listed})),
        hint=f"mend device and vendor of [plugins.onnxruntime.libraries.{library.name}]",
    )


def _register(onnxruntime: Any, library: Library, path: str) -> list[Any]:
    register = getattr(onnxruntime, "register_execution_provider_library", None)
    if register is None:
        raise ModelError(
            f"provider '{library.name}': ONNX Runtime {onnxruntime.__version__} takes no plugin libraries",
            hint="install onnxruntime 1.22 or later",
        )
    before = [_identity(device) for device in onnxruntime.get_ep_devices()]
    try:
        register(library.name, path)
    except Exception as error:
        missing = "libcuda.so" in str(error)
        raise ModelError(
            f"provider '{library.name}': its library cannot be loaded: {first_line(error)}",
            hint="this machine has no NVIDIA driver: install it (nvidia-smi must work), or take the provider out of "
            "`providers`"
            if missing
            else "check the path, and that the library was made for this version of ONNX Runtime",
        ) from error
    return [device for device in onnxruntime.get_ep_devices() if _identity(device) not in before]


def _path(library: Library) -> str:
    """Where the library lies; its package is imported, since that loads what the library needs."""
    if library.path:
        path = Path(library.path).absolute()
        if not path.is_file():
            raise ModelError(
                f"provider '{library.name}': library '{path}' does not exist",
                hint=f"mend path of [plugins.onnxruntime.libraries.{library.name}]",
            )
        return str(path)
    try:
        package = importlib.import_module(library.package)
        tell = next(getattr(package, name) for name in LIBRARY_PATH if hasattr(package, name))
        return str(tell())
    except Exception as error:
        why = "it tells no path" if isinstance(error, StopIteration) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"provider '{library.name}': package '{library.package}' brings no library: {why}",
            hint="install it for the workers' interpreter, or give the library's path",
        ) from error


def _identity(device: Any) -> tuple[Any, ...]:
    return (device.ep_name, *_facts(device.device))


def _facts(hardware: Any) -> tuple[Any, ...]:
    return (_type(hardware), hardware.vendor, hardware.vendor_id, hardware.device_id, repr(hardware.metadata))


def _type(hardware: Any) -> str:
    """`cpu`, `gpu` or `npu`."""
    return str(hardware.type.name).lower()


def _wanted(hardware: Any, library: Library) -> bool:
    vendor = library.vendor.lower()
    right_vendor = vendor in hardware.vendor.lower() or vendor == hex(hardware.vendor_id)
    return right_vendor and library.device in ("", _type(hardware))


def _describe(device: str, vendor: str) -> str:
    return " of ".join(filter(None, [f"a {device}" if device else "a device", vendor]))
