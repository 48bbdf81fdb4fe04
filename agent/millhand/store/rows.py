"""What one step of an asset commits, and the rows that leave the node.

A row is identified by (group, node, epoch, stream, seq). The epoch is the UUID of the database file. Each stream has
its own persisted counter that is never reused: `alert` carries alerts and work orders; `bulk` carries readings and
predictions, one row for each committed step. Each stream carries its own gaps, so that "all up to seq" stays true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from millhand.records import Alert, Batch, Prediction, Reading, WorkOrder

Stream = Literal["alert", "bulk"]
STREAMS: tuple[Stream, ...] = ("alert", "bulk")


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that one batch of one asset caused. It is committed whole or not at all.

    state: the pipeline's windows and rules after this step, opaque to the store.
    """

    asset: str
    batch: Batch
    state: bytes
    predictions: tuple[Prediction, ...] = ()
    alerts: tuple[Alert, ...] = ()
    orders: tuple[WorkOrder, ...] = ()


class Bulk(msgspec.Struct, frozen=True, array_like=True):
    """Body of a `bulk` row: the scalar readings and the predictions of one step."""

    readings: tuple[Reading, ...] = ()
    predictions: tuple[Prediction, ...] = ()


class Gap(msgspec.Struct, frozen=True):
    """Rows first..last of `stream` will never come: they were evicted here. Travels like data."""

    stream: str
    first: int
    last: int
    reason: str


class Row(msgspec.Struct, frozen=True):
    """One message to the hub. `body` is the MessagePack of Bulk, Alert, WorkOrder or Gap, as `kind` says.

    A gap's `seq` is its last one, so that after any row everything up to its `seq` is told.
    """

    stream: str
    seq: int
    asset: str
    kind: str
    created_ns: int
    body: bytes
    epoch: str = ""

    def record(self) -> Bulk | Alert | WorkOrder | Gap:
        """Decode `body`."""
        return msgspec.msgpack.decode(self.body, type=KINDS[self.kind])


KINDS: dict[str, type[Bulk] | type[Alert] | type[WorkOrder] | type[Gap]] = {
    "bulk": Bulk,
    "alert": Alert,
    "order": WorkOrder,
    "gap": Gap,
}


class MetricSpec(msgspec.Struct, frozen=True):
    """A metric that an asset has ever shown: what a Sparkplug birth must list, with its newest value."""

    asset: str
    name: str
    unit: str
    value: float | int | bool | str | None
    time_ns: int
