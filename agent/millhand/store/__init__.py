"""The node's one SQLite file: batches, cursors, predictions, alerts, orders, rollups and the outbox over them."""
