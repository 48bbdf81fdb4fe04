-- Every version of every order; work_order keeps the newest. What older rows hold is the first version.
CREATE TABLE order_version (
    order_id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (order_id, revision)
) STRICT;
INSERT INTO order_version (order_id, revision, body) SELECT id, 1, body FROM work_order;

-- What a person made of a version, whole: it outlives the order, for a model to learn from.
CREATE TABLE order_pair (
    id INTEGER PRIMARY KEY,
    order_id TEXT NOT NULL,
    before BLOB NOT NULL,
    after BLOB NOT NULL
) STRICT;
