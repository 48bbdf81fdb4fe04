"""transformers' generate in fp32 as a peer (needs torch, transformers, gguf, in an environment of its own).

    python language_transformers.py MODEL.gguf THREADS

Says `ready` once the model is loaded. Each line of standard input is a JSON list [prompt, tokens]; each answer is a
line of JSON: tokens that were written and the seconds that they took, greedy, the prompt's time included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, tokens = json.loads(line)
        told = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        begun_s = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        spent_s = time.perf_counter() - begun_s
        print(json.dumps([found.shape[1] - inputs["input_ids"].shape[1], spent_s]), flush=True)


if __name__ == "__main__":
    main()
