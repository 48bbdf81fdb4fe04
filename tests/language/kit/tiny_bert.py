"""A small sentence embedder with random weights, in the form of Hugging Face's, and its answer by NumPy alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-12,
}
WORDS = ["[PAD]", "[UNK]", "pump", "seal", "leaks", "oil", "motor", "hot", "bearing", "noise"]


def shapes() -> dict[str, tuple[int, ...]]:
    size, wide = 16, 32
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS), size),
        "embeddings.position_embeddings.weight": (32, size),
        "embeddings.token_type_embeddings.weight": (2, size),
        "embeddings.LayerNorm.weight": (size,),
        "embeddings.LayerNorm.bias": (size,),
    }
    for layer in range(2):
        own = f"encoder.layer.{layer}."
        square = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        linear = {**dict.fromkeys(square, (size, size)), "intermediate.dense": (wide, size)}
        for name, shape in {**linear, "output.dense": (size, wide)}.items():
            found[f"{own}{name}.weight"], found[f"{own}{name}.bias"] = shape, shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found[f"{own}{name}.weight"] = found[f"{own}{name}.bias"] = (size,)
    return found


def tensors() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(7)
    return {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes().items()}


def write(folder: Path) -> Path:
    """config.json, model.safetensors, tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in tensors().items():
        raw = value.tobytes()
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def embed(ids: list[int]) -> NDArray[np.float64]:
    """One text, without padding."""
    own = {name: value.astype(np.float64) for name, value in tensors().items()}

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * own[f"{name}.weight"] + own[f"{name}.bias"]

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    x = own["embeddings.word_embeddings.weight"][ids] + own["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + own["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(2):
        name = f"encoder.layer.{layer}."
        heads = []
        q, k, v = (linear(x, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        for part in (slice(at, at + 4) for at in range(0, 16, 4)):
            scores = q[:, part] @ k[:, part].T / 2
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(shares / shares.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(np.hstack(heads), f"{name}attention.output.dense")
        x = norm(x + attended, f"{name}attention.output.LayerNorm")
        wide = linear(x, f"{name}intermediate.dense")
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(x + linear(wide, f"{name}output.dense"), f"{name}output.LayerNorm")
    mean: NDArray[np.float64] = x.mean(0)
    return mean / np.linalg.norm(mean)
