"""What the owner may say about the workshop: the table `[workshop]`."""

from __future__ import annotations

from pydantic import Field

from millhand.validation import StrictTable


class WorkshopSettings(StrictTable):
    drop_percent_cap: float = Field(default=1.2, ge=0, le=100, allow_inf_nan=False)
    """How much worse a candidate's metric may be than the original's, as a share of the original's; beyond that it is
    refused."""
    margin_percent: float = Field(default=5.0, ge=0, lt=100, allow_inf_nan=False)
    """A candidate takes the original's place for its speed only where it is faster by so much, and for its size only
    where it is not slower by so much and as much smaller."""
    deadline_s: float = Field(default=1800, gt=0, allow_inf_nan=False)
    """Making a candidate, or judging it, may take so long; then its processes are killed and it has failed."""
    latency_s: float = Field(default=3, gt=0, le=600, allow_inf_nan=False)
    """How long latency is measured at each batch size, original and candidate in turn."""
    memory_bytes_cap: int = Field(default=0, ge=0)
    """A step whose processes hold more memory together is ended and has failed; 0 sets no limit."""
