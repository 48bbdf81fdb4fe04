"""Text as tokens, and how well a model foretells it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millhand.errors import InputError

WINDOW = 512
"""Tokens that are judged together; each is foretold from those before it in its window."""
BATCH = 8


def windows(tokenizer: Any, text: str, window: int = WINDOW) -> Any:
    """A text as a tensor of int64 [n, window]; what is left over is dropped. Raises InputError for too little."""
    import torch

    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    whole = len(tokens) // window
    if not whole:
        raise InputError(f"the text has {len(tokens)} tokens, needed are {window} or more", hint="give a longer text")
    return tokens[: whole * window].reshape(whole, window).to(torch.int64)


def batches(rows: Any, device: str, size: int = BATCH) -> Sequence[Any]:
    """Rows in parts on a device."""
    return [rows[start : start + size].to(device) for start in range(0, len(rows), size)]


def perplexity(model: Any, parts: Sequence[Any]) -> float:
    """exp of the mean negative log likelihood of every token but the first of each window."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for part in parts:
            logits = model(input_ids=part).logits[:, :-1].float()
            wanted = part[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1))
            total += float(loss) * wanted.numel()
            count += wanted.numel()
    return math.exp(total / count)


def read_text(path: Path) -> str:
    """Raises InputError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text '{path}' cannot be read: {error}", hint="give a UTF-8 text file") from error
