"""The table `[plugins.remote]`."""

from __future__ import annotations

from pydantic import Field

from millhand.validation import StrictTable


class RemoteSettings(StrictTable):
    hosts: tuple[str, ...] = ()
    """Where tensors may be sent: `host:port`, or `host` for any port. A model that names another is not loaded.
    Not for [options] of a model.toml: who brings a model does not decide this."""
    require_upstream: bool = False
    """A load fails where no upstream answers; else the model is ready, and answers once one does."""
    connect_timeout_ms: float = Field(default=500, gt=0)
    """Looking the name up, connecting and shaking hands take no longer, each time."""
    timeout_ms: float = Field(default=1000, gt=0)
    """One upstream has no longer for one answer, whatever the request's deadline allows."""
    patience_ms: float = Field(default=100, gt=0)
    """An upstream that had less time than this, because of the request's own deadline, is not blamed for being late."""
    answer_bytes_cap: int = Field(default=64 << 20, ge=1024)
    """Largest answer where the model's outputs have free dimensions or BYTES; else their shapes say it."""
    failures: int = Field(default=5, ge=1)
    """So many failures in a row open an upstream's circuit: it is not asked for a while."""
    failure_rate: float = Field(default=0.5, gt=0, le=1)
    """So large a share of failures among the last `rate_window` calls does, too."""
    rate_window: int = Field(default=20, ge=1, le=10_000)
    retry_ms: float = Field(default=500, gt=0)
    """An open circuit lets one request through after so long; the pause doubles at each that fails."""
    retry_cap_ms: float = Field(default=30_000, gt=0)
    """The longest pause."""
    fallback_reserve_ms: float = Field(default=50, ge=0)
    """Time before the deadline that the upstream does not get, so that the local artifact can still answer.
    At least twice what it last took is kept back, at most half of what is left."""
    fallback_lazy: bool = False
    """Load the local artifact when it is first needed: saves memory, makes the first local answers late."""
