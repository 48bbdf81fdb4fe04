"""Language models: GGUF files keep everything but what was rounded; learned rounding loses less than the nearest."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import ModelError
from millhand_plugins.quantize.grid import affine, symmetric
from millhand_plugins.quantize.language.gguf_file import BLOCK, GgufFile, Rounded, packed

GRIDS = {"q4_0": symmetric, "q4_1": affine}
KINDS = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}


def rounded(weights: np.ndarray, kind: str) -> Rounded:
    grid = GRIDS[kind](weights, 4, BLOCK, half=True)
    return Rounded(grid.nearest(weights), grid, kind)


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packed_blocks_are_what_ggml_reads(kind: str, outputs: int, blocks: int, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((outputs, blocks * BLOCK)).astype(np.float32)
    matrix = rounded(weights, kind)
    read = gguf.dequantize(packed(matrix), KINDS[kind])
    assert np.array_equal(read, matrix.grid.values(matrix.integers))
    assert np.abs(read - weights).max() < np.abs(weights).max() / 4


def test_a_matrix_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="40 inputs on blocks of 32") as caught:
        packed(rounded(np.ones((2, 40), np.float32), "q4_0"))
    assert "leave this tensor" in caught.value.hint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GGUF file with every kind of field, and tensors of three types."""
    random = np.random.default_rng(1)
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "的"])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.add_tensor("output_norm.weight", np.arange(64, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", random.standard_normal((4, 64)).astype(np.float16))
    weights = random.standard_normal((8, 64)).astype(np.float32)
    writer.add_tensor("blk.0.ffn_up.weight", packed(rounded(weights, "q4_1")), raw_dtype=KINDS["q4_1"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_copy_keeps_all_but_what_was_changed(source: Path, tmp_path: Path) -> None:
    before = GgufFile(source)
    matrix = rounded(before.weights("blk.0.attn_q.weight"), "q4_0")
    before.write(tmp_path / "copy.gguf", {"blk.0.attn_q.weight": matrix})
    after = GgufFile(tmp_path / "copy.gguf")
    assert after.architecture == "llama" and after.names == before.names
    assert np.array_equal(after.weights("blk.0.attn_q.weight"), matrix.grid.values(matrix.integers))
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "copy.gguf")
    for one, other in zip(old.tensors, new.tensors, strict=True):
        if one.name != "blk.0.attn_q.weight":
            assert one.tensor_type == other.tensor_type and np.array_equal(one.data, other.data)
    fields = [
        {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}
        for file in (old, new)
    ]
    assert fields[0] == fields[1] and fields[0]["tokenizer.ggml.tokens"] == ["a", "ü", "的"]


@pytest.mark.parametrize("data", [b"", b"no gguf at all", b"GGUF\x03\x00\x00\x00"], ids=["empty", "text", "cut"])
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"bad\.gguf' is no GGUF file"):
        GgufFile(tmp_path / "bad.gguf")


def test_a_truncated_file_is_named(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    for size in range(8, len(whole) - 64, len(whole) // 20):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelError, match="GGUF file"):
            GgufFile(tmp_path / "cut.gguf")


def test_a_tensor_that_is_not_there_is_named(source: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor 'blk\.7\.ffn_up\.weight'"):
        GgufFile(source).weights("blk.7.ffn_up.weight")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_learned_rounding_loses_less_than_the_nearest(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra language-build)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra language-build)")
    from millhand_plugins.quantize.language.__main__ import make_grid
    from millhand_plugins.quantize.language.blocks import round_annealed, round_nearest
    from millhand_plugins.quantize.language.text import batches, perplexity
    from millhand_plugins.quantize.rounding import Annealing

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, num_hidden_layers=2, **shape))
    rows = torch.stack([(torch.arange(64) * (n + 3) + n) % 128 for n in range(16)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    model.eval()
    parts = batches(rows, "cpu")
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    original = perplexity(model, parts)
    round_nearest(model, lambda weights: make_grid(kind, weights))
    nearest = perplexity(model, parts)
    model.load_state_dict(kept)
    steps = list(round_annealed(model, parts, lambda weights: make_grid(kind, weights), Annealing(steps=150)))
    assert [name for name, *_ in steps][:3] == [f"blk.0.attn_{short}.weight" for short in "qkv"] and len(steps) == 14
    learned = perplexity(model, parts)
    assert original < learned < nearest
    assert nearest - learned > 0.4 * (nearest - original)
