"""Models worth a look on this kind of node: `catalogue.toml`, and what each would need here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from millhand.errors import ModelError, suggestion
from millhand.validation import StrictTable, read_toml, validate

CATALOGUE = Path(__file__).with_name("catalogue.toml")
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_K_M": 4.85, "Q4_0": 4.5}
"""Bits of one weight in a file, its scales included (ggml-common.h; Q4_K_M mixes types, as llama.cpp's table says)."""


class Shape(StrictTable):
    """Of a decoder as Llama, Qwen2 and Qwen3 have it; the releases' config.json."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    tied: bool
    """Whether one matrix serves as embedding and as output."""
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def parameters(self) -> int:
        """Weights, counted matrix by matrix."""
        keys, queries = self.kv_heads * self.head_dim, self.heads * self.head_dim
        layer = 2 * self.hidden * queries + 2 * self.hidden * keys + 3 * self.hidden * self.feed_forward
        layer += 2 * self.hidden + (queries + 2 * keys if self.qkv_bias else 0)
        layer += 2 * self.head_dim if self.qk_norm else 0
        words = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return words + self.layers * layer + self.hidden


class Entry(StrictTable):
    """One model of the catalogue."""

    title: str
    licence: str
    licence_note: str = ""
    """What of the licence matters on a factory floor; empty where it is a usual open one."""
    source: str
    """What `millhand model add` is given."""
    context_tokens: int = Field(ge=1)
    template: str
    """What is to be known of its chat template."""
    reasoning: bool = False
    languages: tuple[str, ...] = ()
    precision: Literal["", "F16", "Q8_0", "Q4_K_M", "Q4_0", "Q4_1"] = ""
    """Of the file that the source brings where it holds just one; empty: several, pick one with --precision."""
    shape: Shape

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    def bytes(self, precision: str) -> int:
        """Of the weights in a precision, within some percent."""
        return int(self.parameters * BITS[precision] / 8)

    def kv_bytes(self, tokens: int, bits: int = 16) -> int:
        """Of the KV cache for so many tokens."""
        return 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * tokens * bits // 8


class _Catalogue(StrictTable):
    model: dict[str, Entry]


@cache
def catalogue() -> dict[str, Entry]:
    """The models by name, smallest first. Raises ConfigError for a damaged file."""
    found = validate(_Catalogue, read_toml(CATALOGUE), f"'{CATALOGUE.name}'").model
    return dict(sorted(found.items(), key=lambda item: item[1].parameters))


def entry_named(name: str) -> Entry:
    """Raises ModelError with what is near."""
    found = catalogue().get(name)
    if found is None:
        raise ModelError(f"the catalogue has no '{name}'{suggestion(name, catalogue())}", hint="millhand model catalog")
    return found
