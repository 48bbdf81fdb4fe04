"""What guards see of a conversation, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Stage = Literal["input", "model", "output"]
"""The three lines of defence: what comes in, what the model is told and allowed, what goes out."""

Source = Literal["client", "knowledge", "order", "agent"]
"""Where a text comes from: a client, a retrieved passage, a work order's field, the agent's own prompts."""


@dataclass(frozen=True, kw_only=True)
class GuardContext:
    """What a guard may know beside the text."""

    model: str
    role: str = ""
    """The role of the caller's token; empty where none is asked for."""
    source: Source = "client"
    """Where the text comes from: a client, a retrieved passage, a work order's field, the agent's own prompts."""
    secrets: tuple[str, ...] = ()
    """Texts that must not leave: system prompts."""
    grounds: tuple[str, ...] = ()
    """Passages and evidence that an answer may rest on; empty where nothing was retrieved."""
    tools: tuple[str, ...] = ()
    """Names of the tools that the request offers to the model; asked for in the stage `model`."""
    guided: bool = False
    """Whether the request binds the answer to a JSON schema; asked for in the stage `model`."""


JUDGE_PATH = "/millhand/judge"
"""Where the gateway judges texts that the agent is about to put into a prompt."""


@dataclass(frozen=True)
class Part:
    """A stretch of the agent's own prompt that comes from elsewhere, word for word as it stands there."""

    source: Source
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one guard says of one text."""

    action: Literal["pass", "change", "refuse"]
    text: str
    """The text as it may go on; for `refuse` the same as came in."""
    rule: str = ""
    """Which rule spoke, a short stable name for metrics and audit: `injection.override`."""
    reason: str = ""
    """Why, in words for the person who is refused; never the secret itself."""


class AnswerStream(Protocol):
    """One answer on its way out. A guard holds back only what could still turn out to be part of a finding."""

    def feed(self, text: str) -> Verdict:
        """Take the next piece. `Verdict.text` is what may go out now, often the piece itself, sometimes nothing.

        After a refusal nothing more goes out, and neither method is called again.
        """

    def finish(self) -> Verdict:
        """The answer has ended: judge what was held back."""
