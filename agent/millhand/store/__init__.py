"""The node's one SQLite file: batches, cursors, predictions, alerts, orders, rollups and the outbox over them."""

from millhand.store.changes import Changes
from millhand.store.rollups import Rollup
from millhand.store.rows import KINDS, STREAMS, Bulk, Gap, MetricSpec, Row, Step, Stream
from millhand.store.settings import StoreSettings
from millhand.store.store import Store

__all__ = [
    "KINDS",
    "STREAMS",
    "Bulk",
    "Changes",
    "Gap",
    "MetricSpec",
    "Rollup",
    "Row",
    "Step",
    "Store",
    "StoreSettings",
    "Stream",
]
