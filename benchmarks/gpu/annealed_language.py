"""What 4 bits cost a language model, and how much of it learned rounding takes back.

    python benchmarks/gpu/annealed_language.py MODEL.gguf TEXT [--seeds 3] [--device cuda] [--steps 1000]

For each seed every weight of the model is fine-tuned first, on half of the text: weights that come from a 4-bit file
lie on its grid, and rounding them to it again costs nothing, which proves nothing. `on_grid` is the share of weights
that still round to themselves. Of the rest of the text one half calibrates and the other judges; the seed orders
fine-tuning and says which windows do what. The grids are GGUF's Q4_0 (a scale for each 32 weights; what MatMulNBits has
without zero points) and Q4_1 (a scale and a minimum). Embedding and head stay as they are. Needs the extra
`language-build`.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from figures import Figure, parser, progress, report

from millhand_plugins.quantize.language.__main__ import make_grid
from millhand_plugins.quantize.language.blocks import round_annealed, round_nearest
from millhand_plugins.quantize.language.gguf_file import TYPES
from millhand_plugins.quantize.language.net import STAGES, load
from millhand_plugins.quantize.language.text import batches, perplexity, windows
from millhand_plugins.quantize.rounding import Annealing

LEARNING_RATE = 2e-5
EPOCHS = 4
GOAL = 0.5


def fine_tune(model: Any, rows: Any, generator: torch.Generator, device: str) -> None:
    """Move every weight: AdamW over all parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    model.train()
    for _ in range(EPOCHS):
        for part in batches(rows[torch.randperm(len(rows), generator=generator)], device, 4):
            loss = model(input_ids=part, labels=part).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def matrices(model: Any) -> list[Any]:
    """Every matrix that is rounded."""
    return [block.get_submodule(name).weight.data for block in model.model.layers for stage in STAGES for name in stage]


def on_grid(model: Any, kind: str) -> float:
    """The share of weights that rounding to nearest leaves where they are, within float16's accuracy."""
    kept = total = 0
    for weights in matrices(model):
        grid = make_grid(kind, weights)
        values = grid.values(grid.nearest(weights))
        kept += int((torch.abs(values - weights) <= 1e-3 * torch.abs(weights)).sum())
        total += weights.numel()
    return kept / total


def judge(model: Any, rows: dict[str, Any], kind: str, schedule: Annealing, device: str) -> dict[str, Any]:
    """Perplexity of one grid: rounded to nearest and learned; the model comes back as it was."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    held = batches(rows["held"], device)
    shares, before = on_grid(model, kind), perplexity(model, held)
    round_nearest(model, lambda weights: make_grid(kind, weights))
    nearest = perplexity(model, held)
    model.load_state_dict(kept)
    began = time.monotonic()
    parts = batches(rows["calibration"], device)
    for _ in round_annealed(model, parts, lambda weights: make_grid(kind, weights), schedule):
        pass  # it rounds in place
    annealed, seconds = perplexity(model, held), time.monotonic() - began
    model.load_state_dict(kept)
    recovered = (nearest - annealed) / (nearest - before)
    progress(f"{kind}: {before:.3f}, nearest {nearest:.3f}, learned {annealed:.3f}: {recovered:.2f} ({seconds:.0f} s)")
    return {
        "kind": kind, "on_grid": shares, "original": before, "nearest": nearest, "annealed": annealed,
        "recovered": recovered, "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> int:
    options = parser(__doc__)
    options.add_argument("model", type=Path)
    options.add_argument("text", type=Path)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--device", default="cuda")
    options.add_argument("--steps", type=int, default=Annealing().steps)
    options.add_argument("--window", type=int, default=512)
    chosen = options.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    schedule = Annealing(steps=chosen.steps)
    table = []
    for seed in range(1, chosen.seeds + 1):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model, tokenizer = load(chosen.model, chosen.device)
        found = windows(tokenizer, chosen.text.read_text(encoding="utf-8"), chosen.window)
        found = found[torch.randperm(len(found), generator=generator)]
        half, quarter = len(found) // 2, len(found) // 4
        rows = {"tuning": found[:half], "calibration": found[half : half + quarter], "held": found[half + quarter :]}
        as_it_came = perplexity(model, batches(rows["held"], chosen.device))
        fine_tune(model, rows["tuning"], generator, chosen.device)
        for kind in TYPES:
            run = judge(model, rows, kind, schedule, chosen.device)
            table.append({"seed": seed, "before_tuning": as_it_came, **run})
    sizes = {name: len(part) for name, part in rows.items()}
    figures = []
    for kind in TYPES:
        runs = [run for run in table if run["kind"] == kind]
        middle = {key: statistics.median(run[key] for run in runs) for key in ("original", "nearest", "annealed")}
        figures += [Figure(f"{kind}: perplexity, {key}", round(value, 3), "") for key, value in middle.items()]
        least = min(run["recovered"] for run in runs)
        figures.append(
            Figure(f"{kind}: share of the loss that comes back, least of the seeds", round(least, 3), "", f">= {GOAL}")
        )
    return report(
        "annealed_language",
        figures,
        table=table,
        windows=sizes,
        window=chosen.window,
        steps=chosen.steps,
        device=torch.cuda.get_device_name() if chosen.device == "cuda" else chosen.device,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    sys.exit(main())
