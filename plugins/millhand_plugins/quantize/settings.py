"""The table `[plugins.quantize]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from millhand.validation import StrictTable


class RoundingTable(StrictTable):
    steps: int = Field(default=1000, ge=1)
    """Steps of Adam for each layer."""
    learning_rate: float = Field(default=0.1, gt=0)
    weight: float = Field(default=10.0, ge=0)
    """Of the regulariser that freezes each weight to one of its two levels."""
    warm_up: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps without the regulariser."""
    beta_high: float = Field(default=20.0, gt=1)
    """The regulariser's exponent after the warm-up, ..."""
    beta_low: float = Field(default=2.0, gt=1)
    """... and at the end."""

    @model_validator(mode="after")
    def _falls(self) -> RoundingTable:
        if self.beta_low > self.beta_high:
            raise ValueError("beta_low must not be above beta_high: the exponent anneals from high to low")
        return self


class QuantizeSettings(StrictTable):
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    """How the range of an int8 tensor is found in what the calibration rows showed."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """With `percentile`: the share of values inside the range."""
    rows_cap: int = Field(default=512, ge=1)
    """Most calibration rows that are used, drawn at random."""
    min_rows: int = Field(default=32, ge=1)
    """With fewer calibration rows a recipe that needs them fails."""
    seed: int = Field(default=1, ge=0)
    """Of the draw."""
    weight_bits: Literal["auto", "7", "8"] = "auto"
    """int8 on the CPU: x86 without VNNI adds pairs of products in 16 bits, which overflow with 8. auto: as it needs."""
    channels: Literal["auto", "each", "all"] = "auto"
    """int8: a scale for each output channel, or one for all. auto: one where a linear layer loses hardly more by it."""
    smoothing: bool = True
    """int8: level out an input whose columns differ much, where the layer's answers gain by it."""
    min_weights: int = Field(default=1024, ge=1)
    """Layers with fewer weights stay as they are: they cost nothing, and rounding their inputs would."""
    block: Literal[16, 32, 64, 128, 256] = 32
    """int4: inputs that share a scale."""
    zero_point: bool = False
    """int4: a zero point for each block, for weights that lie on one side of 0."""
    compute: Literal["int8", "float32"] = "int8"
    """int4 on the CPU: what the products are computed in."""
    loss: float = Field(default=0.001, gt=0, lt=1)
    """mixed, where candidates cannot be judged here: most of the output's power that may be lost."""
    device: str = ""
    """Where rounding is learned: empty for NumPy, or a torch device such as `cuda`; torch must be installed then."""
    rounding: RoundingTable = RoundingTable()
    """How rounding is learned (AdaRound)."""
