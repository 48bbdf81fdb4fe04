"""A GGUF file as a checkpoint of Hugging Face's form in float16, which vLLM takes.

    python benchmarks/gpu/from_gguf.py MODEL.gguf TOKENIZER FOLDER

transformers reads the file (it needs the package gguf) and undoes its quantisation; the tokenizer, with its chat
template, comes from the folder TOKENIZER. Prints what the model answers, from the folder that was written.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = "A pump's bearing runs hot. What should I check first?"
TOKENS = 48
TURN_ENDS = "<|im_end|>"


def convert(gguf: Path, tokenizer: Path, folder: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float16)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are not quantised any more
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    end = AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids(TURN_ENDS)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def answer(folder: Path) -> str:
    """What the checkpoint that was written says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32  # a CPU is slow in float16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    asked = [{"role": "user", "content": QUESTION}]
    given = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = given.to(device)
    with torch.inference_mode():
        written = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(written[0][given["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> int:
    gguf, tokenizer, folder = map(Path, sys.argv[1:])
    convert(gguf, tokenizer, folder)
    print(json.dumps({"answer": answer(folder), "bytes": sum(one.stat().st_size for one in folder.iterdir())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
