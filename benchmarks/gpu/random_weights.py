"""A checkpoint of some shape with random weights, in float16 and in int4 of GPTQ's layout, both from the same numbers.

    python benchmarks/gpu/random_weights.py SHAPE TOKENIZER FOLDER     writes FOLDER/fp16 and FOLDER/int4

int4: symmetric, a scale for each 128 weights of a row, rounded to nearest. Packed as GPTQ's checkpoints are: `qweight`
holds eight weights of a column in an int32, the lowest first; `qzeros` holds the zero point less one. Embedding and
head stay in float16. What was packed is unpacked again and held against the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.torch import save_file
from shapes import SHAPES, checkpoint

SPREAD = 0.02
GROUP = 128
PER_INT32 = 8
ZERO = 8
ZEROS_PACKED = 0x77777777
"""Eight zero points of 8, less one each."""
QUANTISED = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}


def linears(shape: dict[str, Any]) -> dict[str, tuple[int, int, bool]]:
    """Name -> (rows out, columns in, whether it has a bias), of all layers."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    one = {
        "self_attn.q_proj": (width, width, True),
        "self_attn.k_proj": (keys, width, True),
        "self_attn.v_proj": (keys, width, True),
        "self_attn.o_proj": (width, width, False),
        "mlp.gate_proj": (inner, width, False),
        "mlp.up_proj": (inner, width, False),
        "mlp.down_proj": (width, inner, False),
    }
    layers = range(shape["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": sizes for layer in layers for name, sizes in one.items()}


def quantised(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix (out, in) as GPTQ's tensors. Raises ValueError where they do not say what the matrix said."""
    out, inner = weights.shape
    groups = weights.float().reshape(out, inner // GROUP, GROUP)
    scales = (groups.abs().amax(2, keepdim=True) / (ZERO - 1)).half().float()
    levels = ((groups / scales).round().clamp(-ZERO, ZERO - 1) + ZERO).to(torch.int64).reshape(out, inner).T
    shifts = torch.arange(PER_INT32, device=weights.device) * 4
    packed = (levels.reshape(inner // PER_INT32, PER_INT32, out) << shifts[None, :, None]).sum(1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    found = {
        "qweight": packed,
        "qzeros": torch.full((inner // GROUP, out // PER_INT32), ZEROS_PACKED, dtype=torch.int32),
        "scales": scales[:, :, 0].T.half().contiguous(),
        "g_idx": torch.arange(inner, dtype=torch.int32) // GROUP,
    }
    away = (unpacked(found) - weights.float()).abs().reshape(out, inner // GROUP, GROUP)
    if bool((away > 0.51 * scales).any()):
        raise ValueError(f"an int4 weight lies {float(away.max()):g} away from what it stands for")
    return found


def unpacked(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix (out, in) that GPTQ's tensors stand for, as a reader of that layout sees it."""
    packed, scales = tensors["qweight"], tensors["scales"].float()
    zeros = tensors["qzeros"].to(packed.device)
    shifts = torch.arange(PER_INT32, device=packed.device, dtype=torch.int32) * 4
    levels = (packed[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, packed.shape[1])
    offsets = (zeros[:, :, None] >> shifts & 15).reshape(zeros.shape[0], -1) + 1
    rows = tensors["g_idx"].to(packed.device).long()
    return ((levels - offsets[rows]) * scales[rows]).T


def main() -> int:
    name, tokenizer, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    shape, device = SHAPES[name], "cuda" if torch.cuda.is_available() else "cpu"
    dice = torch.Generator(device).manual_seed(1)
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]

    def numbers(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=dice, device=device) * SPREAD).half()

    kept = {"model.embed_tokens.weight": numbers(vocabulary, width), "model.norm.weight": torch.ones(width).half()}
    if not shape["tie_word_embeddings"]:
        kept["lm_head.weight"] = numbers(vocabulary, width)
    for layer in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            kept[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width).half()
    whole, packed = {}, {}
    for linear, (out, inner, bias) in linears(shape).items():
        whole[f"{linear}.weight"] = weights = numbers(out, inner)
        packed |= {f"{linear}.{part}": tensor for part, tensor in quantised(weights).items()}
        if bias:
            kept[f"{linear}.bias"] = torch.zeros(out).half()
    sizes = {}
    for precision, tensors, more in (("fp16", whole, {}), ("int4", packed, {"quantization_config": QUANTISED})):
        place = checkpoint(folder / precision, name, tokenizer, **more) / "model.safetensors"
        save_file(
            {key: value.cpu().contiguous() for key, value in {**kept, **tensors}.items()}, place, {"format": "pt"}
        )
        sizes[precision] = place.stat().st_size
    print(json.dumps(sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
