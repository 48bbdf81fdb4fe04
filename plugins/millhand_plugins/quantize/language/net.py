"""A language model of transformers beside its GGUF file: which matrix is which tensor, and how its rows lie there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millhand.errors import ModelError

STAGES: tuple[Mapping[str, str], ...] = (
    {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    {"self_attn.o_proj": "attn_output"},
    {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    {"mlp.down_proj": "ffn_down"},
)
"""Matrices of a decoder block that share an input, in the order of the way through it: module -> GGUF's name."""
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""llama's converter turns the rows of these within each head (its rotary embedding pairs neighbours)."""
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def load(path: Path, device: str) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a GGUF file. Raises ModelError."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"{error}", hint="pip install 'millhand[language-build]'") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"'{path}' cannot be loaded: {error}", hint="take a GGUF file of a decoder model") from error
    if not hasattr(model, "model") or model.config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"'{path}' is a model of type '{model.config.model_type}'",
            hint=f"learned rounding knows {', '.join(ARCHITECTURES)}",
        )
    return model.to(device).eval(), tokenizer


def tensor_name(layer: int, short: str) -> str:
    """The GGUF name of a block's matrix."""
    return f"blk.{layer}.{short}.weight"


def gguf_rows(model: Any, short: str, weights: Any) -> Any:
    """A matrix [outputs, inputs], or anything with a row an output, in the order of its GGUF tensor."""
    if model.config.model_type != "llama" or short not in PERMUTED:
        return weights
    heads = getattr(model.config, PERMUTED[short])
    return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)
