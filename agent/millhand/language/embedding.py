"""Texts as vectors, by a sentence embedder of the node's own repository, in a worker like every other model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millhand.errors import LanguageError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from millhand.serving.repository import ModelFolder
    from millhand.serving.tensors import Tensors

TASK = "embedding"
"""`[metadata] task` of a model that embeds."""
TEXTS_AT_ONCE = 8
"""A request more may wait for so many: a worker on a small CPU takes a second for them."""
CHARACTERS_A_TOKEN = 16
"""More text than this for each token that is read is cut before it is tokenised."""
DEADLINE_MS = 60_000.0
PRIORITY = -1
"""Behind every request that names none."""


class Infer(Protocol):
    """As `ModelPool.infer`."""

    async def __call__(
        self, model: str, tensors: Tensors, *, deadline_ms: float | None = None, priority: int = 0
    ) -> tuple[dict[str, Any], int]: ...


class Embedding:
    """`Embed` of hookspecs for one model of the repository."""

    def __init__(self, folder: ModelFolder, infer: Infer) -> None:
        """`folder`: of a model whose metadata name `tokenizer` and `tokens`, as `millhand knowledge setup` makes it.

        Raises ModelError where they do not, or where the tokenizer cannot be read.
        """
        metadata = folder.manifest.metadata
        if metadata.get("task") != TASK or not {"tokenizer", "tokens"} <= metadata.keys():
            raise ModelError(
                f"model '{folder.name}' is no sentence embedder: its [metadata] name no task, tokenizer and tokens",
                hint="make one with: millhand knowledge setup",
            )
        self._name = folder.name
        self._infer = infer
        self._tokens = int(metadata["tokens"])
        self._tokenizer = _read_tokenizer(folder.path / str(metadata["tokenizer"]), self._tokens)
        self.model = f"{folder.name} {metadata.get('sha256', '')}".strip()
        """Which model: vectors of two models cannot be compared."""

    async def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, dimensions), rows of length 1; zeros for an empty text.

        Raises LanguageError, ModelError, WorkerError, OverloadError or DeadlineError.
        """
        parts = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tensors = await asyncio.to_thread(self._encode, texts[start : start + TEXTS_AT_ONCE])
            answer, _ = await self._infer(self._name, tensors, deadline_ms=DEADLINE_MS, priority=PRIORITY)
            parts.append(np.asarray(answer["embedding"], np.float32))
        return np.vstack(parts) if parts else np.zeros((0, 0), np.float32)

    def _encode(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        cut = [text[: self._tokens * CHARACTERS_A_TOKEN].encode("utf-8", "replace").decode() for text in texts]
        encoded = self._tokenizer.encode_batch(cut)
        return {
            "input_ids": np.array([item.ids for item in encoded], np.int64),
            "attention_mask": np.array([item.attention_mask for item in encoded], np.int64),
        }


def _read_tokenizer(path: Path, tokens: int) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LanguageError(
            "the package tokenizers is not installed", hint="pip install 'millhand[knowledge]'", retriable=False
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # its library raises bare Exception
        raise ModelError(f"tokenizer '{path}' cannot be read: {error}", hint="make the model again") from error
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding()
    return tokenizer
