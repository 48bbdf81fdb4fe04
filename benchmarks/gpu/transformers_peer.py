"""transformers beside vLLM: what it writes a second, from a checkpoint. Prints JSON lines.

    python benchmarks/gpu/transformers_peer.py batch FOLDER       generate_batch (continuous batching), bfloat16, sdpa
    python benchmarks/gpu/transformers_peer.py generate FOLDER    generate, in bfloat16 and by bitsandbytes in 8 bits

Greedy, with no end but the number of tokens; what is timed has run once before. generate_batch is timed from its first
request to its last answer, without the capture of its CUDA graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

PROMPT_TOKENS = 128
WARM_TOKENS = 8
FIRST_WORD = 1000
"""Tokens below are special ones, letters and short words."""


def load(folder: Path, **more: Any) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map=device, **more
    ).eval()


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    dice = random.Random(count)
    return [[dice.randrange(FIRST_WORD, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def endless(tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True)


def batch(folder: Path, requests: int, tokens: int) -> None:
    model = load(folder)
    for count, longest in ((1, min(tokens, 64)), (requests, tokens)):
        for turn in range(2):
            asked, length = prompts(count, model.config.vocab_size), longest if turn else WARM_TOKENS
            # It computes in a thread of its own, which inference mode here would get in the way of.
            found = list(model.generate_batch(inputs=asked, generation_config=endless(length)).values())
            written = sum(len(one.generated_tokens) for one in found)
            if len(found) != count or written < 0.9 * count * length:
                raise SystemExit(
                    f"{len(found)} of {count} answers came, {written} tokens: {[one.error for one in found[:1]]}"
                )
            seconds = max(one.lifespan[1] for one in found) - min(one.created_time for one in found)
            if turn:
                say(what="generate_batch", requests=count, tokens=written, tokens_per_s=written / seconds)


def generate(folder: Path, tokens: int) -> None:
    for bits in (16, 8):
        more = {}
        if bits == 8:
            from transformers import BitsAndBytesConfig

            more["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        model = load(folder, **more)
        for count in (1, 8):
            asked = torch.tensor(prompts(count, model.config.vocab_size), device=model.device)
            mask = torch.ones_like(asked)
            with torch.inference_mode():
                model.generate(asked, attention_mask=mask, generation_config=endless(WARM_TOKENS))
                began = time.perf_counter()
                found = model.generate(asked, attention_mask=mask, generation_config=endless(tokens))
                written = found[:, PROMPT_TOKENS:].numel()  # it comes once all is computed
            rate = written / (time.perf_counter() - began)
            say(what="generate", bits=bits, requests=count, tokens_per_s=rate, bytes=model.get_memory_footprint(),
                parameters=sum(one.numel() for one in model.parameters()))  # fmt: skip
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("way", choices=["batch", "generate"])
    options.add_argument("folder", type=Path)
    options.add_argument("--requests", type=int, default=128)
    options.add_argument("--tokens", type=int, default=128)
    given = options.parse_args()
    if given.way == "batch":
        batch(given.folder, given.requests, given.tokens)
    else:
        generate(given.folder, min(given.tokens, 64))


if __name__ == "__main__":
    main()
