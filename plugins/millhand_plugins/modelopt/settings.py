"""The table `[plugins.modelopt]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from millhand.validation import StrictTable


class ModeloptSettings(StrictTable):
    python: Path
    """The interpreter that has `nvidia-modelopt`: the `bin/python` of a venv of its own."""
    calibration: Literal["entropy", "max"] = "entropy"
    """How the range of a tensor is found in what the calibration rows showed."""
    rows_cap: int = Field(default=512, ge=1)
    """Most calibration rows that are used, the first ones."""
