"""Embeddings by the node's own sentence embedder, for models that no language server has."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millhand.serving.openai.asked import Asked
from millhand.serving.routing import control_call


async def embedded(control_path: Path, asked: Asked) -> bytes:
    """The answer to a request for embeddings, in OpenAI's shape. Raises ModelError where the embedder has another name,
    or what it raises.

    Its usage is 0: the embedder does not tell how many tokens it read.
    """
    value = asked.fields["input"]
    texts = [value] if isinstance(value, str) else value
    vectors = await control_call(control_path, "knowledge.embed", model=asked.model, texts=texts)
    in_base64 = asked.fields.get("encoding_format") == "base64"
    rows = [
        {"object": "embedding", "index": place, "embedding": _base64(vector) if in_base64 else vector}
        for place, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    answer: dict[str, Any] = {"object": "list", "data": rows, "model": asked.model, "usage": usage}
    return msgspec.json.encode(answer)


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client reads it."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
