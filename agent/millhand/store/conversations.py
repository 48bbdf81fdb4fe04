"""Conversations and their turns; they stay on the node."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millhand.language.conversation import Conversation, Turn
from millhand.store.database import Database

CONVERSATIONS_CAP = 1000
"""The newest conversations that are kept."""


class ConversationBook:
    """One row for each conversation, and one for each turn."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, conversation: Conversation, turns: Sequence[Turn]) -> None:
        """Insert or update the conversation and add turns behind those that it has; the oldest make room."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO conversation (id, changed_ns, body) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET changed_ns = excluded.changed_ns, body = excluded.body",
                (conversation.id, conversation.changed_ns, msgspec.msgpack.encode(conversation)),
            )
            (last,) = connection.execute(
                "SELECT coalesce(max(number), 0) FROM turn WHERE conversation_id = ?", (conversation.id,)
            ).fetchone()
            connection.executemany(
                "INSERT INTO turn (conversation_id, number, body) VALUES (?, ?, ?)",
                [(conversation.id, last + 1 + i, msgspec.msgpack.encode(turn)) for i, turn in enumerate(turns)],
            )
            old = connection.execute(
                "SELECT id FROM conversation ORDER BY changed_ns DESC, id LIMIT -1 OFFSET ?", (CONVERSATIONS_CAP,)
            ).fetchall()
            for (conversation_id,) in old:
                self._delete(conversation_id)

    def conversations(self, limit: int) -> list[Conversation]:
        """Those that were changed last, newest first."""
        rows = self._database.connection.execute(
            "SELECT body FROM conversation ORDER BY changed_ns DESC, id LIMIT ?", (limit,)
        )
        return [msgspec.msgpack.decode(body, type=Conversation) for (body,) in rows]

    def turns(self, conversation_id: str) -> list[Turn]:
        """All that was said, in order."""
        rows = self._database.connection.execute(
            "SELECT body FROM turn WHERE conversation_id = ? ORDER BY number", (conversation_id,)
        )
        return [msgspec.msgpack.decode(body, type=Turn) for (body,) in rows]

    def delete(self, conversation_id: str) -> bool:
        """Forget a conversation with all its turns; whether there was one.

        What a person deletes is overwritten in the file, not only let go; the write-ahead log holds it until the next
        checkpoint.
        """
        self._database.connection.execute("PRAGMA secure_delete = ON")
        try:
            with self._database.transaction():
                return self._delete(conversation_id)
        finally:
            self._database.connection.execute("PRAGMA secure_delete = OFF")

    def _delete(self, conversation_id: str) -> bool:
        connection = self._database.connection
        connection.execute("DELETE FROM turn WHERE conversation_id = ?", (conversation_id,))
        return bool(connection.execute("DELETE FROM conversation WHERE id = ?", (conversation_id,)).rowcount)
