"""What the owner says about the store: the table `[store]`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from millhand.validation import StrictTable

MIB = 1024 * 1024
GIB = 1024 * MIB


class StoreSettings(StrictTable):
    """Caps of the store. Ages are counted while the store is open; wall-clock jumps do not change them."""

    bytes_cap: Annotated[int, Field(ge=MIB)] = 4 * GIB
    """The data in the store's file never stays above this. Acknowledged rows go first, then the oldest unsent ones."""
    age_cap_days: Annotated[float, Field(gt=0)] = 30.0
    """Rows of readings that the hub has not acknowledged are dropped after this, and leave a gap record."""
    history_age_cap_days: Annotated[float, Field(gt=0)] = 7.0
    """Rows of readings that the hub has are kept this long for local reading and export."""
    prediction_age_cap_days: Annotated[float, Field(gt=0)] = 90.0
    """Predictions are kept this long."""
    rollup_age_cap_days: Annotated[float, Field(gt=0)] = 90.0
    """Per-minute rollups are kept this long."""
    alert_age_cap_days: Annotated[float, Field(gt=0)] = 730.0
    """Closed alerts and work orders are kept this long; an open alert never ages."""
    free_disk_floor_bytes: Annotated[int, Field(ge=0)] = GIB
    """When the disk has less free than this, the store gives rows back as if its byte cap were reached.

    Below about 16 MiB it cannot help, since the write-ahead log alone takes several MiB; 0 turns it off.
    """
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 * MIB
    """A disk that others fill never shrinks the store below this."""
    waveform_bytes_cap: Annotated[int, Field(ge=0)] = 64 * MIB
    """Raw waveforms are a ring of this size; 0 keeps none."""
    check_time_cap_s: Annotated[float, Field(gt=0)] = 0.6
    """At start the file is checked for damage for at most this long; what is left is found when it is read."""
    set_aside_files_cap: Annotated[int, Field(ge=1)] = 3
    """How many damaged files are kept; the oldest is deleted."""

    @model_validator(mode="after")
    def _waveforms_leave_room(self) -> Self:
        if self.waveform_bytes_cap > self.bytes_cap // 2:
            raise ValueError(
                f"waveform_bytes_cap = {self.waveform_bytes_cap} is more than half of bytes_cap = {self.bytes_cap}"
            )
        return self
