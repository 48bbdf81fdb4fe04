"""What a language server is asked to serve, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Ability = Literal[
    "chat", "completions", "embeddings", "json_schema", "tools", "logprobs", "seed", "stop", "usage", "reasoning",
    "text_bias",
]  # fmt: skip
"""What a server can do of OpenAI's API; what it cannot do the gateway refuses, before the server sees it. `text_bias`
goes beyond: keys of `logit_bias` may be texts, whose tokens are meant."""

Speculation = Literal["none", "ngram", "ngram-simple", "ngram-mod", "ngram-cache", "draft"]
"""Where drafts come from that the model then checks: from the text itself, by its repetitions (`ngram` is what a server
does best of that kind, the others are llama.cpp's own), or from a smaller model of the same vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process of a language server. The core has chosen every value: from config, then profile, then the model."""

    name: str
    """As clients call the model."""
    model: Path
    """A GGUF file or a folder of Hugging Face's form."""
    port: int
    """To listen on, at 127.0.0.1."""
    context_tokens: int
    """Tokens that one conversation may hold, the answer included."""
    slots: int = 1
    """Conversations that are answered at once."""
    threads: int = 0
    """Threads on the CPU; 0 leaves it to the server."""
    accelerators: tuple[str, ...] = ()
    """UUIDs of the GPUs that this process uses, as many as the model is spread over; empty: the CPU."""
    kv_bits: Literal[4, 8, 16] = 16
    """Bits of one number in the KV cache."""
    speculation: Speculation = "none"
    """The greedy answer must stay the same."""
    draft: Path | None = None
    """With `draft`: the smaller model, of the same form."""
    program: str = ""
    """Which of the server's programs, by the server's own name for it; empty leaves it to the server."""
    embeddings: bool = False
    """Whether the model is one that embeds."""
    api_key: str = field(default="", repr=False)
    """What it must be shown as a bearer token, made anew for each start; hand it on by environment or file, never as an
    argument, which every user of the machine can read. Empty: it asks for none."""
    reasoning: bool = False
    """Whether the model thinks in `<think>` before it answers: thoughts come as `reasoning_content`."""


@dataclass(frozen=True)
class Command:
    """How to start a process."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the daemon's own."""
    note: str = ""
    """What the owner should know of it, for people: `xllamacpp, on the CPU`."""


@dataclass(frozen=True, kw_only=True)
class ServerFigures:
    """What a server's own metrics say, under one set of names; None where it does not tell."""

    running: float | None = None
    """Requests that are being answered."""
    waiting: float | None = None
    """Requests that wait in the server."""
    kv_used: float | None = None
    """Share of the KV cache that is in use, 0 to 1."""
    prompt_tokens: float | None = None
    """Tokens read since the start."""
    generated_tokens: float | None = None
    """Tokens written since the start."""
    steps: float | None = None
    """Grows with each batch that is computed, of a long prompt too: it stands still where the server hangs."""
