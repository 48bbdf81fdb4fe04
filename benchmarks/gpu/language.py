"""vLLM alone and behind millhand's gateway, on one GPU: the same server, the same load, in turns.

    python benchmarks/gpu/language.py --tokenizer FOLDER [--shape 1.5B] [--rounds 3] [--seconds 6]
    python benchmarks/gpu/language.py --tokenizer FOLDER --gguf SmolLM2.gguf     (a real model that writes real text)
    python benchmarks/gpu/language.py --url http://127.0.0.1:9000 --model NAME   (against a server that runs)

The gateway is the real process, with the plugin `guard` as it is shipped; vLLM is started by the plugin's own command.
Without `--gguf` the model has the shape of Qwen2 1.5B and random weights (`--load-format dummy`): speed depends on the
shape alone, and the text is made-up words (shapes.py). Prompts differ, so that no prefix is known. With `--gguf` the
file is turned into a checkpoint in float16 (from_gguf.py), and asked what a technician would, at temperature 0.7.
Prints JSON lines as it goes (`--out`), and JSON as its last line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from card import Card
from chat import ABILITIES, gateway, load
from figures import Figure, parser, progress, report
from journal import Journal
from node import environment
from shapes import SHAPES, checkpoint

from millhand.language.launch import Launch

HERE = Path(__file__).parent
NAME = "bench"
READY_S = 240.0
WARM_S = 2.0
MANY_STREAMS = 8
"""From here on the load takes several processes: one alone would be the limit."""
CONVERSION_S = 150.0
STOP_S = 30.0
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def start_server(
    folder: Path, model: Path, uuid: str, port: int, arguments: tuple[str, ...] = (), **settings: Any
) -> subprocess.Popen[bytes]:
    """vLLM as the plugin starts it; its log is vllm.log in `folder`."""
    from millhand_plugins.vllm.server import VllmServer
    from millhand_plugins.vllm.settings import VllmSettings

    launch = Launch(name=NAME, model=model, port=port, context_tokens=4096, slots=256, accelerators=(uuid,))
    told = {"interpreter": Path(sys.executable), "dtype": "float16", "arguments": arguments, **settings}
    command = VllmServer(VllmSettings(**told)).command(launch)
    progress(" ".join(command.argv))
    with (folder / "vllm.log").open("wb") as log:
        return subprocess.Popen(
            command.argv,
            env={**os.environ, **ENVIRONMENT, **command.environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to all of its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def real_checkpoint(gguf: Path, tokenizer: Path, folder: Path) -> str:
    """Turn a GGUF file into a checkpoint; returns what it answers to a question."""
    command = [sys.executable, str(HERE / "from_gguf.py"), str(gguf), str(tokenizer), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{gguf} could not be converted:\n{done.stderr[-3000:]}")
    return str(json.loads(done.stdout.splitlines()[-1])["answer"])


def wait_ready(url: str, process: subprocess.Popen[bytes] | None, log: Path, within_s: float = READY_S) -> float:
    """Seconds until it answers. Ends the script where the process died, with the end of its log."""
    began = time.monotonic()
    while time.monotonic() < began + min(within_s, READY_S):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return time.monotonic() - began
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.5)
    tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    raise SystemExit(f"the server at {url} did not come up:\n{tail}")


async def rounds(places: dict[str, str], streams: int, arguments: Any, journal: Journal) -> dict[str, Any]:
    """Each place in turn, several times; the first round of each is thrown away."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    words = ("--questions",) if arguments.gguf else ()
    for number in range(arguments.rounds + 1):
        seconds = arguments.seconds if number else WARM_S
        if number > 1 and journal.left_s < 2 * seconds + STOP_S:
            break
        for name in places if number % 2 else reversed(places):
            found = await load(
                places[name], arguments.model, streams, seconds, number, temperature=arguments.temperature,
                clients=arguments.clients if streams >= MANY_STREAMS else 1, words=words,
            )  # fmt: skip
            journal.write(f"{streams} streams, {name}", turn=number, **found)
            if number:
                seen[name].append(found)
    keys = ("tokens_per_s", "first_ms", "token_ms")
    middle = {name: {key: _median(one[key] for one in runs) for key in keys} for name, runs in seen.items()}
    return {**middle, "errors": sum(one["errors"] for runs in seen.values() for one in runs)}


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def figures(found: dict[int, dict[str, Any]]) -> list[Figure]:
    shown = []
    for streams, places in found.items():
        alone, through = places["alone"], places["gateway"]
        if not (alone["token_ms"] and through["token_ms"]):
            raise SystemExit("an answer came in one piece: it was held to its end, and no figure says anything")
        if streams == 1:
            shown += [
                Figure("1 stream: ms a token, to the server alone", through["token_ms"] / alone["token_ms"], "x",
                       "<= 1.05", f"{alone['token_ms']:.3f} ms"),
                Figure("1 stream: added a token", through["token_ms"] - alone["token_ms"], "ms", "<= 0.3"),
                Figure("1 stream: added to the first token", through["first_ms"] - alone["first_ms"], "ms", "<= 5",
                       f"{alone['first_ms']:.1f} ms"),
            ]  # fmt: skip
        shown.append(Figure(f"{streams} streams: throughput, to the server alone",
                            through["tokens_per_s"] / alone["tokens_per_s"], "x", ">= 0.95",
                            f"{alone['tokens_per_s']:.0f} tok/s"))  # fmt: skip
    shown.append(Figure("errors", sum(one["errors"] for one in found.values()), "", "== 0"))
    return shown


async def measure(url: str, arguments: Any, journal: Journal) -> dict[int, dict[str, Any]]:
    route = {"name": arguments.model, "urls": [url], "abilities": ABILITIES, "context_tokens": 4096}
    found = {}
    async with gateway(route, arguments.processes, arguments.guards) as place:
        for streams in arguments.streams:
            with journal.part(f"{streams} streams"):
                found[streams] = await rounds({"alone": url, "gateway": place}, streams, arguments, journal)
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokenizer", type=Path)
    options.add_argument("--shape", choices=sorted(SHAPES), default="1.5B")
    options.add_argument("--gguf", type=Path, help="a real model: its weights, and its text")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=6.0)
    options.add_argument("--streams", type=int, nargs="*", default=[1, 8, 128])
    options.add_argument("--processes", type=int, default=4, help="of the gateway")
    options.add_argument("--clients", type=int, default=4, help="processes of the load at many streams")
    options.add_argument("--no-guards", dest="guards", action="store_false")
    options.add_argument("--temperature", type=float, help="1 for random weights, 0.7 for real ones")
    options.add_argument("--url", help="a server that runs")
    options.add_argument("--model", default=NAME)
    options.add_argument("--out", type=Path, help="a file for the JSON lines")
    options.add_argument("--deadline", type=float, default=560.0, help="seconds for everything")
    arguments = options.parse_args()
    if arguments.temperature is None:
        arguments.temperature = 0.7 if arguments.gguf else 1.0
    folder = Path(tempfile.mkdtemp(prefix="mh-"))
    os.environ.update(environment(folder / "points"))
    journal, answer = Journal(arguments.out, arguments.deadline), ""
    process, card, start_s = None, Card(arguments.url is None), 0.0
    try:
        if arguments.url is None:
            import pynvml

            if arguments.gguf:
                answer = real_checkpoint(arguments.gguf, arguments.tokenizer, folder / "model")
                journal.write("converted", answer=answer)
            else:
                checkpoint(folder / "model", arguments.shape, arguments.tokenizer)
            uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
            dummy = () if arguments.gguf else ("--load-format", "dummy")
            process = start_server(folder, folder / "model", uuid, 9000, dummy)
        url = arguments.url or "http://127.0.0.1:9000"
        if process is not None:
            start_s = wait_ready(url, process, folder / "vllm.log")
        journal.write("ready", seconds=start_s, used_mib=card.used_mib())
        found = asyncio.run(measure(url, arguments, journal))
    finally:
        if process is not None:
            stop_server(process)
    said = {
        "card": card.facts,
        "shape": arguments.gguf.name if arguments.gguf else arguments.shape,
        "weights": "real, float16" if arguments.gguf else "random",
        "answer": answer,
        "temperature": arguments.temperature,
        "gateway_processes": arguments.processes,
        "guards": ["guard"] if arguments.guards else [],
        "server_start_s": start_s,
        "failures": journal.failures,
        "peers": peers(),
    }
    return report("gpu_language", figures(found), found=found, **said)


def peers() -> dict[str, str]:
    """Versions of what is measured beside millhand, where it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("vllm", "torch", "transformers", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


if __name__ == "__main__":
    sys.exit(main())
