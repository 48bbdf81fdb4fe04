-- Conversations with the node's language model. They stay on the node: nothing of them is on any stream.
CREATE TABLE conversation (
    id TEXT PRIMARY KEY,
    changed_ns INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX conversation_changed ON conversation (changed_ns);
CREATE TABLE turn (
    conversation_id TEXT NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (conversation_id, number)
) STRICT;
