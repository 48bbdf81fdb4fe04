"""What a model is, from its files alone: architecture, size, precision, context, template. Nothing of it is run but its
chat template.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from millhand.errors import ModelError
from millhand.language.chat_template import check_template
from millhand.language.gguf_header import GgufHeader, read_header

Form = Literal["gguf", "huggingface"]

THINKS = "</think>"
"""Templates of models that think aloud take the thoughts out of earlier answers by this mark."""
SAFETENSORS = ".safetensors"
CONFIG_BYTES_CAP = 8 << 20
HEADER_BYTES_CAP = 100 << 20
"""The format's own limit (safetensors, `MAX_HEADER_SIZE`)."""
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3"}
FILE_TYPES = {
    1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip
"""llama.cpp's numbers for files of mostly one type (enum llama_ftype)."""
LAYERS_CAP = 1024
FETCH_AGAIN = "fetch or copy the model again"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's files say."""

    form: Form
    file: str
    """The GGUF file's name, or `.` for the folder."""
    bytes: int
    """Of the weights."""
    architecture: str
    parameters: int
    precision: str
    """Of most weights: `Q4_1`, `bfloat16`."""
    context_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    reasoning: bool = False
    embeddings: bool = False
    licence: str = ""
    notes: tuple[str, ...] = ()
    """What a user should know."""

    def kv_bytes(self, tokens: int, bits: int = 16) -> int:
        """Of the KV cache for so many tokens: keys and values of every layer and head."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * bits // 8


def inspect(path: Path) -> Facts:
    """Look at a GGUF file or a folder of Hugging Face's form. Raises ModelError naming what is wrong with it."""
    return _folder(path) if path.is_dir() else _gguf(read_header(path))


def _gguf(header: GgufHeader) -> Facts:
    architecture = header.text("general.architecture")
    where = f"'{header.path}'"
    kind = header.text("general.type") or "model"
    if not architecture or kind != "model":
        raise ModelError(
            f"{where} is no language model: it is of type '{kind}', architecture '{architecture}'",
            hint="give the file of the model itself, not of an adapter, a projector or a part",
        )
    if header.count("split.count") > 1:
        raise ModelError(
            f"{where} is one of {header.count('split.count')} parts",
            hint="join them with llama.cpp's llama-gguf-split --merge, and add the whole file",
        )
    _check_shape(header, architecture, where)
    template = header.text("tokenizer.chat_template")
    embeddings = f"{architecture}.pooling_type" in header.values
    notes = _template_notes(where, template, embeddings)
    heads = max(1, header.count(f"{architecture}.attention.head_count"))
    width = header.count(f"{architecture}.embedding_length")
    return Facts(
        form="gguf",
        file=header.path.name,
        bytes=header.bytes,
        architecture=architecture,
        parameters=header.parameters,
        precision=_precision(header),
        context_tokens=header.count(f"{architecture}.context_length"),
        layers=header.count(f"{architecture}.block_count"),
        kv_heads=header.count(f"{architecture}.attention.head_count_kv") or heads,
        head_dim=header.count(f"{architecture}.attention.key_length") or width // heads,
        reasoning=THINKS in template,
        embeddings=embeddings,
        licence=header.text("general.license"),
        notes=notes,
    )


def _precision(header: GgufHeader) -> str:
    """What the file calls itself, where its tensors bear that out; else the type of most weights."""
    count: Counter[str] = Counter()
    for tensor in header.tensors.values():
        count[tensor.block.name] += tensor.weights
    stated = FILE_TYPES.get(header.count("general.file_type"), "")
    if stated and stated.removesuffix("_S").removesuffix("_M").removesuffix("_L") in count:
        return stated
    return max(count, key=lambda name: count[name], default="")


def _check_shape(header: GgufHeader, architecture: str, where: str) -> None:
    """Raises ModelError where keys, tensors and tokenizer cannot belong together."""
    for key in ("block_count", "context_length", "embedding_length"):
        if not header.count(f"{architecture}.{key}"):
            raise ModelError(
                f"{where}: key '{architecture}.{key}' is missing: it is no language model of this form",
                hint="give a GGUF file of a language model",
            )
    if header.count(f"{architecture}.block_count") > LAYERS_CAP:
        raise ModelError(f"{where}: more than {LAYERS_CAP} layers make no sense", hint=FETCH_AGAIN)
    words = header.tensors.get("token_embd.weight")
    if words is None or len(words.shape) != 2:
        raise ModelError(f"{where}: tensor 'token_embd.weight' is missing", hint="give a GGUF file of a language model")
    missing = [
        number
        for number in range(header.count(f"{architecture}.block_count"))
        if not any(name.startswith(f"blk.{number}.") for name in header.tensors)
    ]
    if missing:
        raise ModelError(f"{where}: layer {missing[0]} has no tensor: the file is not whole", hint=FETCH_AGAIN)
    width, vocabulary = words.shape
    if width != header.count(f"{architecture}.embedding_length"):
        raise ModelError(
            f"{where}: tensor 'token_embd.weight' is {width} wide, key '{architecture}.embedding_length' says "
            f"{header.count(f'{architecture}.embedding_length')}",
            hint=FETCH_AGAIN,
        )
    tokens = header.lengths.get("tokenizer.ggml.tokens", 0)
    if tokens != vocabulary:
        raise ModelError(
            f"{where}: its tokenizer has {tokens:,} tokens, its weights know {vocabulary:,}: they do not belong "
            "together",
            hint="take model and tokenizer of one release",
        )


def _template_notes(where: str, template: str, embeddings: bool) -> tuple[str, ...]:
    """Raises ModelError where a chat template does not render."""
    if embeddings:
        return ()
    if not template:
        return ("it brings no chat template: the server falls back to its own, which may not suit the model",)
    try:
        note = check_template(template)
    except ModelError as error:
        raise ModelError(f"{where}: {error.message}", hint=error.hint) from error
    return (note,) if note else ()


def _folder(folder: Path) -> Facts:
    config = _read_json(folder / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    embeddings = bool(architecture) and not architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))
    layers, width, heads = (_count(text, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if not (architecture and layers and width and heads):
        raise ModelError(
            f"'{folder / 'config.json'}' lacks 'architectures', 'num_hidden_layers', 'hidden_size' or "
            "'num_attention_heads': it is no language model of Hugging Face's form",
            hint="give the folder that transformers would load",
        )
    tensors = dict(_tensors(folder))
    _check_vocabulary(folder, text, tensors)
    template = _template(folder)
    types: Counter[str] = Counter()
    for kind, shape in tensors.values():
        types[kind] += math.prod(shape)
    quantised = config.get("quantization_config")
    most = max(types, key=lambda name: types[name])
    precision = str(quantised.get("quant_method", "")) if isinstance(quantised, dict) else ""
    return Facts(
        form="huggingface",
        file=".",
        bytes=sum(path.stat().st_size for path in folder.glob(f"*{SAFETENSORS}")),
        architecture=architecture,
        parameters=types.total(),
        precision=precision or DTYPE_NAMES.get(most, most),
        context_tokens=_count(text, "max_position_embeddings"),
        layers=layers,
        kv_heads=_count(text, "num_key_value_heads") or heads,
        head_dim=_count(text, "head_dim") or width // heads,
        reasoning=THINKS in template,
        embeddings=embeddings,
        licence=_licence(folder),
        notes=_template_notes(f"'{folder}'", template, embeddings),
    )


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """(name, (dtype, shape)) of every tensor. Raises ModelError where a file is missing, damaged or not safe."""
    files = sorted(folder.glob(f"*{SAFETENSORS}"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _read_json(index).get("weight_map")
        named = {str(name) for name in parts.values()} if isinstance(parts, dict) else set()
        missing = sorted(named - {path.name for path in files})
        if missing:
            raise ModelError(f"'{folder}' lacks '{missing[0]}', which '{index.name}' names", hint=FETCH_AGAIN)
    if not files:
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        what = f"only '{pickles[0]}', which may hold code" if pickles else "none"
        raise ModelError(
            f"'{folder}' has no weights in safetensors: {what}", hint="take a release with *.safetensors files"
        )
    for path in files:
        yield from _safetensors(path)


def _safetensors(path: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """The header is 8 bytes of length and JSON; then the data (docs of huggingface/safetensors)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES_CAP, size - 8):
            raise ModelError(f"'{path}' is cut off or no safetensors file", hint=FETCH_AGAIN)
        try:
            header = json.loads(file.read(length))
            found = {
                str(name): (str(entry["dtype"]), [int(n) for n in entry["shape"]], int(entry["data_offsets"][1]))
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ModelError(f"the header of '{path}' is damaged", hint=FETCH_AGAIN) from error
    end = 8 + length + max((entry[2] for entry in found.values()), default=0)
    if end > size:
        raise ModelError(f"'{path}' is cut off: it has {size:,} bytes of {end:,}", hint=FETCH_AGAIN)
    for name, (kind, shape, _) in found.items():
        yield name, (kind, shape)


def _check_vocabulary(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Raises ModelError where the tokenizer is missing or knows more words than the weights."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(f"'{folder}' has no tokenizer (tokenizer.json)", hint=FETCH_AGAIN)
    rows = [shape[0] for name, (_, shape) in tensors.items() if name.endswith("embed_tokens.weight") and shape]
    tokenizer = folder / "tokenizer.json"
    if not rows or not tokenizer.is_file():
        return
    model = _read_json(tokenizer, HEADER_BYTES_CAP).get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict | list) and len(words) > rows[0]:
        raise ModelError(
            f"'{folder}': its tokenizer has {len(words):,} tokens, its weights know {rows[0]:,}: they do not belong "
            "together",
            hint="take model and tokenizer of one release",
        )


def _template(folder: Path) -> str:
    """The chat template; of several the one called `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(errors="replace")[:CONFIG_BYTES_CAP]
    config = folder / "tokenizer_config.json"
    found = _read_json(config).get("chat_template", "") if config.is_file() else ""
    if isinstance(found, list):
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", "")
    return str(found or "")


def _licence(folder: Path) -> str:
    """As the model card's front matter says."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        return licence_of(file.read(1 << 16))


def licence_of(card: str) -> str:
    """The licence that a model card names: `license_name` where `license` says `other`."""
    front = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    found = {key: value.strip() for key, value in re.findall(r"^(license(?:_name)?):[ \t]*(.+)$", front, re.MULTILINE)}
    licence = found.get("license", "")
    return str(found.get("license_name", licence)) if licence in ("", "other") else licence


def _read_json(path: Path, bytes_cap: int = CONFIG_BYTES_CAP) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_cap + 1)
        found = json.loads(data) if len(data) <= bytes_cap else None
    except FileNotFoundError as error:
        raise ModelError(
            f"'{path.parent}' has no '{path.name}': it is no folder of Hugging Face's form",
            hint="give a GGUF file, or the folder that transformers would load",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}", hint=FETCH_AGAIN) from error
    if not isinstance(found, dict):
        raise ModelError(f"'{path}' is no JSON object of at most {bytes_cap >> 20} MiB", hint=FETCH_AGAIN)
    return found


def _count(table: dict[str, Any], key: str) -> int:
    value = table.get(key)
    return value if isinstance(value, int) and value > 0 else 0
