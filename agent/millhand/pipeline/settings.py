"""What the owner says of assets, work orders and recording: the tables `[[assets]]`, `[orders]` and `[recording]`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from millhand.records import AssetState
from millhand.validation import StrictTable


class RuleOverride(StrictTable):
    """Changes one rule that a model ships; what is left out stays as shipped."""

    enabled: bool = True
    """false silences the rule on this asset."""
    raise_above: float | None = None
    clear_below: float | None = None
    raise_below: float | None = None
    clear_above: float | None = None
    raise_after: int | None = Field(default=None, ge=1)
    of: int | None = Field(default=None, ge=0)
    clear_after: int | None = Field(default=None, ge=1)
    states: tuple[AssetState, ...] | None = None


class AssetSettings(StrictTable):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """The asset's name (the Sparkplug device id): letters, digits, '_', '.' and '-'."""
    adapter: str
    """The kind of adapter that reads it; its plugin is loaded for it."""
    options: dict[str, Any] = {}
    """The adapter's own table; `millhand plugin show NAME` lists its keys."""
    models: tuple[str, ...] = ()
    """The models that judge it."""
    context: dict[str, Any] = {}
    """Constants of this machine for feature extractors, for example its bearing's geometry."""
    limits: dict[str, tuple[float, float]] = {}
    """Plausible range of each signal, `{ current = [0, 100] }`: a value outside never reaches a model."""
    rules: dict[str, RuleOverride] = {}
    """Changes to the rules that the models ship, by rule name."""
    silence_s: float = Field(default=30.0, gt=0)
    """Without a batch for so long the asset counts as dead (Sparkplug DDEATH)."""

    @field_validator("limits")
    @classmethod
    def _rising(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in value.items():
            if not low < high:
                raise ValueError(f"the limits of '{name}' must rise: [{low:g}, {high:g}]")
        return value


class OrderSettings(StrictTable):
    writer: str = "deterministic"
    """Which order writer turns alerts into work orders; plugins bring writers."""
    history: int = Field(default=20, ge=0, le=1000)
    """How many earlier alerts of the asset the writer sees."""
    reviser: str = ""
    """What makes a better version of each order with the language model; plugins bring revisers, `model` comes with
    the plugin `orders`. Empty: the writer's draft is the order."""
    revise_deadline_s: float = Field(default=300, gt=0, le=86_400, allow_inf_nan=False)
    """A draft that has no better version within this time stays as it is, also where the language model is not up."""
    revise_backlog: int = Field(default=20, ge=1, le=1000)
    """Drafts that may wait for the language model; where more do, the older ones stay as they are."""


class RecordingSettings(StrictTable):
    rows: int = Field(default=512, ge=0, le=100_000)
    """Rows of real input to keep for each model that judges an asset, a uniform sample of all: lower precisions are
    fitted to them. They stay on this node. 0 records nothing."""
    bytes_cap: int = Field(default=16 << 20, ge=0)
    """Bytes that one model's rows may take, in memory and on disk; where that is less than `rows`, fewer are kept."""
    save_s: float = Field(default=300, ge=1)
    """They are written at most so often, and when the agent stops."""
