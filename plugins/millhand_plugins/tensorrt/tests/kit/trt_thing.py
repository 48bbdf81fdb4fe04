"""What the classes of the double of TensorRT have in common."""

from __future__ import annotations

import weakref
from typing import Any

MAGIC = {"tensorrt": b"ftrt", "tensorrt-rtx": b"vtrt"}


class Thing:
    """Base of the classes: members that this version lacks are refused, calls and frees are recorded."""

    _double: Any

    @classmethod
    def _of(cls, double: Any) -> type[Thing]:
        return type(cls.__name__, (cls,), {"_double": double})

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        self._known(name)
        value = object.__getattribute__(self, name)
        if callable(value) and hasattr(value, "__self__"):
            self._double.calls.append(f"{type(self).__name__}.{name}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._known(name)
            self._double.calls.append(f"{type(self).__name__}.{name}=")
        object.__setattr__(self, name, value)

    def _known(self, name: str) -> None:
        if name not in self._double.surface[type(self).__name__]:
            raise AttributeError(f"{self._double.library} {self._double.__version__}: no {type(self).__name__}.{name}")

    def _watch(self) -> None:
        weakref.finalize(self, self._double.freed.append, type(self).__name__)
