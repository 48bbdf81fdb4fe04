"""Checkpoints without weights: the shape of a language model, and a tokenizer that has a text for each of its tokens.

Speed depends on the shape alone. Random weights write every token alike, so each must be text: a token that the
tokenizer does not know comes as an empty piece, which no client can time and no server be proved by. The words that are
added are made up (`bagoki`), and nothing that a guard would hold back.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip
"""Qwen2.5's of 7B and 1.5B, by their config.json."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def config(shape: str, **more: Any) -> dict[str, Any]:
    """What config.json says."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
        **more,
    }


def checkpoint(folder: Path, shape: str, tokenizer: Path, **more: Any) -> Path:
    """A folder that vLLM takes for a checkpoint, but for the weights. tokenizer: a folder with a BPE tokenizer.json."""
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape, **more)))
    spell_out(folder / "tokenizer.json", SHAPES[shape]["vocab_size"])
    return folder


def spell_out(path: Path, tokens: int) -> None:
    """Give every token up to `tokens` that a tokenizer.json lacks a made-up word."""
    told = json.loads(path.read_text(encoding="utf-8"))
    known = told["model"]["vocab"]
    fresh = (word for word in _words() if word not in known)
    for number in range(len(known), tokens):
        known[next(fresh)] = number
    path.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def _words() -> Iterator[str]:
    """Words of three syllables, as byte-level BPE writes them after a space: 343,000."""
    return (f"Ġ{''.join(three)}" for three in itertools.product(SYLLABLES, repeat=3))
