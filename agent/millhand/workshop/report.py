"""build.json: what became of a model's last build for a target. It lies beside the candidates, for `model compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from millhand.durable import write_durably
from millhand.errors import ModelError

REPORT = "build.json"

State = Literal["passed", "refused", "built", "failed", "not tried"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one recipe."""

    name: str
    precision: str
    state: State
    """passed or refused by the gate; built for hardware that is not here; failed to be made or to run; not tried."""
    why: str
    hint: str = ""
    """What to do, where something failed."""
    made: bool = False
    """Made in this build, and not taken from the shelf."""
    minutes: float = 0.0


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """The last build of a model's version for a target."""

    model: str
    version: int
    target: str
    executed: bool
    source_sha256: str
    source_bytes: int
    typical_batch: int
    data: str = ""
    """Where the rows came from; empty where none were needed."""
    data_path: str = ""
    """The owner's rows, absolute: what is made anew in the background takes them again. Empty where none were named."""
    original: Outcome | None = None
    """What became of proving the model's own artifact; None where it does not serve on this target."""
    outcomes: tuple[Outcome, ...]
    chosen: str = ""
    """Empty: the original serves."""
    why: str = ""
    """In a sentence; empty where nothing could be chosen, for hardware that is not here."""
    ways: tuple[str, ...] = ()
    """Of a language model: how it is served best on this node and why, then what else was tried."""
    date: str


def write_report(place: Path, report: BuildReport) -> None:
    """Write it durably into the folder of the candidates."""
    write_durably(place / REPORT, msgspec.json.format(msgspec.json.encode(report), indent=2))


def read_report(place: Path, model: str) -> BuildReport:
    """Raises ModelError where nothing was built, or the file is damaged."""
    path = place / REPORT
    try:
        return msgspec.json.decode(path.read_bytes(), type=BuildReport)
    except FileNotFoundError as error:
        raise ModelError(
            f"nothing was built of model '{model}' for {place.name}", hint=f"millhand model build {model}"
        ) from error
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}", hint=f"millhand model build {model}") from error
