"""Keeps what a model thinks aloud apart from its answer, for servers that do not: `<think>` to `</think>`.

Some models write both tags; of others the chat template has opened the thought already, so that only the end is seen
(DeepSeek-R1's template ends the prompt with `<think>`).
"""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Parts(NamedTuple):
    """A piece of a text, apart."""

    thought: str
    answer: str


class Thinking:
    """One answer on its way out."""

    def __init__(self, opened: bool) -> None:
        """`opened`: a text that does not begin with the tag is a thought too, up to the tag that ends it."""
        self._opened = opened
        self._state = "begin"
        self._held = ""

    def feed(self, text: str) -> Parts:
        """Take the next piece; what may be the beginning of a tag is held."""
        text, self._held = self._held + text, ""
        if self._state == "begin":
            begun = text.lstrip()
            if len(begun) < len(OPEN) and OPEN.startswith(begun):
                self._held = text
                return Parts("", "")
            if begun.startswith(OPEN):
                self._state, text = "thought", begun.removeprefix(OPEN).lstrip("\n")
            else:
                self._state = "thought" if self._opened else "answer"
        if self._state == "thought":
            return self._think(text)
        if self._state == "gap":
            text = text.lstrip()
            self._state = "answer" if text else "gap"
        return Parts("", text)

    def finish(self) -> Parts:
        """What was held when the text ended."""
        held, self._held = self._held, ""
        return Parts(held, "") if self._state == "thought" else Parts("", held)

    def _think(self, text: str) -> Parts:
        thought, tag, answer = text.partition(CLOSE)
        if not tag:
            held = _overlap(thought)
            self._held = thought[len(thought) - held :]
            return Parts(thought[: len(thought) - held], "")
        answer = answer.lstrip()
        self._state = "answer" if answer else "gap"
        return Parts(thought, answer)


def split(text: str, opened: bool) -> Parts:
    """A whole text, apart. Without a tag it is all answer: the model has not thought."""
    if CLOSE not in text and not text.lstrip().startswith(OPEN):
        return Parts("", text)
    thinking = Thinking(opened)
    first, last = thinking.feed(text), thinking.finish()
    return Parts((first.thought + last.thought).strip(), first.answer + last.answer)


def _overlap(text: str) -> int:
    """How many characters at the end may be the beginning of the closing tag."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:size]):
            return size
    return 0
