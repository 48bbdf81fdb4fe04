"""Perplexity of a GGUF model on a text: exp of the mean negative log-likelihood of each token after those before it.

llama.cpp's server gives no log-likelihoods of a prompt. It gives the last hidden state of every token (`/embedding`
without pooling); the output matrix of the file, in float32, and a softmax make the likelihoods of them. So layers are
computed by the server as they serve, and only the rounding of activations before the output matrix is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, LanguageError, ModelError
from millhand.language.gguf_header import read_header
from millhand.language.trial import TrialServer

WINDOW_TOKENS = 256
"""Of one window; the next begins where it ends. Short enough that a server on a CPU answers at once."""
TOKENS_LEAST = 256
ROWS = 64
"""Tokens whose likelihoods are computed at once: 64 times 150,000 words are 40 MB."""
OTHER_HEADS = ("logit_scale", "final_logit_softcapping")
"""Keys of architectures whose likelihoods need more than the output matrix."""


@dataclass(frozen=True)
class OutputHead:
    """The matrix that makes likelihoods of hidden states, [words, width]."""

    weights: NDArray[np.float32]

    def losses(self, hidden: NDArray[np.float32], next_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Negative log-likelihood of each next token, in nats. hidden: [tokens, width]; next_tokens: [tokens]."""
        found = []
        for first in range(0, len(hidden), ROWS):
            logits = (hidden[first : first + ROWS] @ self.weights.T).astype(np.float64)
            wanted = logits[np.arange(len(logits)), next_tokens[first : first + ROWS]]
            most = logits.max(axis=1)
            found.append(most + np.log(np.exp(logits - most[:, None]).sum(axis=1)) - wanted)
        return np.concatenate(found)


def output_head(path: Path) -> OutputHead:
    """Of a GGUF file. Raises ModelError where the package `gguf` is missing, or the head is of another kind."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError("the package 'gguf' is not installed", hint="pip install 'millhand[gguf]'") from error
    header = read_header(path)
    architecture = header.text("general.architecture")
    other = [key for key in OTHER_HEADS if f"{architecture}.{key}" in header.values]
    if other:
        raise ModelError(
            f"the perplexity of architecture '{architecture}' cannot be measured: it has '{other[0]}'",
            hint="take the model as it is, without millhand model build",
        )
    name = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return OutputHead(np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))


def tokens_of(server: TrialServer, text: str) -> list[int]:
    """The text's tokens, by the model's own tokenizer. Raises InputError where they are too few."""
    found = _tokens(server, text)
    if len(found) < TOKENS_LEAST:
        raise InputError(
            f"the text has {len(found)} tokens, which say too little", hint=f"give at least {TOKENS_LEAST}, with --data"
        )
    return found


def perplexity(
    server: TrialServer, head: OutputHead, tokens: Sequence[int], progress: Callable[[float], None]
) -> tuple[float, int]:
    """(perplexity, tokens that were judged): all but the first of each window. Raises LanguageError."""
    total, judged = 0.0, 0
    for first in range(0, len(tokens), WINDOW_TOKENS):
        window = list(tokens[first : first + WINDOW_TOKENS])
        if len(window) < 2:
            continue
        losses = head.losses(_hidden(server, window)[:-1], np.asarray(window[1:], np.int64))
        total += float(losses.sum())
        judged += len(losses)
        progress(min(1.0, (first + len(window)) / len(tokens)))
    value = math.exp(total / judged)
    if not math.isfinite(value):
        raise LanguageError("the model's hidden states are not finite", hint="the file is damaged, or its precision")
    return value, judged


def choose_best(server: TrialServer, head: OutputHead, prompt: str, candidates: Sequence[str]) -> int:
    """Which candidate the model finds likeliest after the prompt: by the mean over its tokens, so that short ones are
    not preferred. Raises LanguageError."""
    before = _tokens(server, prompt)
    scores = []
    for candidate in candidates:
        own = _tokens(server, f" {candidate}")
        hidden = _hidden(server, [*before, *own])[len(before) - 1 : -1]
        scores.append(float(head.losses(hidden, np.asarray(own, np.int64)).mean()))
    return int(np.argmin(scores))


def _tokens(server: TrialServer, text: str) -> list[int]:
    return [int(token) for token in server.post("/tokenize", {"content": text, "add_special": False})["tokens"]]


def _hidden(server: TrialServer, window: list[int]) -> NDArray[np.float32]:
    """The last hidden state of each token, [tokens, width]."""
    answer: Any = server.post("/embedding", {"content": window, "embd_normalize": -1})
    try:
        hidden = np.asarray(answer[0]["embedding"], np.float32)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LanguageError("the server gives no hidden states at /embedding", hint="update llama.cpp") from error
    if hidden.ndim != 2 or len(hidden) != len(window):
        raise LanguageError(
            f"the server gives hidden states of shape {hidden.shape} for {len(window)} tokens",
            hint="the model pools them: it is one that embeds, and has no perplexity",
        )
    return hidden
