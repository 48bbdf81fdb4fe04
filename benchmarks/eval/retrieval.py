"""Retrieval over real maintenance texts: BM25, vectors, and both fused, by kind of question.

The texts: FAA incident narratives (OMIn), work orders of MWO2KG, and MaintIE's: 3,916 short texts, each a source of its
own. The questions (retrieval_questions.jsonl) were written and committed before any retriever was tried on them.
recall@5: the share of questions with at least one right text among the first five.

    MILLHAND_DATA=… python benchmarks/eval/retrieval.py --model DIR/minilm [--misses]

`DIR/minilm` is what `millhand knowledge setup` makes. Database, expansion of shorthand and fusion are the plugin's own.
The fusion's one constant was chosen on these questions.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import Figure, parser, progress, report

from millhand.language.embedding import Embedding
from millhand.serving.repository import read_folder
from millhand_plugins.knowledge.database import Database, Filter, Source
from millhand_plugins.knowledge.fusion import fuse
from millhand_plugins.knowledge.reading import Piece
from millhand_plugins.knowledge.shorthand import Lexicon, Shorthand

QUESTIONS = Path(__file__).with_name("retrieval_questions.jsonl")
FIRST = 5
RANKED = 50
WITHIN = 1.0
"""Points that fused may lie below the better of the two on one kind of question."""


def texts_of(data: Path) -> dict[str, str]:
    """Id -> text."""
    with gzip.open(data / "omin_faa/faa_maintenance.csv.gz", "rt") as file:
        texts = {f"faa:{row['c5']}": row["c119"].strip() for row in csv.DictReader(file)}
    with gzip.open(data / "mwo2kg/work_orders.csv.gz", "rt") as file:
        texts |= {f"mwo:{at}": row["ShortText"] for at, row in enumerate(csv.DictReader(file))}
    with gzip.open(data / "maintie/gold_train.json.gz", "rt") as file:
        texts |= {f"mtie:{item['row']}": item["text"] for item in json.load(file)}
    return texts


def embedder(folder: Path) -> Embedding:
    """The node's embedder, with a session in this process in place of a worker."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", options, ["CPUExecutionProvider"])

    async def infer(model: str, tensors: Mapping[str, Any], **_: Any) -> tuple[dict[str, Any], int]:
        (vectors,) = session.run(None, dict(tensors))
        return {"embedding": vectors}, 1

    return Embedding(read_folder(folder), infer)


async def vectors_of(embed: Embedding, shorthand: Shorthand, texts: Sequence[str]) -> np.ndarray:
    parts = []
    for start in range(0, len(texts), 64):
        parts.append(await embed([shorthand.expand(text) for text in texts[start : start + 64]]))
        progress(f"{min(start + 64, len(texts))} of {len(texts)} texts embedded")
    return np.vstack(parts)


def fill(database: Database, texts: Mapping[str, str], vectors: np.ndarray) -> dict[int, str]:
    """Row id -> id of the text."""
    ids = {}
    for at, (name, text) in enumerate(texts.items(), 1):
        database.put(Source(name, "", "order", (), "", len(text)), [Piece(text)], vectors[at - 1 : at])
        ids[at] = name
    return ids


def ranked(database: Database, ids: Mapping[int, str], question: str, vector: np.ndarray) -> dict[str, list[str]]:
    words = database.by_words(question, Filter(), RANKED)
    meaning = database.by_vector(vector, Filter(), RANKED)
    fused = [id for id, _ in fuse([words, meaning])]
    return {
        name: [ids[id] for id in order[:FIRST]]
        for name, order in {"BM25": words, "vectors": meaning, "fused": fused}.items()
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, required=True, help="the embedder's folder")
    arguments.add_argument("--misses", action="store_true", help="print the questions that fused does not answer")
    options = arguments.parse_args()
    texts = texts_of(Path(os.environ["MILLHAND_DATA"]))
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    shorthand, embed = Shorthand(Lexicon.read()), embedder(options.model)
    vectors = asyncio.run(vectors_of(embed, shorthand, list(texts.values())))
    asked = asyncio.run(vectors_of(embed, shorthand, [question["question"] for question in questions]))
    hits: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "knowledge.db", shorthand.expand, passages_cap=10_000)
        ids = fill(database, texts, vectors)
        started_s = time.process_time()
        for question, vector in zip(questions, asked, strict=True):
            found = ranked(database, ids, question["question"], vector)
            for name, order in found.items():
                hit = bool(set(order) & set(question["answers"]))
                hits[name, question["kind"]].append(hit)
                hits[name, "all"].append(hit)
                if options.misses and name == "fused" and not hit:
                    where = {n: bool(set(o) & set(question["answers"])) for n, o in found.items()}
                    print(f"missed: {question['id']} {question['kind']}: {question['question']} {where}")
        ms = 1000 * (time.process_time() - started_s) / len(questions)
        database.close()
    return report("retrieval", figures_of(hits, ms), texts=len(texts), questions=len(questions))


def figures_of(hits: Mapping[tuple[str, str], list[bool]], ms: float) -> list[Figure]:
    share = {key: 100 * sum(found) / len(found) for key, found in hits.items()}
    figures = []
    for kind in dict.fromkeys(kind for _, kind in hits):
        best = max(share["BM25", kind], share["vectors", kind])
        goal = best if kind == "all" else best - WITHIN
        figures += [
            Figure(f"{kind}: {name}", round(share[name, kind], 1), "% recall@5") for name in ("BM25", "vectors")
        ]
        figures.append(Figure(f"{kind}: fused", round(share["fused", kind], 1), "% recall@5", f">= {goal:.1f}"))
    return [*figures, Figure("CPU time of a search without its embedding", round(ms, 2), "ms")]


if __name__ == "__main__":
    sys.exit(main())
