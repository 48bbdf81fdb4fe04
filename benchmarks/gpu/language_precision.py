"""A 1.5B shape on one GPU in 16, 8 and 4 bits through millhand, beside transformers and bitsandbytes.

    python benchmarks/gpu/language_precision.py --tokenizer FOLDER --out FILE.jsonl [--parts fp16 batch int4 bnb fp8]
    python benchmarks/gpu/language_precision.py --tokenizer FOLDER --rehearse      (without a GPU: stand-in servers)

Weights are random; float16 and int4 come from the same numbers (random_weights.py) and are real files that vLLM loads.

- **fp16**, **int4** (GPTQ's layout, group 128), **fp8** (vLLM's `--quantization fp8` of the float16 file): vLLM by the
  plugin's own command, alone and behind the gateway with the default guards, in turns, one stream and many. What the
  weights take is vLLM's own word, and what the card has left by NVML is written beside it.
- **batch**: transformers' `generate_batch` in bfloat16 with sdpa, 128 requests at once and one.
- **bnb**: transformers' `generate` in bfloat16, and with bitsandbytes' load_in_8bit.

Goals: int4 >= 1.2 times fp16 at one stream; vLLM through millhand >= 10 times generate_batch, at one stream and at
many; 8 bit: <= 28 % of float32's size, and >= 2 times the tokens a second of load_in_8bit. A part that fails or has no
time left is told, and the others go on. Prints JSON lines as it goes, and JSON as its last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from card import Card, Cards
from chat import ABILITIES, gateway
from figures import Figure, parser, report
from journal import Journal
from language import NAME, peers, rounds, start_server, stop_server, wait_ready
from node import environment
from shapes import SHAPES

from millhand.language.process import free_port

HERE = Path(__file__).parent
PARTS = ("fp16", "batch", "int4", "bnb", "fp8")
SERVED: dict[str, dict[str, Any]] = {"fp16": {}, "int4": {}, "fp8": {"quantization": "fp8"}}
"""Part -> what [plugins.vllm] says beside the interpreter."""
FILES = {"fp16": "fp16", "int4": "int4", "fp8": "fp16"}
WEIGHTS_S = 150.0
FREE_MIB, FREE_S = 2048, 20.0
"""After a server: what comes next does not start where the memory is not given back."""
PEER_S = 150.0
PART_S = {"fp16": 150.0, "int4": 150.0, "fp8": 150.0, "batch": 45.0, "bnb": 45.0}
"""A part is not begun with less time left."""
TAKEN = re.compile(r"Model loading took ([\d.]+) GiB")
KERNEL = re.compile(r"Using (\w+) for \w*GPTQ\w*")
REHEARSED_MS = {"fp16": 12.0, "int4": 6.0, "fp8": 8.0}
FLOAT32 = 4
CLIENTS = 4
"""Processes of the load at many streams."""


class Bench:
    def __init__(self, given: argparse.Namespace, card: Card, cards: Cards, journal: Journal, folder: Path) -> None:
        self.given = given
        self.card, self.cards = card, cards
        self.journal = journal
        self.served: dict[str, dict[str, Any]] = {}
        """Part -> streams -> `alone` and `gateway`, and what was seen of its memory."""
        self.peer: list[dict[str, Any]] = []
        self.files: dict[str, int] = {}
        self._folder = folder

    def write_weights(self) -> None:
        command = [str(HERE / "random_weights.py"), self.given.shape, str(self.given.tokenizer), str(self._folder)]
        self.files = self._lines(command, WEIGHTS_S)[-1]
        self.journal.write("files", **self.files)

    def part(self, name: str) -> None:
        if name in SERVED:
            self._serve(name)
        else:
            way = {"batch": "batch", "bnb": "generate"}[name]
            size = ["--requests", str(self.given.streams), "--tokens", str(self.given.tokens)]
            self._lines([str(HERE / "transformers_peer.py"), way, str(self._folder / "fp16"), *size], PEER_S)

    def _lines(self, command: list[str], limit_s: float) -> list[dict[str, Any]]:
        """What a script of ours printed, kept also where it fails later. Raises SystemExit where it does."""
        limit_s = min(limit_s, self.journal.left_s - 5)
        process = subprocess.Popen(
            [self.given.peer_python, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += f"\nit took longer than {limit_s:.0f} s"
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        for line in found:
            if "what" in line:
                self.peer.append(line)
                self.journal.write("transformers", **line)
        if process.returncode != 0:
            raise SystemExit(f"{command[0]} {command[1]}: {err[-3000:]}")
        return found

    # ---- vLLM -------------------------------------------------------------------------------------------------------

    def _serve(self, name: str) -> None:
        folder = self._folder / f"served-{name}"
        folder.mkdir()
        with self._server(name, folder) as url:
            log = (folder / "vllm.log").read_text(errors="replace")
            taken, kernel = TAKEN.search(log), KERNEL.search(log)
            found = {
                "weights_gib": float(taken[1]) if taken else None,
                "kernel": kernel[1] if kernel else "",
                "used_mib": self.card.used_mib(),
            }
            self.journal.write(f"{name} ready", **found)
            self.served[name] = found
            asyncio.run(self._measure(name, url))

    @contextlib.contextmanager
    def _server(self, name: str, folder: Path) -> Iterator[str]:
        port = free_port()
        if self.given.rehearse:
            command = [sys.executable, str(HERE / "rehearsal.py"), str(port), str(REHEARSED_MS[name])]
            with (folder / "vllm.log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        else:
            import pynvml

            uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
            process = start_server(folder, self._folder / FILES[name], uuid, port, **SERVED[name])
        url = f"http://127.0.0.1:{port}"
        try:
            seconds = wait_ready(url, process, folder / "vllm.log", self.journal.left_s - 30)
            self.journal.write(f"{name} up", seconds=round(seconds, 1))
            yield url
        finally:
            stop_server(process)
            if not self.cards.await_free(FREE_MIB, FREE_S):
                self.journal.write("memory", taken_mib=self.cards.used_mib())

    async def _measure(self, name: str, url: str) -> None:
        route = {"name": NAME, "urls": [url], "abilities": ABILITIES, "context_tokens": 4096}
        told = argparse.Namespace(
            gguf=None,
            model=NAME,
            temperature=1.0,
            rounds=self.given.rounds,
            seconds=self.given.seconds,
            clients=CLIENTS,
        )
        async with gateway(route, self.given.processes) as place:
            for streams in (1, self.given.streams):
                with self.journal.part(f"{name}, {streams} streams"):
                    places = {"alone": url, "gateway": place}
                    self.served[name][streams] = await rounds(places, streams, told, self.journal)

    # ---- figures ----------------------------------------------------------------------------------------------------

    def rate(self, part: str, streams: int, place: str = "gateway") -> float | None:
        found = self.served.get(part, {}).get(streams)
        return found[place]["tokens_per_s"] if found else None

    def token_ms(self, part: str, place: str = "gateway") -> float | None:
        found = self.served.get(part, {}).get(1)
        return found[place]["token_ms"] if found else None

    def peer_rate(self, what: str, **by: Any) -> float | None:
        found = [one for one in self.peer if one["what"] == what and all(one[key] == by[key] for key in by)]
        return found[-1]["tokens_per_s"] if found else None

    def figures(self) -> list[Figure]:
        return [*self._served_figures(), *self._int4_figures(), *self._batch_figures(), *self._eight_bit_figures()]

    def _served_figures(self) -> Iterator[Figure]:
        for part in self.served:
            yield Figure(f"{part}: weights on the card, vLLM's word", self.served[part]["weights_gib"], "GiB")
            for streams in (1, self.given.streams):
                through, alone = self.rate(part, streams), self.rate(part, streams, "alone")
                if through and alone:
                    yield Figure(f"{part}, {streams} streams: to the server alone", through / alone, "x", ">= 0.95",
                                 f"{alone:.0f} tok/s")  # fmt: skip
            if (ms := self.token_ms(part)) is not None:
                yield Figure(
                    f"{part}, one stream: a token", ms, "ms", "", f"{self.token_ms(part, 'alone'):.3f} ms alone"
                )

    def _int4_figures(self) -> Iterator[Figure]:
        for place in ("gateway", "alone"):
            whole, packed = self.token_ms("fp16", place), self.token_ms("int4", place)
            if whole and packed:
                goal = ">= 1.2" if place == "gateway" else ""
                yield Figure(f"int4 to fp16, one stream, {place}", whole / packed, "x", goal)
        many = self.rate("fp16", self.given.streams), self.rate("int4", self.given.streams)
        if many[0] and many[1]:
            yield Figure(f"int4 to fp16, {self.given.streams} streams, gateway", many[1] / many[0], "x")
        taken = [self.served.get(part, {}).get("weights_gib") for part in ("fp16", "int4")]
        if taken[0] and taken[1]:
            yield Figure("int4: weights on the card, of fp16's", taken[1] / taken[0], "x", "<= 0.5")

    def _batch_figures(self) -> Iterator[Figure]:
        for streams in (1, self.given.streams):
            peer, through = self.peer_rate("generate_batch", requests=streams), self.rate("fp16", streams)
            if peer and through:
                yield Figure(f"{streams} streams: times transformers' generate_batch", through / peer, "x", ">= 10",
                             f"{peer:.1f} tok/s")  # fmt: skip

    def _eight_bit_figures(self) -> Iterator[Figure]:
        sizes = {one["bits"]: one for one in self.peer if one["what"] == "generate"}
        if {8, 16} <= set(sizes):
            float32 = FLOAT32 * sizes[16]["parameters"]
            yield Figure("load_in_8bit: size, of float32's", sizes[8]["bytes"] / float32, "x")
            yield Figure("load_in_8bit: size, of bfloat16's", sizes[8]["bytes"] / sizes[16]["bytes"], "x")
            taken = self.served.get("fp8", {}).get("weights_gib")
            if taken:
                yield Figure("fp8 by vLLM: size, of float32's", taken * (1 << 30) / float32, "x", "<= 0.28")
        for requests in (1, 8):
            half, eight = (self.peer_rate("generate", bits=bits, requests=requests) for bits in (16, 8))
            if half and eight:
                yield Figure(
                    f"load_in_8bit to bfloat16, {requests} requests", eight / half, "x", "", f"{eight:.1f} tok/s"
                )
        peer, through = self.peer_rate("generate", bits=8, requests=1), self.rate("fp8", 1)
        if peer and through:
            yield Figure("fp8 through millhand to load_in_8bit, one stream", through / peer, "x", ">= 2",
                         f"{peer:.1f} tok/s")  # fmt: skip
        whole, eight = self.token_ms("fp16"), self.token_ms("fp8")
        if whole and eight:
            yield Figure("fp8 to fp16, one stream, gateway", whole / eight, "x")


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokenizer", type=Path, required=True)
    options.add_argument("--out", type=Path, help="a file for the JSON lines")
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    options.add_argument("--shape", choices=sorted(SHAPES), default="1.5B")
    options.add_argument("--streams", type=int, default=128)
    options.add_argument("--tokens", type=int, default=128, help="of one answer of transformers")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--processes", type=int, default=4, help="of the gateway")
    options.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    options.add_argument("--deadline", type=float, default=560.0, help="seconds for everything")
    options.add_argument("--rehearse", action="store_true", help="without a GPU, the shape `tiny`")
    given = options.parse_args()
    if given.rehearse:
        given.shape = "tiny"
    gpu = not given.rehearse
    journal, card, cards = Journal(given.out, given.deadline), Card(gpu), Cards(gpu)
    with tempfile.TemporaryDirectory(prefix="mhp-") as name:
        os.environ.update(environment(Path(name) / "points"))
        bench = Bench(given, card, cards, journal, Path(name))
        journal.write("begun", device=card.facts)
        with journal.part("weights"):
            bench.write_weights()
        for part in given.parts if bench.files else []:
            if journal.fits(part, 0 if given.rehearse else PART_S[part]):
                with journal.part(part):
                    bench.part(part)
    document = {
        "card": card.facts,
        "shape": given.shape,
        "weights": "random, in files",
        "files_bytes": bench.files,
        "served": bench.served,
        "transformers": bench.peer,
        "guards": ["guard"],
        "gateway_processes": given.processes,
        "failures": journal.failures,
        "peers": peers(),
    }
    journal.write("found", figures=[figure.line() for figure in bench.figures()], **document)
    return report("gpu_language_precision", bench.figures(), **document)


if __name__ == "__main__":
    sys.exit(main())
