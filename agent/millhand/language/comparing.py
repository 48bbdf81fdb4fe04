"""Whole language models beside each other: a pack's eval sets, quality on one text, size, speed and memory here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from millhand.errors import ModelError
from millhand.language.library import LanguageModel
from millhand.language.measuring import Bench, held_text, open_bench
from millhand.language.pack import Question, find_pack
from millhand.language.perplexity import choose_best, output_head
from millhand.language.precisions import own_target
from millhand.workshop.site import Site


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as it did."""

    name: str
    precision: str
    bytes: int
    right: int
    """Questions of the pack's eval sets that it chose the right candidate for."""
    questions: int
    bits_per_byte: float
    """Bits that the model needs for a byte of the text, on average; lower is better."""
    perplexity: float
    """Of its own tokens; to be compared between models of one tokenizer only."""
    tokens: int
    tokens_per_s: float
    prompt_tokens_per_s: float
    memory_bytes: int


def compare(
    site: Site, models: Sequence[LanguageModel], data: Path | None, told: Callable[[str], None]
) -> tuple[list[Ranked], str]:
    """(models, best first; the text in words). Speeds are measured beside the first model, in turn.

    Raises MillhandError where one of them cannot run: another form than GGUF, one that embeds, no server.
    """
    for model in models:
        if model.manifest.format != "gguf" or model.manifest.embeddings:
            raise ModelError(
                f"language model '{model.name}' cannot be compared: it is no GGUF file of a model that answers",
                hint="leave it out",
            )
    text = held_text(data)
    pack = find_pack(site.config.pack)
    questions = [question for found in pack.questions.values() for question in found]
    with tempfile.TemporaryDirectory(prefix="millhand-compare-") as scratch:
        bench = open_bench(site, own_target(site), Path(scratch))
        ranked = []
        for model in models:
            told(f"{model.name}: quality")
            perplexity, tokens = bench.perplexity(model.path, text.text, lambda share: None)
            told(f"{model.name}: {len(questions)} questions")
            right = _right(bench, model.path, questions)
            told(f"{model.name}: speed")
            (one, many), memory = bench.speed(models[0].path, model.path, text.text)
            ranked.append(
                Ranked(
                    name=model.name,
                    precision=model.manifest.precision,
                    bytes=model.weights_bytes,
                    right=right,
                    questions=len(questions),
                    bits_per_byte=math.log2(perplexity) * tokens / len(text.text.encode()),
                    perplexity=perplexity,
                    tokens=tokens,
                    tokens_per_s=1e3 / one.p50_ms,
                    prompt_tokens_per_s=1e3 * many.batch / many.p50_ms,
                    memory_bytes=memory[1],
                )
            )
    return sorted(ranked, key=lambda entry: (-entry.right, entry.bits_per_byte)), text.source


def _right(bench: Bench, path: Path, questions: Sequence[Question]) -> int:
    """How many of a pack's questions a model chooses the right candidate for."""
    head = output_head(path)
    with bench.running(path, embeddings=True) as server:
        return sum(
            choose_best(server, head, f"Question: {question.question}\nAnswer:", question.candidates) == question.answer
            for question in questions
        )
