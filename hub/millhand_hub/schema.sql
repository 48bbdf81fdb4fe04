-- The hub's database. Times are Unix milliseconds (Sparkplug's own) unless a name says otherwise.
CREATE TABLE IF NOT EXISTS nodes (
  id INTEGER PRIMARY KEY,
  "group" TEXT NOT NULL,
  node TEXT NOT NULL,
  online INTEGER NOT NULL DEFAULT 0,
  version TEXT NOT NULL DEFAULT '',
  born_ms INTEGER,
  seen_ms INTEGER,
  UNIQUE ("group", node)
);

-- Up to `held` the hub has everything of this stream, rows or gaps.
CREATE TABLE IF NOT EXISTS streams (
  node_id INTEGER NOT NULL REFERENCES nodes (id),
  epoch TEXT NOT NULL,
  stream TEXT NOT NULL,
  held INTEGER NOT NULL,
  first INTEGER NOT NULL,
  PRIMARY KEY (node_id, epoch, stream)
) WITHOUT ROWID;

-- Spans beyond `held` that have come already.
CREATE TABLE IF NOT EXISTS ahead (
  node_id INTEGER NOT NULL,
  epoch TEXT NOT NULL,
  stream TEXT NOT NULL,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL,
  PRIMARY KEY (node_id, epoch, stream, first)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS readings (
  node_id INTEGER NOT NULL,
  asset TEXT NOT NULL,
  name TEXT NOT NULL,
  time_ms INTEGER NOT NULL,
  value,
  unit TEXT NOT NULL,
  quality INTEGER NOT NULL,
  historical INTEGER NOT NULL,
  epoch TEXT NOT NULL,
  seq INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS readings_by_name ON readings (node_id, asset, name, time_ms);
CREATE INDEX IF NOT EXISTS readings_by_time ON readings (time_ms);

CREATE TABLE IF NOT EXISTS predictions (
  node_id INTEGER NOT NULL,
  asset TEXT NOT NULL,
  model TEXT NOT NULL,
  version INTEGER,
  time_ms INTEGER NOT NULL,
  kind TEXT NOT NULL,
  "values" TEXT NOT NULL,
  epoch TEXT NOT NULL,
  seq INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS predictions_by_model ON predictions (node_id, asset, model, time_ms);
CREATE INDEX IF NOT EXISTS predictions_by_time ON predictions (time_ms);

CREATE TABLE IF NOT EXISTS alerts (
  id TEXT NOT NULL,
  node_id INTEGER NOT NULL,
  asset TEXT NOT NULL,
  kind TEXT NOT NULL,
  severity TEXT NOT NULL,
  state TEXT NOT NULL,
  raised_ns INTEGER NOT NULL,
  changed_ns INTEGER NOT NULL,
  record TEXT NOT NULL,
  PRIMARY KEY (id, node_id)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS orders (
  id TEXT NOT NULL,
  node_id INTEGER NOT NULL,
  asset TEXT NOT NULL,
  priority INTEGER NOT NULL,
  created_ns INTEGER NOT NULL,
  record TEXT NOT NULL,
  -- Of the version that is shown, the newest; 0 where the node does not tell.
  revision INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (id, node_id)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS gaps (
  node_id INTEGER NOT NULL,
  epoch TEXT NOT NULL,
  stream TEXT NOT NULL,
  first INTEGER NOT NULL,
  last INTEGER NOT NULL,
  reason TEXT NOT NULL
);

-- Rows that came and that this hub could not read, as they came: nothing is thrown away.
CREATE TABLE IF NOT EXISTS unread (
  node_id INTEGER NOT NULL,
  epoch TEXT NOT NULL,
  stream TEXT NOT NULL,
  seq INTEGER NOT NULL,
  payload BLOB NOT NULL
);
