"""What is measured of language models: times of a token and of a prompt, perplexity, memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from millhand.errors import ConfigError, InputError
from millhand.hookspecs import LanguageServer
from millhand.language.launch import Launch
from millhand.language.perplexity import output_head, perplexity, tokens_of
from millhand.language.plan import servers_of
from millhand.language.process import free_port
from millhand.language.trial import TrialServer
from millhand.proof.document import Latency
from millhand.registry import Registry
from millhand.workshop.recipe import CPU, Target
from millhand.workshop.site import Site

HELD = Path(__file__).with_name("held.txt")
PROMPT_TOKENS = 128
WRITTEN_TOKENS = 32
ROUNDS_LEAST = 3
CONTEXT_TOKENS = 1024
TEXT_BYTES_CAP = 1 << 20


@dataclass(frozen=True)
class Text:
    """What models are judged on."""

    text: str
    source: str
    """In words, with the SHA-256."""


def held_text(path: Path | None) -> Text:
    """The owner's text, or the one that comes along. Raises InputError."""
    chosen = path or HELD
    try:
        with chosen.open("rb") as file:
            data = file.read(TEXT_BYTES_CAP + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{chosen}' cannot be read as a text: {error}", hint="give a file in UTF-8") from error
    if len(data) > TEXT_BYTES_CAP:
        raise InputError(f"'{chosen}' is longer than 1 MiB, which takes hours on a CPU", hint="give a shorter text")
    name = str(path) if path else "millhand's own text on maintenance, English"
    return Text(text, f"{name}; sha256 {hashlib.sha256(data).hexdigest()}")


def serving_server(site: Site) -> LanguageServer:
    """The language server that measures: the profile's where it takes GGUF and can run. Raises ConfigError."""
    wanted = site.config.language.server or site.match.profile.language.server
    registry = Registry()
    registry.load({**site.config.plugin_tables(), wanted: site.config.plugins.get(wanted, {})})
    servers = servers_of(registry)
    able = [server for server in servers if "gguf" in server.formats and not server.missing()]
    if not able:
        why = (
            "; ".join(f"{server.name}: {server.missing() or 'takes no GGUF'}" for server in servers) or "none is loaded"
        )
        raise ConfigError(f"no language server can run here: {why}", hint="name [plugins.llamacpp], install xllamacpp")
    return next((server for server in able if server.name == wanted), able[0])


@dataclass(frozen=True)
class Bench:
    """Where language models are measured: a server's kind, an accelerator, and how long."""

    server: LanguageServer
    accelerators: tuple[str, ...]
    threads: int
    seconds: float
    """How long speed is measured."""
    scratch: Path
    """For logs."""

    @contextlib.contextmanager
    def running(self, path: Path, embeddings: bool = False) -> Iterator[TrialServer]:
        """A server with a model. Raises LanguageError where it does not come up."""
        launch = Launch(
            name=path.stem,
            model=path,
            port=free_port(),
            context_tokens=CONTEXT_TOKENS,
            threads=self.threads,
            accelerators=self.accelerators,
            embeddings=embeddings,
        )
        with TrialServer(self.server, launch, self.scratch / f"{time.monotonic_ns()}.log") as server:
            yield server

    def perplexity(self, path: Path, text: str, progress: Callable[[float], None]) -> tuple[float, int]:
        """(perplexity, tokens that were judged) of a GGUF file. Raises MillhandError."""
        head = output_head(path)
        with self.running(path, embeddings=True) as server:
            return perplexity(server, head, tokens_of(server, text), progress)

    def speed(self, original: Path, candidate: Path, text: str) -> tuple[tuple[Latency, Latency], tuple[int, int]]:
        """((times of a token that is written, of a prompt that is read), memory of both servers in bytes)."""
        written: tuple[list[float], list[float]] = ([], [])
        read: tuple[list[float], list[float]] = ([], [])
        with self.running(original) as first, self.running(candidate) as second:
            servers = (first, second)
            prompts = _prompts(tokens_of(first, text))
            end_s = time.monotonic() + self.seconds
            for number in itertools.count():
                if number > ROUNDS_LEAST and time.monotonic() > end_s:
                    break
                prompt = next(prompts)
                for side in (0, 1) if number % 2 else (1, 0):
                    token_ms, prompt_ms = _timed(servers[side], prompt)
                    if number:  # the first warms both
                        written[side].append(token_ms)
                        read[side].append(prompt_ms)
            memory = first.resident_bytes(), second.resident_bytes()
        return (_latency(1, written), _latency(PROMPT_TOKENS, read)), memory

    def speed_alone(self, path: Path, text: str) -> tuple[tuple[Latency, Latency], int]:
        """The same of one file by itself, which stands on both sides of the times."""
        times: list[tuple[float, float]] = []
        with self.running(path) as server:
            prompts = _prompts(tokens_of(server, text))
            _timed(server, next(prompts))  # the first warms
            end_s = time.monotonic() + self.seconds
            while len(times) < ROUNDS_LEAST or time.monotonic() < end_s:
                times.append(_timed(server, next(prompts)))
            memory_bytes = server.resident_bytes()
        written, read = ([*side] for side in zip(*times, strict=True))
        return (_latency(1, (written, written)), _latency(PROMPT_TOKENS, (read, read))), memory_bytes


def open_bench(site: Site, target: Target, scratch: Path) -> Bench:
    """Of this node. Raises ConfigError where no language server can run."""
    cores = site.hardware.cpu.usable
    return Bench(
        server=serving_server(site),
        accelerators=() if target.accelerator in ("", CPU) else (target.accelerator,),
        threads=site.config.language.threads or (max(1, int(cores)) if cores else 0),
        seconds=site.config.workshop.latency_s,
        scratch=scratch,
    )


def _prompts(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    """Parts of a text, for ever; one that is shorter than a prompt is one."""
    firsts = range(0, max(1, len(tokens) - PROMPT_TOKENS), PROMPT_TOKENS)
    return itertools.cycle(tokens[first : first + PROMPT_TOKENS] for first in firsts)


def _timed(server: TrialServer, prompt: Sequence[int]) -> tuple[float, float]:
    """(ms for each token written, ms to read the prompt), by the server's own clock."""
    body = {
        "prompt": list(prompt),
        "n_predict": WRITTEN_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }
    timings = server.post("/completion", body)["timings"]
    return float(timings["predicted_ms"]) / int(timings["predicted_n"]), float(timings["prompt_ms"])


def _latency(batch: int, times: tuple[list[float], list[float]]) -> Latency:
    (original_p50, original_p99), (p50, p99) = (np.percentile(side, (50, 99)).tolist() for side in times)
    return Latency(batch=batch, p50_ms=p50, p99_ms=p99, original_p50_ms=original_p50, original_p99_ms=original_p99)
