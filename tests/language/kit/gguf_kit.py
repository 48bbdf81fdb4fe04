"""Tiny GGUF files of the form that llama.cpp loads, written with the package `gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, WORDS = 2, 64, 96, 4, 2, 300
HEAD = WIDTH // HEADS


def vocabulary(words: int) -> list[str]:
    """The bytes as GPT-2 writes them, then made-up words."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    table |= {byte: chr(256 + number) for number, byte in enumerate(set(range(256)) - set(plain))}
    return [*sorted(table.values()), *(f"<extra{number}>" for number in range(words))][:words]


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor -> [outputs, inputs], as a Llama has them."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": (WIDTH,),
            f"blk.{layer}.ffn_norm.weight": (WIDTH,),
            f"blk.{layer}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD, WIDTH),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD, WIDTH),
            f"blk.{layer}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_gate.weight": (FEED_FORWARD, WIDTH),
            f"blk.{layer}.ffn_up.weight": (FEED_FORWARD, WIDTH),
            f"blk.{layer}.ffn_down.weight": (WIDTH, FEED_FORWARD),
        }
    return found


def write_gguf(
    path: Path,
    *,
    kind: str = "F16",
    template: str | None = TEMPLATE,
    words: int | None = None,
    without: Sequence[str] = (),
    keys: dict[str, Any] | None = None,
    licence: str = "apache-2.0",
    seed: int = 7,
) -> Path:
    """A Llama of 2 layers with random weights; matrices in `kind`. `keys` adds texts and whole numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_license(licence)
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary(WORDS if words is None else words))
    writer.add_token_types([1] * (WORDS if words is None else words))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(WORDS - 2)
    writer.add_eos_token_id(WORDS - 1)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (keys or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    rng = np.random.default_rng(seed)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, shape in shapes().items():
        if name in without:
            continue
        weights = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(weights, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
