"""Headers of GGUF files: what is read, and that nothing broken passes or hurts."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import pytest
from gguf_kit import HEAD, KV_HEADS, LAYERS, TEMPLATE, WORDS, write_gguf

from millhand.errors import ModelError
from millhand.language import chat_template
from millhand.language.chat_template import check_template, render
from millhand.language.gguf_header import BLOCKS, read_header
from millhand.language.inspection import inspect
from millhand.language.requantise import PRECISIONS, requantise


def nothing(step: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for number, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == tuple(block)


def test_a_header_is_read_as_the_gguf_package_reads_it(tiny: Path) -> None:
    header, theirs = read_header(tiny), gguf.GGUFReader(tiny)
    assert header.parameters == sum(int(tensor.n_elements) for tensor in theirs.tensors)
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        tensor.name: tuple(map(int, tensor.shape)) for tensor in theirs.tensors
    }
    for key, value in header.values.items():
        assert theirs.fields[key].contents() == (pytest.approx(value) if isinstance(value, float) else value)


def test_facts_of_a_file(tiny: Path) -> None:
    facts = inspect(tiny)
    assert (facts.form, facts.architecture, facts.precision, facts.licence) == ("gguf", "llama", "F16", "apache-2.0")
    assert (facts.layers, facts.kv_heads, facts.head_dim, facts.context_tokens) == (LAYERS, KV_HEADS, HEAD, 2048)
    assert facts.kv_bytes(10) == 2 * LAYERS * KV_HEADS * HEAD * 10 * 2
    assert not facts.reasoning and not facts.embeddings and not facts.notes


def test_facts_of_the_real_model(smollm: Path) -> None:
    facts = inspect(smollm)
    assert (facts.parameters, facts.precision, facts.context_tokens) == (134_515_008, "Q4_1", 8192)
    assert facts.licence == "apache-2.0"


def test_every_cut_is_noticed(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    places = [*range(0, 40), *range(40, len(data), 997), len(data) - 1]
    for place in places:
        path.write_bytes(data[:place])
        with pytest.raises(ModelError) as caught:
            inspect(path)
        assert str(path) in caught.value.message and caught.value.hint


def test_no_damage_to_a_header_does_worse_than_an_error(tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    path = tmp_path / "damaged.gguf"
    rng = random.Random(5)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(12000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except ModelError as error:
            assert error.hint


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (0, b"GGML", "no GGUF file"),
        (4, struct.pack("<I", 99), "version 99"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "at most"),
        (16, struct.pack("<Q", 1 << 60), "at most"),
    ],
    ids=["magic", "version", "endian", "tensors", "keys"],
)
def test_what_is_wrong_is_named(tiny: Path, tmp_path: Path, place: int, value: bytes, told: str) -> None:
    data = bytearray(tiny.read_bytes())
    data[place : place + len(value)] = value
    path = tmp_path / "wrong.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=told):
        inspect(path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"words": WORDS - 1}, "do not belong together"),
        ({"without": ("token_embd.weight",)}, "token_embd.weight"),
        ({"without": [f"blk.1.{name}.weight" for name in ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v",
                      "attn_output", "ffn_gate", "ffn_up", "ffn_down")]}, "layer 1 has no tensor"),
        ({"keys": {"split.count": 3}}, "one of 3 parts"),
        ({"template": "{{ messages[0].nothing.at_all }}"}, "does not render"),
        ({"template": "{% if %}"}, "does not render"),
        ({"template": "hello"}, "what the user says"),
    ],
    ids=["tokenizer", "embedding", "layer", "split", "template-undefined", "template-syntax", "template-deaf"],
)  # fmt: skip
def test_a_model_that_cannot_serve_is_refused(tmp_path: Path, options: dict[str, object], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        inspect(write_gguf(tmp_path / "bad.gguf", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_what_is_no_model_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=f"of type '{kind}'"):
        inspect(path)


def test_a_template_without_system_messages_is_noted() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    assert "no system message" in check_template(strict + TEMPLATE)


def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "DEADLINE_S", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="does not end"):
        check_template(endless)


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises(ModelError, match="SecurityError"):
        check_template("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_a_template_is_rendered_as_transformers_does() -> None:
    text = render(TEMPLATE, [{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_other_precisions(tiny: Path, tmp_path: Path, precision: str) -> None:
    path = tmp_path / "other.gguf"
    change = requantise(tiny, path, precision, nothing)
    facts = inspect(path)
    assert facts.precision == precision
    before, after = gguf.GGUFReader(tiny), gguf.GGUFReader(path)
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    keys = set(before.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert keys | {"general.file_type"} <= set(after.fields)
    for one, other in zip(before.tensors, after.tensors, strict=True):
        weights, found = (gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in (one, other))
        assert abs(weights - found).max() <= 0.1 * abs(weights).max()
    if precision in ("F16", "F32"):
        assert change.copied + change.exact == change.matrices and "without loss" in change.note
    else:
        assert 0.001 < change.error < 0.2


def test_a_grid_that_holds_the_weights_is_said(tiny: Path, tmp_path: Path) -> None:
    first, wide, again = (tmp_path / name for name in ("q8.gguf", "f32.gguf", "again.gguf"))
    requantise(tiny, first, "Q8_0", nothing)
    requantise(first, wide, "F32", nothing)
    change = requantise(wide, again, "Q8_0", nothing)
    assert change.exact == change.matrices
    assert "says nothing of what rounding to it costs" in change.note
