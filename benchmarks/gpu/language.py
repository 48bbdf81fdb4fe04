"""vLLM alone and behind millhand's gateway, on one GPU: the same server, the same load, in turns.

    python benchmarks/gpu/language.py --tokenizer FOLDER [--shape 1.5B] [--rounds 3] [--seconds 6]
    python benchmarks/gpu/language.py --url http://127.0.0.1:9000 --model NAME   (against a server that runs)

The model has the shape of Qwen2 1.5B and random weights: speed depends on the shape alone, the text is noise. vLLM is
started by the plugin's own command, with `--load-format dummy`; the gateway is the real process, with the plugin
`guard` as it is shipped. Prompts differ, so that no prefix is known. Prints JSON as its last line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from card import Card
from figures import Figure, parser, progress, report
from node import environment

from millhand.control import ControlServer
from millhand.language.launch import Launch
from millhand.serving.front import gateway_front
from millhand.serving.openai.settings import GatewaySettings

STREAMS = Path(__file__).with_name("streams.py")
NAME = "bench"
CLIENTS = 4
"""Processes of the load at many streams: one alone would be the limit."""
READY_S = 300.0
WARM_S = 2.0
SHAPES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
}  # fmt: skip


def checkpoint(folder: Path, shape: str, tokenizer: Path) -> Path:
    """A folder that vLLM takes for a checkpoint without weights."""
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        **SHAPES[shape],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start_server(folder: Path, shape: str, tokenizer: Path, uuid: str, port: int) -> subprocess.Popen[bytes]:
    """vLLM as the plugin starts it."""
    from millhand_plugins.vllm.server import VllmServer
    from millhand_plugins.vllm.settings import VllmSettings

    launch = Launch(
        name=NAME,
        model=checkpoint(folder / "model", shape, tokenizer),
        port=port,
        context_tokens=4096,
        slots=256,
        accelerators=(uuid,),
    )
    settings = VllmSettings(interpreter=Path(sys.executable), dtype="float16", arguments=("--load-format", "dummy"))
    command = VllmServer(settings).command(launch)
    more = {"VLLM_USE_FLASHINFER_SAMPLER": "0", **command.environment}
    progress(" ".join(command.argv))
    with (folder / "vllm.log").open("wb") as log:
        return subprocess.Popen(
            command.argv, env={**os.environ, **more}, stdout=log, stderr=log, start_new_session=True
        )


def wait_ready(url: str, process: subprocess.Popen[bytes] | None, log: Path) -> float:
    """Seconds until it answers. Ends the script where the process died, with the end of its log."""
    began = time.monotonic()
    while time.monotonic() < began + READY_S:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return time.monotonic() - began
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.5)
    tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    raise SystemExit(f"the server at {url} did not come up:\n{tail}")


class Daemon:
    """What a gateway asks of a daemon: where the model is."""

    def __init__(self, path: Path, url: str, model: str) -> None:
        abilities = ["chat", "completions", "usage", "stop", "seed", "logprobs", "json_schema"]
        self._models = [{"name": model, "urls": [url], "abilities": abilities, "context_tokens": 4096}]
        handlers: dict[str, Any] = {"language.routes": self.routes, "metrics.report": self.report}
        self.control = ControlServer(path, handlers)

    async def routes(self) -> AsyncIterator[dict[str, Any]]:
        yield {"models": self._models}
        await asyncio.Event().wait()

    async def report(self, front: dict[str, Any]) -> None:
        """Metrics are not looked at here."""


async def load(url: str, model: str, streams: int, seconds: float, seed: int, temperature: float) -> dict[str, Any]:
    """Run the load from one process or several, and put together what they saw."""
    clients = CLIENTS if streams >= 2 * CLIENTS else 1
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, str(STREAMS), url, model, str(streams // clients), str(seconds), str(seed * 100 + client),
            "--temperature", str(temperature),
            stdout=asyncio.subprocess.PIPE,
        )
        for client in range(clients)
    ]  # fmt: skip
    seen = [json.loads((await process.communicate())[0]) for process in processes]
    if errors := [error for one in seen for error in one["errors"]]:
        progress(f"{len(errors)} errors, such as {errors[0]}")
    wall_s = max(one["ended_s"] for one in seen) - min(one["began_s"] for one in seen)
    return {
        "tokens_per_s": sum(one["tokens"] for one in seen) / wall_s,
        "first_ms": statistics.median(value for one in seen for value in one["first_ms"]),
        "token_ms": statistics.median(value for one in seen for value in one["token_ms"]),
        "answers": sum(one["answers"] for one in seen),
        "errors": len(errors),
    }


async def rounds(places: dict[str, str], streams: int, arguments: Any) -> dict[str, Any]:
    """Each place in turn, several times; the first round of each is thrown away."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    for number in range(arguments.rounds + 1):
        for name, url in places.items():
            seconds = arguments.seconds if number else WARM_S
            found = await load(url, arguments.model, streams, seconds, number, arguments.temperature)
            if number:
                progress(f"{streams:4d} streams, {name:8s} {found}")
                seen[name].append(found)
    keys = ("tokens_per_s", "first_ms", "token_ms")
    middle = {name: {key: statistics.median(one[key] for one in runs) for key in keys} for name, runs in seen.items()}
    return {**middle, "errors": sum(one["errors"] for runs in seen.values() for one in runs)}


def figures(found: dict[int, dict[str, Any]]) -> list[Figure]:
    one, many = found[1], found.get(128)
    if not all(place["token_ms"] for place in (one["alone"], one["gateway"])):
        raise SystemExit("an answer came in one piece: it was held to its end, and no figure says anything")
    shown = [
        Figure("one stream: ms a token, to the server alone", one["gateway"]["token_ms"] / one["alone"]["token_ms"],
               "x", "<= 1.05", f"{one['alone']['token_ms']:.3f} ms"),
        Figure("one stream: added a token", one["gateway"]["token_ms"] - one["alone"]["token_ms"], "ms", "<= 0.3"),
        Figure("one stream: added to the first token", one["gateway"]["first_ms"] - one["alone"]["first_ms"], "ms",
               "<= 5", f"{one['alone']['first_ms']:.1f} ms"),
    ]  # fmt: skip
    if many is not None:
        share = many["gateway"]["tokens_per_s"] / many["alone"]["tokens_per_s"]
        peer = f"{many['alone']['tokens_per_s']:.0f} tok/s"
        shown.append(Figure("128 streams: throughput, to the server alone", share, "x", ">= 0.95", peer))
    shown.append(Figure("errors", sum(one["errors"] for one in found.values()), "", "== 0"))
    return shown


async def measure(url: str, folder: Path, arguments: Any) -> dict[int, dict[str, Any]]:
    settings = GatewaySettings(port=0, processes=arguments.processes, streams_cap=256, queue=256)
    control = folder / "control.sock"
    daemon = Daemon(control, url, arguments.model)
    await daemon.control.start()
    gateway = gateway_front(settings, control, folder, plugins={"guard": {}} if arguments.guards else {})
    await gateway.start()
    place = f"http://127.0.0.1:{gateway.port}"
    try:
        await asyncio.to_thread(wait_ready, place, None, folder / "none")
        places = {"alone": url, "gateway": place}
        return {streams: await rounds(places, streams, arguments) for streams in arguments.streams}
    finally:
        await gateway.stop()
        await daemon.control.stop()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokenizer", type=Path)
    options.add_argument("--shape", choices=sorted(SHAPES), default="1.5B")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=6.0)
    options.add_argument("--streams", type=int, nargs="*", default=[1, 128])
    options.add_argument("--processes", type=int, default=4, help="of the gateway")
    options.add_argument("--no-guards", dest="guards", action="store_false")
    options.add_argument("--temperature", type=float, default=1.0, help="at 0 random weights write line feeds alone")
    options.add_argument("--url", help="a server that runs")
    options.add_argument("--model", default=NAME)
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mh-"))
    os.environ.update(environment(folder / "points"))
    process, card, start_s = None, Card(arguments.url is None), 0.0
    try:
        if arguments.url is None:
            import pynvml

            uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
            process = start_server(folder, arguments.shape, arguments.tokenizer, uuid, 9000)
        url = arguments.url or "http://127.0.0.1:9000"
        if process is not None:
            start_s = wait_ready(url, process, folder / "vllm.log")
        progress(f"the server answers after {start_s:.0f} s, {card.used_mib()} MiB are taken")
        found = asyncio.run(measure(url, folder, arguments))
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
    said = {
        "card": card.facts,
        "shape": arguments.shape,
        "weights": "random",
        "temperature": arguments.temperature,
        "gateway_processes": arguments.processes,
        "guards": ["guard"] if arguments.guards else [],
        "server_start_s": start_s,
        "peers": _peers(),
    }
    return report("gpu_language", figures(found), found=found, **said)


def _peers() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return {"vllm": version("vllm"), "torch": version("torch")}
    return {}


if __name__ == "__main__":
    sys.exit(main())
