"""A small language model on the CPU through millhand, beside what else serves it: SmolLM2-135M in alternating pairs.

The daemon runs whole, with its gateway and the default guards. Parts, of which --parts picks:

- decode: one stream through millhand, beside the same llama.cpp server alone, started the same way; while that is
  asked, the daemon and all that it started are stopped (SIGSTOP), so that it has the machine for itself.
- transformers: one stream, beside transformers' generate in fp32 (--transformers-python: an interpreter that has it).
- users: four users at once, beside llama-cpp-python's server (--llama-cpp-python: an interpreter that has it).
- prefix: time to first token of questions of work orders, the orders' own prompts: the first question of an order, a
  further one on the same prefix, and the same machine's next order.
- aborts: what is left in slots and KV cache after 1,000 streams whose clients left. llama.cpp does not tell how many
  cells are taken; so all slots are filled to their last cell, before and after. Its prompt cache is off here (it keeps
  prompts in memory on purpose), so that the memory of the process can be compared.

    python benchmarks/language_cpu.py --gguf FILE [--threads 2] [--parts decode users] [--into FILE]
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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from figures import Figure, parser, progress, report
from language_gateway import MODEL, PROMPT, Client, abort, free_port, get, settled

from millhand.control import ControlClient
from millhand.language.launch import Launch
from millhand.language.pack import PackSettings, find_pack
from millhand.language.trial import TrialServer
from millhand_plugins.llamacpp.server import LlamacppServer
from millhand_plugins.llamacpp.settings import LlamacppSettings
from millhand_plugins.orders.reviser import PHRASES, Question

HERE = Path(__file__).parent
SLOTS = 4
CONTEXT_TOKENS = 2048
SHORT_CONTEXT_TOKENS = 512
"""Of the part that fills every slot, which takes long on a CPU."""
TOKENS = 128
PEER_TOKENS = 64
USERS = 4
ENDS = {"0": -100, "2": -100}
"""SmolLM2's tokens that end an answer, as `logit_bias`: every server writes as many tokens then."""
START_DEADLINE_S = 120
CONFIG = """
[node]
id = "measured"
data_dir = "{root}/data"
run_dir = "{root}/run"
[language]
model = "{model}"
threads = {threads}
slots = {slots}
context_tokens = {context_tokens}
[gateway]
port = {port}
[http]
port = 0
[plugins.llamacpp]
use = "xllamacpp"
prompt_cache_mib = {prompt_cache_mib}
"""


@dataclass(frozen=True)
class Options:
    gguf: Path
    threads: int
    pairs: int
    transformers_python: str
    llama_cpp_python: str


@dataclass(frozen=True)
class Node:
    """A daemon that serves."""

    url: str
    """Its gateway's."""
    server_url: str
    """Of the language server behind it."""
    process: psutil.Process
    key: str
    """What the language server asks of who talks to it."""

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The daemon and all that it started do nothing meanwhile."""
        family = [self.process, *self.process.children(recursive=True)]
        for one in family:
            one.suspend()
        try:
            yield
        finally:
            for one in reversed(family):
                one.resume()

    def server_bytes(self) -> int:
        """Resident memory of the language server: of the daemon's processes the largest."""
        return max(int(one.memory_info().rss) for one in self.process.children(recursive=True))


@contextlib.contextmanager
def node(options: Options, context_tokens: int = CONTEXT_TOKENS, cache_mib: int = 256) -> Iterator[Node]:
    """A daemon of its own, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mhb-", dir="/tmp") as folder:
        root, port = Path(folder), free_port()
        config = root / "millhand.toml"
        config.write_text(
            CONFIG.format(
                root=root,
                model=MODEL,
                threads=options.threads,
                slots=SLOTS,
                context_tokens=context_tokens,
                port=port,
                prompt_cache_mib=cache_mib,
            )
        )
        millhand = [sys.executable, "-m", "millhand", "--config", str(config)]
        subprocess.run([*millhand, "model", "add", MODEL, str(options.gguf)], check=True, stdout=subprocess.DEVNULL)
        log = (root / "daemon.log").open("wb")
        daemon = subprocess.Popen([*millhand, "run"], stdout=log, stderr=subprocess.STDOUT)
        try:
            shown = _served(millhand, daemon, root)
            replica = shown["replicas"][0]
            with contextlib.closing(ControlClient(root / "run/control.sock").stream("language.routes")) as routes:
                key = next(routes)["models"][0]["keys"][replica["url"]]
            yield Node(f"http://127.0.0.1:{port}", replica["url"], psutil.Process(daemon.pid), key)
        finally:
            daemon.terminate()
            daemon.wait(60)
            log.close()


def _served(millhand: Sequence[str], daemon: subprocess.Popen[bytes], root: Path) -> dict[str, Any]:
    """What `language show` says once the model serves."""
    end_s = time.monotonic() + START_DEADLINE_S
    while daemon.poll() is None and time.monotonic() < end_s:
        done = subprocess.run([*millhand, "language", "show", "--json"], capture_output=True, check=False)
        if done.returncode == 0:
            shown: dict[str, Any] = json.loads(done.stdout)
            if shown["state"] == "ready":
                return shown
        time.sleep(0.5)
    raise SystemExit(f"the daemon does not serve:\n{(root / 'daemon.log').read_text()[-3000:]}")


@contextlib.contextmanager
def alone(options: Options, folder: Path) -> Iterator[str]:
    """The same llama.cpp server without millhand; gives its URL."""
    launch = Launch(
        name=MODEL,
        model=options.gguf,
        port=free_port(),
        context_tokens=CONTEXT_TOKENS,
        slots=SLOTS,
        threads=options.threads,
    )
    with TrialServer(LlamacppServer(LlamacppSettings(use="xllamacpp")), launch, folder / "alone.log"):
        yield f"http://127.0.0.1:{launch.port}"


# ---- parts ----------------------------------------------------------------------------------------------------------

Rate = Callable[[], Awaitable[float]]


async def paired(first: Rate, second: Rate, pairs: int) -> tuple[float, float, float]:
    """(median of second / first over neighbouring pairs, median of first, of second); who begins alternates."""
    found = []
    for number in range(pairs + 1):
        if number % 2:
            right, left = await second(), await first()
        else:
            left, right = await first(), await second()
        if number:  # the first pair warms both
            found.append((left, right))
    share = statistics.median(right / left for left, right in found)
    return share, statistics.median(left for left, _ in found), statistics.median(right for _, right in found)


async def written(session: aiohttp.ClientSession, url: str, user: int, tokens: int) -> int:
    """Tokens of one streamed answer. Events are not counted: guards hold texts back and let several out as one."""
    asked = {
        "model": MODEL, "stream": True, "max_tokens": tokens, "temperature": 0, "logit_bias": ENDS,
        "messages": [{"role": "user", "content": f"{PROMPT} ({user})"}],
    }  # fmt: skip
    async with session.post(f"{url}/v1/chat/completions", json=asked) as answer:
        assert answer.status == 200, await answer.text()
        ended = [line async for line in answer.content if b'"finish_reason":"length"' in line.replace(b" ", b"")]
    assert ended, "the answer ended before its last token"
    return tokens


async def rate(session: aiohttp.ClientSession, url: str, tokens: int, users: int = 1) -> float:
    """Tokens a second, from the request on until the last piece, of so many users at once."""
    begun_s = time.perf_counter()
    counts = await asyncio.gather(*(written(session, url, user, tokens) for user in range(users)))
    return sum(counts) / (time.perf_counter() - begun_s)


async def decode(options: Options) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder, alone(options, Path(folder)) as url, node(options) as served:
        async with _session() as session, _session(served.key) as direct:

            async def without() -> float:
                with served.stopped():
                    return await rate(session, url, TOKENS)

            async def through() -> float:
                return await rate(session, served.url, TOKENS)

            async def behind() -> float:
                return await rate(direct, served.server_url, TOKENS)

            share, left, right = await paired(without, through, options.pairs)
            gateway, _, _ = await paired(behind, through, options.pairs // 2)
    beside = f"{left:.1f} tokens/s alone"
    return [
        Figure("one stream: through millhand, of llama.cpp's server alone", share, "", ">= 0.97", beside),
        Figure("one stream: tokens/s through millhand", right, "/s"),
        Figure("one stream: through the gateway, of the server behind it", gateway, ""),
    ]


@contextlib.contextmanager
def generating(options: Options) -> Iterator[Callable[[], float]]:
    """transformers in a process of its own; gives what has it generate, in tokens/s."""
    script = str(HERE / "peers" / "language_transformers.py")
    command = [options.transformers_python, script, str(options.gguf), str(options.threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        into, out = peer.stdin, peer.stdout
        while out.readline().strip() != "ready":
            if peer.poll() is not None:
                raise SystemExit("transformers did not come up")

        def generate() -> float:
            into.write(json.dumps([PROMPT, PEER_TOKENS]) + "\n")
            into.flush()
            tokens, spent_s = json.loads(out.readline())
            return float(tokens / spent_s)

        yield generate
        peer.kill()


async def transformers(options: Options) -> list[Figure]:
    if not options.transformers_python:
        progress("no --transformers-python: left out")
        return []
    with generating(options) as generate, node(options) as served:
        async with _session() as session:

            async def generated() -> float:
                with served.stopped():
                    return generate()

            async def through() -> float:
                return await rate(session, served.url, PEER_TOKENS)

            share, left, _ = await paired(generated, through, max(3, options.pairs // 2))
    beside = f"{left:.1f} tokens/s: transformers, fp32"
    return [Figure("one stream: times transformers' generate in fp32", share, "", ">= 5", beside)]


@contextlib.contextmanager
def llama_cpp_python(options: Options) -> Iterator[str]:
    """Its server, which answers one request after the other; gives its URL."""
    port = free_port()
    command = [
        options.llama_cpp_python, "-m", "llama_cpp.server", "--model", str(options.gguf), "--host", "127.0.0.1",
        "--port", str(port), "--n_ctx", str(CONTEXT_TOKENS), "--n_threads", str(options.threads),
        "--n_threads_batch", str(options.threads), "--interrupt_requests", "false", "--verbose", "false",
    ]  # fmt: skip
    peer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + START_DEADLINE_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            if peer.poll() is not None or time.monotonic() > end_s:
                raise SystemExit("llama-cpp-python's server did not come up")
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        peer.kill()
        peer.wait()


async def users(options: Options) -> list[Figure]:
    if not options.llama_cpp_python:
        progress("no --llama-cpp-python: left out")
        return []
    with llama_cpp_python(options) as url, node(options) as served:
        async with _session() as session:

            async def peer() -> float:
                with served.stopped():
                    return await rate(session, url, PEER_TOKENS, USERS)

            async def through() -> float:
                return await rate(session, served.url, PEER_TOKENS, USERS)

            share, left, right = await paired(peer, through, max(3, options.pairs // 2))
    return [
        Figure("four users: times llama-cpp-python's server", share, "", ">= 1", f"{left:.1f} tokens/s"),
        Figure("four users: tokens/s through millhand, together", right, "/s"),
    ]


async def first_ms(session: aiohttp.ClientSession, url: str, messages: Sequence[Any]) -> tuple[float, float]:
    """Time until the server's first event, which it sends with its first token, and until the guards let text out."""
    asked = {"model": MODEL, "stream": True, "max_tokens": 16, "temperature": 0, "messages": list(messages)}
    begun_s = time.perf_counter()
    event_ms = 0.0
    async with session.post(f"{url}/v1/chat/completions", json={**asked, "logit_bias": ENDS}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                now_ms = 1e3 * (time.perf_counter() - begun_s)
                event_ms = event_ms or now_ms
                choices = json.loads(line[6:]).get("choices") or [{}]
                if (choices[0].get("delta") or {}).get("content"):
                    await answer.read()
                    return event_ms, now_ms
    raise SystemExit("no text came")


async def prefix(options: Options) -> list[Figure]:
    """Orders of other faults on other machines: each reads its own prompt first."""
    import orders as order_cases

    pack, phrases = find_pack(PackSettings()), PHRASES["en"]
    found: list[list[tuple[float, float]]] = []
    with node(options) as served:
        async with _session() as session:
            for case in {case.fault: case for case in order_cases.cases(pack)}.values():
                asked = Question(case.draft, case.alert, [], case.passages, pack, None)  # type: ignore[arg-type]
                cause = asked.messages("choose", field=phrases.cause_field, **asked.seen)
                step = asked.messages("choose", field=phrases.step_field, **asked.seen)
                symptom = asked.messages("field", field=phrases.symptom_field, **asked.seen)
                asks = (cause, cause, step, symptom)
                found.append([await first_ms(session, served.url, messages) for messages in asks])

    def share(which: int, of: int) -> float:
        return statistics.median(times[which][of] / times[0][of] for times in found)

    return [
        Figure("orders: first token of an order's first question", statistics.median(t[0][0] for t in found), "ms"),
        Figure("orders: the first question again at once, of the first", share(1, 0), "", "<= 0.1"),
        Figure("orders: the first question again at once, first text past the guards", share(1, 1), ""),
        Figure("orders: the second question on the same prefix, of the first", share(2, 0), "", "<= 0.1"),
        Figure("orders: the third question on the same prefix, of the first", share(3, 0), "", "<= 0.1"),
    ]


async def aborts(options: Options) -> list[Figure]:
    with node(options, SHORT_CONTEXT_TOKENS, 0) as served:
        async with _session() as session, _session(served.key) as direct:

            async def left() -> tuple[int, float]:
                busy = sum(slot["is_processing"] for slot in await get(direct, f"{served.server_url}/slots"))
                async with direct.get(f"{served.server_url}/metrics") as answer:
                    lines = (await answer.text()).splitlines()
                waiting = (line for line in lines if line.startswith("llamacpp:requests_deferred"))
                return busy, sum(float(line.split()[-1]) for line in waiting)

            cells, start = await filled(session, served.url), await left()
            before = served.server_bytes()
            await abort(Client(session, 64), served.url)
            busy, deferred = await settled(left, start)
            cells_after = await filled(session, served.url)
            grown = served.server_bytes() - before
    return [
        Figure("1000 aborted streams: slots busy after", busy, "", "== 0"),
        Figure("1000 aborted streams: requests deferred after", deferred, "", "== 0"),
        Figure("KV cells that can be filled before", cells, "", f"== {SLOTS * SHORT_CONTEXT_TOKENS}"),
        Figure("1000 aborted streams: KV cells that cannot be filled after", cells - cells_after, "", "== 0"),
        Figure("1000 aborted streams: memory of the server, more than before", round(grown / 2**20, 2), "MiB"),
    ]


async def filled(session: aiohttp.ClientSession, url: str) -> int:
    """Tokens that stand in all slots together once each is filled to its end."""

    async def one(number: int) -> int:
        asked = {
            "model": MODEL, "prompt": f"{number} " + "one two three four " * 110, "max_tokens": SHORT_CONTEXT_TOKENS,
            "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            found = await answer.json()
            assert answer.status == 200, found
            return int(found["usage"]["total_tokens"])

    return sum(await asyncio.gather(*map(one, range(SLOTS))))


PARTS: dict[str, Callable[[Options], Awaitable[list[Figure]]]] = {
    "decode": decode,
    "transformers": transformers,
    "users": users,
    "prefix": prefix,
    "aborts": aborts,
}


def _session(key: str = "") -> aiohttp.ClientSession:
    # A connection of its own for each request: llama.cpp's server closes after a stream.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=600),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


def main() -> int:
    sys.path.insert(0, str(HERE / "eval"))  # the orders' own cases
    arguments = parser(__doc__)
    arguments.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    arguments.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    arguments.add_argument("--threads", type=int, default=2, help="threads of every server")
    arguments.add_argument("--pairs", type=int, default=12, help="alternating pairs of one stream")
    arguments.add_argument("--transformers-python", default="", help="an interpreter with torch and transformers")
    arguments.add_argument("--llama-cpp-python", default="", help="an interpreter with llama-cpp-python[server]")
    arguments.add_argument("--into", type=Path, help="results of other parts, which this run's are put among")
    given = arguments.parse_args()
    options = Options(given.gguf, given.threads, given.pairs, given.transformers_python, given.llama_cpp_python)
    before = json.loads(given.into.read_text()) if given.into and given.into.exists() else {"figures": [], "load": {}}
    figures, load = [], before["load"]
    for part in given.parts:
        progress(part)
        figures += uvloop.run(PARTS[part](options))
        load[part] = [round(value, 2) for value in os.getloadavg()]
    names = {figure.name for figure in figures}
    kept = [figure for figure in before["figures"] if figure["name"] not in names]
    figures = [
        Figure(**{key: figure[key] for key in ("name", "value", "unit", "goal", "peer")}) for figure in kept
    ] + figures
    return report("language_cpu", figures, model=given.gguf.name, threads=given.threads, load=load)


if __name__ == "__main__":
    sys.exit(main())
