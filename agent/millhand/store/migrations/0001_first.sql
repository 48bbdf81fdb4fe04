-- Times: *_ns are Unix nanoseconds; stored_s is the store's own clock (see clock.py), which alone decides age.

CREATE TABLE identity (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    epoch TEXT NOT NULL,
    -- The token is also in a small file beside the store; marker_token is what that file held before this token.
    token TEXT NOT NULL,
    marker_token TEXT NOT NULL,
    bdseq INTEGER NOT NULL DEFAULT -1,
    clock_s INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE stream (
    name TEXT PRIMARY KEY,
    last INTEGER NOT NULL DEFAULT 0,
    acked INTEGER NOT NULL DEFAULT 0,
    row_count INTEGER NOT NULL DEFAULT 0,
    body_bytes INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
INSERT INTO stream (name) VALUES ('alert'), ('bulk');

CREATE TABLE asset (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    cursor BLOB,
    state BLOB
) STRICT;

CREATE TABLE metric (
    id INTEGER PRIMARY KEY,
    asset_id INTEGER NOT NULL,
    name TEXT NOT NULL,
    unit TEXT NOT NULL,
    UNIQUE (asset_id, name)
) STRICT;

-- Apart from metric, so that the values of one asset, which change at each step, share a page.
CREATE TABLE newest (
    metric_id INTEGER PRIMARY KEY,
    value TEXT NOT NULL,  -- JSON
    time_ns INTEGER NOT NULL
) STRICT;

CREATE TABLE bulk (
    seq INTEGER PRIMARY KEY,
    asset_id INTEGER NOT NULL,
    since_ns INTEGER NOT NULL,
    until_ns INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    stored_s INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX bulk_time ON bulk (asset_id, until_ns, since_ns);

CREATE TABLE alert_row (
    seq INTEGER PRIMARY KEY,
    asset_id INTEGER NOT NULL,
    kind TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    stored_s INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;

CREATE TABLE gap (
    stream TEXT NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    reason TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    PRIMARY KEY (stream, last)
) STRICT, WITHOUT ROWID;

CREATE TABLE dropped (
    stream TEXT NOT NULL,
    reason TEXT NOT NULL,
    row_count INTEGER NOT NULL,
    PRIMARY KEY (stream, reason)
) STRICT, WITHOUT ROWID;

CREATE TABLE prediction (
    id INTEGER PRIMARY KEY,
    asset_id INTEGER NOT NULL,
    model TEXT NOT NULL,
    window_end_ns INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    stored_s INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX prediction_identity ON prediction (asset_id, model, window_end_ns);

CREATE TABLE alert (
    id TEXT PRIMARY KEY,
    asset_id INTEGER NOT NULL,
    state TEXT NOT NULL,
    raised_ns INTEGER NOT NULL,
    stored_s INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX alert_raised ON alert (raised_ns);

CREATE TABLE work_order (
    id TEXT PRIMARY KEY,
    alert_id TEXT NOT NULL,
    asset_id INTEGER NOT NULL,
    created_ns INTEGER NOT NULL,
    stored_s INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX work_order_created ON work_order (created_ns);

-- Minute first: the rows of the current minute share a page, so a commit writes one page, not one for each metric.
CREATE TABLE rollup (
    minute INTEGER NOT NULL,
    metric_id INTEGER NOT NULL,
    low REAL NOT NULL,
    high REAL NOT NULL,
    total REAL NOT NULL,
    readings INTEGER NOT NULL,
    newest REAL NOT NULL,
    stored_s INTEGER NOT NULL,
    PRIMARY KEY (minute, metric_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE waveform (
    id INTEGER PRIMARY KEY,
    asset_id INTEGER NOT NULL,
    name TEXT NOT NULL,
    body_bytes INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX waveform_name ON waveform (asset_id, name);

CREATE TABLE sink (
    name TEXT PRIMARY KEY,
    cursor INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
