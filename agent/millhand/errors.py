"""The one exception tree: each class is one sentence, each error has a code, a message, a hint and a retry flag."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MillhandError(Exception):
    """Base of every error that millhand raises on purpose.

    `message` names the key and the value that are wrong; `hint` says what to do; `code` is stable and greppable;
    `retriable` says whether the same call may succeed later without a change.
    """

    code = "millhand"
    retriable = False

    def __init__(self, message: str, *, hint: str = "", retriable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if retriable is not None:
            self.retriable = retriable

    @property
    def text(self) -> str:
        """What is wrong, and what to do in brackets."""
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_dict(self) -> dict[str, str | bool]:
        return {"code": self.code, "message": self.message, "hint": self.hint, "retriable": self.retriable}


class ConfigError(MillhandError):
    """The owner's configuration or a profile is not valid."""

    code = "config"


class PluginError(MillhandError):
    """A plugin could not be imported, or one of its hooks raised or returned the wrong thing."""

    code = "plugin"


class HardwareError(MillhandError):
    """A hardware source could not be read."""

    code = "hardware"


class AdapterError(MillhandError):
    """An asset could not be read."""

    code = "adapter"
    retriable = True


class InputError(MillhandError):
    """A request, tensor or file given by a caller is not valid."""

    code = "input"


class ModelError(MillhandError):
    """A model is missing, damaged, or could not be loaded."""

    code = "model"


class ProviderMissingError(ModelError):
    """The installed build of a library has no part that computes on this hardware."""

    code = "provider_missing"


class WorkerError(MillhandError):
    """A worker died, hangs, or could not be reached; the request may be sent again."""

    code = "worker"
    retriable = True


class AcceleratorError(WorkerError):
    """The accelerator fails in this process with every input; only a new process may bring it back."""


class DeadlineError(MillhandError):
    """A request was not done before its deadline and was dropped."""

    code = "deadline"
    retriable = True


class OverloadError(MillhandError):
    """A bounded queue is full."""

    code = "overload"
    retriable = True


class LanguageError(MillhandError):
    """The language model's server is not there, died, or gave no usable answer; the request may be sent again."""

    code = "language"
    retriable = True


class RefusedError(MillhandError):
    """A guard refused a text; sending it again changes nothing."""

    code = "refused"


class StoreError(MillhandError):
    """The store could not be read or written."""

    code = "store"


class TelemetryError(MillhandError):
    """The broker or the hub could not be reached, or refused."""

    code = "telemetry"
    retriable = True


class SinkError(MillhandError):
    """A sink did not take a record; it will be offered again."""

    code = "sink"
    retriable = True


class BundleError(MillhandError):
    """A bundle is damaged, not signed by the plant, not for this node, or could not be laid."""

    code = "bundle"


class ControlError(MillhandError):
    """The daemon's control socket could not be reached, or it refused the call."""

    code = "control"


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, else an empty string."""
    nearest = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
